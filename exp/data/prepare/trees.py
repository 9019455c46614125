"""What a data set's folder lacks, by the archives that hold it."""

from pathlib import Path

from exp.data.prepare.facts import ARCHIVES
from exp.runtime.errors import InputError

PACKED = (".zip", ".tar", ".tgz")  # what an unpacked tree does not consist of


def check_tree(name: str, data_dir: Path) -> None:
    """InputError that tells every missing or empty folder of a data set, and the archive it comes from."""
    if not data_dir.is_dir():
        raise InputError(f"{data_dir}: no such folder, expected the one that holds the data sets")
    missing = []
    for archive in ARCHIVES[name]:
        folders = [folder for folder in archive.folders if not _holds_something(data_dir / folder)]
        if folders:
            packed = _find_packed(data_dir, folders[0], archive.name)
            hint = f", which lies packed at {packed}" if packed else ""
            missing.append(f"{', '.join(folders)} (from {archive.name}{hint})")
    if missing:
        raise InputError(f"{data_dir}: got nothing unpacked in {'; '.join(missing)}. DATA.md shows the expected tree")


def _holds_something(folder: Path) -> bool:
    """Whether a folder has anything unpacked in it."""
    if not folder.is_dir():
        return False
    return any(not path.name.startswith(".") and path.suffix not in PACKED for path in folder.iterdir())


def _find_packed(data_dir: Path, folder: str, archive: str) -> Path | None:
    """Where an archive lies that was not unpacked, looking in data_dir and the folders down to its content."""
    places = [data_dir / parent for parent in (folder, *map(str, Path(folder).parents))]
    return next((place / archive for place in places if (place / archive).is_file()), None)
