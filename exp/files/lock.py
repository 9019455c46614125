"""One owner a folder: a lock file that says who holds it, and is known to be stale when its owner is gone."""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from exp.runtime.errors import InputError

HEARTBEAT = 10.0  # seconds between two signs of life of an owner
ENDED = "ended"
PATIENCE = 60.0  # without one for so long the owner on another machine is taken for dead


@dataclass(frozen=True)
class Owner:
    """A process. machine: the host's name, and what tells its boot and its process numbers from others' of that name.

    started: when the process began, by the kernel's clock, so that another process of the same number is not taken
    for it; "" where the system does not tell.
    """

    host: str
    machine: str
    pid: int
    started: str
    doing: str
    command: str

    def is_gone(self, here: "Owner") -> bool | None:
        """Whether the process has ended; None where that cannot be seen from `here`."""
        if (self.host, self.machine) != (here.host, here.machine):
            return None
        return not is_alive(self.pid) or started(self.pid) != self.started


def is_alive(pid: int) -> bool:
    """Whether this machine has such a process, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def this_process(doing: str) -> Owner:
    return Owner(socket.gethostname(), _machine(), os.getpid(), started(os.getpid()), doing, " ".join(sys.argv))


def started(pid: int) -> str:
    """The start time of a process in clock ticks since boot; "" where there is no /proc, ENDED for one that has ended
    and that nobody has asked for its status."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return ENDED if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: the host's name alone
        return ""


@dataclass
class FolderLock:
    """Holds <folder>/<name> from acquire() to release().

    The folder is made if need be. The file is touched every `heartbeat` seconds; a lock of a process of this machine
    is stale when that has ended, one of another machine when it has not been touched for `patience` seconds, for which
    an unclear one is watched. doing: what its owner does, for the message.
    """

    folder: Path
    name: str
    doing: str
    heartbeat: float = HEARTBEAT
    patience: float = PATIENCE
    _done: threading.Event = field(default_factory=threading.Event, repr=False)
    _made: list[Path] = field(default_factory=list, repr=False)

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def acquire(self) -> None:
        """Take the lock; InputError where a living process holds it."""
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._me = this_process(self.doing)
        while not self._created():
            owner = self._read_owner()
            if owner is not None and not self._is_gone(owner):
                raise InputError(
                    f"{self.folder}: process {owner.pid} on {owner.host} is at work there ({owner.doing}: "
                    f"{owner.command}), expected no other; {self.path} is its lock"
                )
            if owner is not None:
                self._remove_lock_of(owner)
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Give the lock up; folders that acquire() made go too if nothing was put into them."""
        self._done.set()
        if self._read_owner() == self._me:
            self.path.unlink(missing_ok=True)
        self._remove_folders()

    def _remove_folders(self) -> None:
        for path in self._made:
            if not path.is_dir() or any(path.iterdir()):
                break
            path.rmdir()

    def _created(self) -> bool:
        try:
            return self._create()
        except OSError:
            self._remove_folders()
            raise

    def _create(self) -> bool:
        """Make the lock with its content in one step, unless there is one."""
        draft = self.path.with_name(f"{self.name}.{self._me.host}.{self._me.pid}")
        try:
            draft.write_text(json.dumps(asdict(self._me)) + "\n", encoding="utf-8")
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if not draft.is_file():
                raise
            try:
                with open(self.path, "x", encoding="utf-8") as file:
                    file.write(draft.read_text(encoding="utf-8"))
            except FileExistsError:
                return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _read_owner(self) -> Owner | None:
        """Who holds the lock; None if it has just been given up. InputError for a file that is no lock."""
        try:
            return Owner(**json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{self.path}: got a file that is no lock ({error}), expected one that names its owner; remove it if "
                "no run is using the folder"
            ) from None

    def _is_gone(self, owner: Owner) -> bool:
        gone = owner.is_gone(self._me)
        return self._is_silent() if gone is None else gone

    def _remove_lock_of(self, owner: Owner) -> None:
        """Remove the lock of an owner that is gone, if it is still that one's."""
        claimed = self.path.with_name(f"{self.name}.{self._me.host}.{self._me.pid}.stale")
        try:
            os.rename(self.path, claimed)  # of several that find it stale, one alone succeeds
        except FileNotFoundError:
            return
        if json.loads(claimed.read_text(encoding="utf-8")) == asdict(owner):
            print(
                f"{self.path}: taken over from process {owner.pid} on {owner.host}, which has ended without giving it "
                "up",
                file=sys.stderr,
            )
        else:  # another was quicker: this is its lock, which goes back unless a third has made one meanwhile
            with suppress(FileExistsError):
                os.link(claimed, self.path)
        claimed.unlink()

    def _is_silent(self) -> bool:
        """Whether nobody touches the lock within `patience` seconds; the clocks of two machines are not compared."""
        first = self._touched()
        until = time.monotonic() + self.patience
        while time.monotonic() < until:
            time.sleep(self.heartbeat / 10)
            if self._touched() != first:
                return False
        return True

    def _touched(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        while not self._done.wait(self.heartbeat):
            with suppress(OSError, InputError):  # a disk that is full or gone is reported by what has to write to it
                if self._read_owner() == self._me:
                    os.utime(self.path)
