"""One owner a folder: a lock of the operating system's, which ends with its process, and a file that says whose."""

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from exp.runtime.errors import InputError

LOCK = ".lock"


@contextmanager
def own_folder(folder: Path, doing: str) -> Iterator[None]:
    """Inside, or to the end of this process however it ends, no other process gets in; InputError where one is.

    The folder is made if need be, and goes at the end if nothing was put into it. doing: for the other's message.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path, locked = folder / LOCK, False
    try:
        while not locked:
            with open(path, "a+", encoding="utf-8", errors="replace") as file:
                _lock(file, path)
                # False where the owner before removed the file between the opening and the locking.
                locked = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
                if locked:
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()} ({doing}: {' '.join(sys.argv)})\n")
                    file.flush()
                    try:
                        yield
                    finally:
                        path.unlink(missing_ok=True)
    finally:
        for parent in made:
            if not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()


def _lock(file: TextIO, path: Path) -> None:
    """By fcntl, whose locks forked processes do not inherit: loader workers outlive a killed parent by some seconds."""
    file.seek(0)
    owner = file.readline().strip()
    if owner and not owner.startswith(("process ", "{")):  # an earlier version wrote JSON
        raise InputError(f"{path}: got a file that is no lock, expected one that names its owner")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = owner or "another process"
        raise InputError(f"{path.parent}: {owner} is at work there, expected no other; {path} is its lock") from None
    except OSError as error:
        raise InputError(
            f"{path.parent}: got a file system that keeps no locks ({error}), expected one that does: else "
            "two programs could write there at once (docs/robustness.md)"
        ) from None
