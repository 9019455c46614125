"""Names of files from YAMLs and lists: which of them lead out of the folder that they are meant to be in."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from exp.files.text import read_text
from exp.runtime.errors import InputError

NOT_UTF8 = "no UTF-8 text, expected one that is: rename it"


def leads_out(name: str) -> bool:
    """Whether a name is empty, absolute, climbs by ".." in the style of any system, or holds control characters."""
    windows = PureWindowsPath(name)
    return (
        not name.strip()
        or not name.isprintable()
        or PurePosixPath(name).is_absolute()
        or bool(windows.drive or windows.root)
        or ".." in PurePosixPath(name).parts
        or ".." in windows.parts
    )


def require_utf8(path: Path, name: str | None = None) -> None:
    """InputError for a path whose name (or `name`, some of the path) is no UTF-8: no CSV or JSON could hold it."""
    if not is_utf8(path.name if name is None else name):
        raise InputError(f"{path}: got a name that is {NOT_UTF8}")


def is_utf8(name: str) -> bool:
    """Whether a name, as the system gives it, stands for text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def files_and_links(folder: Path) -> dict[str, bool]:
    """A folder -> the names in it, and of each whether it is a link, without a look at the files themselves."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_symlink() for entry in entries}


class Fence:
    """A folder that listed files may not leave. It may be a link itself: what counts is where it really lies.

    The folder of each file is resolved once, and a file alone if it is a link: ten thousand names cost no look at ten
    thousand files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._real, self._folders = folder, _real(folder), {}

    def check(self, path: Path, *, is_link: bool) -> None:
        """InputError for a file, listed below the folder, that lies elsewhere."""
        if path.parent not in self._folders:
            self._folders[path.parent] = _real(path.parent)
        real = _real(path) if is_link else self._folders[path.parent] / path.name
        if not real.is_relative_to(self._real):
            raise InputError(
                f"{path}: got a listed file that a link leads to {real}, expected one that lies in {self._real}"
            )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # which, unlike resolve(), bears links that lead in a circle


def read_names(path: Path) -> list[str]:
    """A list file -> the names or relative paths in it, one a line; InputError for one that leads out."""
    lines = read_text(path, "one image name a line", encoding="utf-8-sig").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    for name in names:
        if leads_out(name):
            raise InputError(
                f"{path}: got '{name[:200]}', which leads out of the data folder, expected a name inside it"
            )
    return names
