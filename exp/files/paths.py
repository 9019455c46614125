"""Names of files: which of a folder's count, which look alike, and which of a list lead out of their folder."""

import os
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, count
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


OF_SYSTEMS = ("@eaDir", "__MACOSX")  # folders of thumbnails and metadata: Synology's, macOS's in archives


def is_hidden(path: Path) -> bool:
    """Whether a part of a relative path is what systems keep for themselves: .ipynb_checkpoints, ._a.png, @eaDir."""
    return any(part.startswith(".") or part in OF_SYSTEMS for part in path.parts)


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """What fits a pattern of pathlib's below a folder, sorted: no folders, and nothing that is hidden."""
    found = (path for path in folder.glob(pattern) if not is_hidden(path.relative_to(folder)))
    return sorted(path for path in found if not path.is_dir())


def flat_names(names: Sequence[str]) -> list[str]:
    """Names that may have folders in them -> names of files in one folder, no two alike.

    a/b becomes a_b, or a_b.2 where a_b is another's.
    """
    taken, flat = {name for name in names if "/" not in name}, []
    for name in names:
        own = name.replace("/", "_")
        if "/" in name:
            own = next(free for free in chain([own], (f"{own}.{n}" for n in count(2))) if free not in taken)
            taken.add(own)
        flat.append(own)
    return flat


def match_names(files: Mapping[str, Path], names: Collection[str]) -> dict[str, Path]:
    """Files by name -> by those of `names` that look the same: macOS stores an accented letter as two characters.

    A file whose very name is among `names` keeps it, and so does one that has no like there.
    """
    alone = {_composed(name): name for name in names if name not in files}
    return {name if name in names else alone.get(_composed(name), name): path for name, path in files.items()}


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


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
    return [_inside(name, path) for name in _read_lines(path)]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """A list file of two paths a line -> the pairs, without a slash in front; none where a line is anything else.

    So does the paper's code list the images of PASCAL VOC: "/JPEGImages/x.jpg /SegmentationClassAug/x.png".
    InputError for a path that leads out.
    """
    rows = [line.split() for line in _read_lines(path)]
    if any(len(row) != 2 or "/" not in row[0] or "/" not in row[1] for row in rows):
        return []
    return [tuple(_inside(name.removeprefix("/"), path) for name in row) for row in rows]


def _read_lines(path: Path) -> list[str]:
    lines = read_text(path, "one image name a line", encoding="utf-8-sig").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _inside(name: str, path: Path) -> str:
    if leads_out(name):
        raise InputError(f"{path}: got '{name[:200]}', which leads out of the data folder, expected a name inside it")
    return name
