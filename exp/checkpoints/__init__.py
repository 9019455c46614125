"""What a checkpoint holds, and how its files are written, found and rotated."""
