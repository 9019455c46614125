"""The experiment framework: train a segmentation network and judge decision rules on it."""
