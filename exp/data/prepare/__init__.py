"""Data sets as their owners hand them out -> what training reads. Nothing here imports PyTorch."""
