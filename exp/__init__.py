"""The experiment framework: train a segmentation network and evaluate decision rules on it."""
