"""Data sets, and what turns them into batches. Empty: preparation's workers import it, and need no PyTorch."""
