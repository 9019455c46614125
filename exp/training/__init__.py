"""The training session: step, loop, losses, optimisers, validation, saving."""
