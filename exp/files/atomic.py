"""Files that are whole after any interruption, room for them on the disk, and what tells two files apart."""

import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from exp.runtime.errors import InputError

TEMPORARY = f".tmp-{socket.gethostname()}-"  # then the process, and the name
PART = ".part"
GIB = 2**30


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text: after a crash or a power cut `path` has the old content or the new, never a part of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path, *, durable: bool = True, new: bool = False, suffix: str = PART) -> Iterator[Path]:
    """Gives a path beside `path`, for a file or folder that becomes `path` if the body succeeds.

    durable: it is on the disk then; without, a power cut may take it. new: InputError if there is something by then.
    suffix: of the path until then, for libraries that go by it; nothing that is looked for ends in PART.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name[-40:]}{suffix}")  # 255 bytes at most
    try:
        yield temporary
        if new and path.exists():
            raise InputError(f"{path}: got something that was not there before, expected a free name")
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    finally:
        _remove(temporary)
    if durable:
        sync(path.parent)


def remove_stale(folder: Path) -> None:
    """Remove what processes of this machine that no longer live have left half-written in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        pid = path.name.removeprefix(TEMPORARY).partition("-")[0]
        try:
            os.kill(int(pid), 0)  # changes nothing where there is such a process
        except (ValueError, PermissionError):  # another user's process; or no file of this program's
            pass
        except ProcessLookupError:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def into_older(path: Path, number: int) -> Path:
    return path.parent / "older" / f"{path.stem}.{number}{path.suffix}"


def move_aside(paths: Sequence[Path], place: Callable[[Path, int], Path] = into_older) -> None:
    """Rename what there is of `paths` to place(path, number), all under the first number that is free for each."""
    number = next(n for n in count(1) if not any(place(path, n).exists() for path in paths))
    for path in filter(Path.exists, paths):
        place(path, number).parent.mkdir(exist_ok=True)
        os.rename(path, place(path, number))


def append_line(path: Path, line: str) -> None:
    """Append a line of text, on a line of its own even where an earlier one was cut off."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """A file's content -> its SHA-256, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """What this user may still write to the file system of a path that need not be there; quotas are not known."""
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def require_room(path: Path, needed: int) -> None:
    """InputError if `needed` bytes do not fit where `path` lies."""
    if free_bytes(path) < needed:
        raise no_room(path, needed, "not begun")


def no_room(path: Path, needed: int, reason: str) -> InputError:
    free = free_bytes(path)
    return InputError(
        f"{path}: not written ({reason}): it needs {needed:,} bytes ({needed / GIB:.2f} GiB) and {free:,} are free; "
        "what was written before is whole: make room and start the same command again"
    )
