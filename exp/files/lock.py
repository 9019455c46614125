"""One owner a folder: a lock of the operating system's, which ends with its process, and a file that says whose."""

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from exp.runtime.errors import InputError

LOCK = ".lock"
OWNER = "process "  # how its text begins


@dataclass(frozen=True)
class Claim:
    """A folder's lock, held by this process."""

    path: Path
    file: TextIO

    def check(self) -> None:
        """InputError if the folder is no longer this process's; to be called before it writes there.

        Somebody may have removed the lock, and a file server forgets those of a machine that it has not heard of for
        long, one that slept, say.
        """
        if not self.is_held():
            raise InputError(
                f"{self.path}: got a lock that is no longer this process's (removed, or lost while it stood still), "
                "expected its own; nothing more is written there"
            )

    def is_held(self) -> bool:
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # again: no change where it is held
            return os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except OSError:
            return False


@contextmanager
def own_folder(folder: Path, doing: str) -> Iterator[Claim]:
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
                claim = Claim(path, file)
                # False where the owner before removed the file between the opening and the locking.
                locked = claim.is_held()
                if locked:
                    try:
                        file.truncate(0)
                        file.write(f"{OWNER}{os.getpid()} on {socket.gethostname()} ({doing}: {' '.join(sys.argv)})\n")
                        file.flush()
                        yield claim
                    finally:
                        if claim.is_held():
                            path.unlink()
    finally:
        for parent in made:
            if not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()


def _lock(file: TextIO, path: Path) -> None:
    """By fcntl, whose locks forked processes do not inherit: loader workers outlive a killed parent by some seconds."""
    file.seek(0)
    owner = file.readline().strip()
    torn = OWNER.startswith(owner) or not owner.strip("\0")  # by a full disk or a power cut
    if not torn and not owner.startswith((OWNER, "{")):  # an earlier version wrote JSON
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
