"""What a data set's folder lacks, by the archives that hold it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from exp.runtime.errors import InputError

PACKED = (".zip", ".tar", ".tgz")  # what an unpacked tree does not consist of


def check_tree(archives: Mapping[str, Sequence[str]], data_dir: Path) -> None:
    """Archive -> folders that it fills; InputError that tells all that are missing or empty, and their archive."""
    if not data_dir.is_dir():
        raise InputError(f"{data_dir}: no such folder, expected the one that holds the data sets")
    missing = []
    for archive, filled in archives.items():
        folders = [folder for folder in filled if not _holds_something(data_dir / folder)]
        if folders:
            missing.append(f"{', '.join(folders)} (from {archive})")
    if missing:
        raise InputError(f"{data_dir}: got nothing unpacked in {'; '.join(missing)}. DATA.md shows the expected tree")


def _holds_something(folder: Path) -> bool:
    """Whether a folder has anything unpacked in it."""
    if not folder.is_dir():
        return False
    return any(not path.name.startswith(".") and path.suffix not in PACKED for path in folder.iterdir())
