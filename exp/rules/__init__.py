"""The decision rules: probabilities -> labels."""
