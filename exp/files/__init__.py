"""Files of anybody, bounded before they are read; files of ours, whole or not there."""
