"""Old place of exp/volumes.py, which stands outside exp.data so that preparing volumes does not import PyTorch."""

from exp.volumes import *  # noqa: F403
