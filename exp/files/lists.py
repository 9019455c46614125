"""Lists of images in files, and whole numbers in words."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from exp.files.paths import leads_out
from exp.files.text import read_text
from exp.runtime.errors import InputError


def read_names(path: Path, *, spaces: bool = False) -> list[str]:
    """A list file -> the names or relative paths in it, one a line; InputError for a line that is anything else.

    spaces: names may hold spaces.
    """
    lines = read_text(path, "one image name a line", encoding="utf-8-sig").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    for name in names:
        if not spaces and len(name.split()) > 1:
            raise InputError(f"{path}: got the line '{name[:200]}', expected one image name and nothing else")
        if leads_out(name):
            raise InputError(
                f"{path}: got '{name[:200]}', which leads out of the data folder, expected a name inside it"
            )
    return names


def describe_numbers(numbers: Sequence[int], separator: str = " or ") -> str:
    """Ascending whole numbers -> the same in words: [0, 1, 2, 255] -> '0..2 or 255'."""
    runs = np.split(np.asarray(numbers), np.flatnonzero(np.diff(numbers) > 1) + 1)
    return separator.join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
