"""One owner a folder, and locks whose owner is gone."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from exp.files import lock as locks
from exp.files.lock import own_folder
from exp.runtime.errors import InputError
from tests.conftest import ROOT

HOLD = """
import os, sys, time
from pathlib import Path
from exp.files.lock import own_folder
with own_folder(Path(sys.argv[1]), "training"):
    child = os.fork()  # as a loader worker
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock of tmp_path / "run", and has forked one that sleeps."""
    command = [sys.executable, "-c", HOLD, tmp_path / "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)
    process.stdout.close()


def test_the_second_is_told_who_has_the_folder(tmp_path: Path, holder: subprocess.Popen):
    for _ in range(2):  # being refused neither takes the lock from its owner nor hides who that is
        match = rf"run: process {holder.pid} on .* \(training: .*\) is at work there, .*\.lock is its lock"
        with pytest.raises(InputError, match=match), own_folder(tmp_path / "run", "training"):
            pass


def test_the_lock_of_a_killed_process_is_free_though_its_child_lives(tmp_path: Path, holder: subprocess.Popen):
    holder.kill()
    holder.wait()
    with own_folder(tmp_path / "run", "training"):
        assert f"process {os.getpid()} on" in (tmp_path / "run" / ".lock").read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_process_that_stands_still_keeps_its_folder(tmp_path: Path, holder: subprocess.Popen):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(InputError, match="is at work there"), own_folder(tmp_path / "run", "training"):
        pass


@pytest.mark.parametrize("text", ['{"host": "other", "pid": 1}\n', "", "proc", "process 12 on", "\0" * 30])
def test_a_lock_of_an_earlier_version_or_a_torn_one_is_taken_over(tmp_path: Path, text: str):
    (tmp_path / ".lock").write_text(text)
    with own_folder(tmp_path, "training"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_made_for_the_lock_alone_go_with_it(tmp_path: Path):
    run = tmp_path / "output" / "run"
    with own_folder(run, "training"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError), own_folder(run, "training"):
        raise InputError("wrong flags")
    assert list(tmp_path.iterdir()) == []
    with own_folder(run, "training"):
        (run / "log").write_text("kept")
    assert [p.name for p in run.iterdir()] == ["log"]


def test_a_file_that_is_removed_before_it_is_locked_is_made_anew(tmp_path: Path, monkeypatch):
    lock, calls = locks._lock, []

    def late(file: TextIO, path: Path) -> None:
        if not calls:
            path.unlink()
        calls.append(path)
        lock(file, path)

    monkeypatch.setattr(locks, "_lock", late)
    with own_folder(tmp_path, "training"):
        assert "training" in (tmp_path / ".lock").read_text()
    assert len(calls) == 2


def test_a_file_that_is_no_lock_is_left_alone(tmp_path: Path):
    (tmp_path / ".lock").write_text("mine")
    with pytest.raises(InputError, match=r"\.lock: got a file that is no lock"), own_folder(tmp_path, "training"):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("exp.files.lock.fcntl.lockf", refuse)
    refused = pytest.raises(InputError, match=r"a file system that keeps no locks .*No locks available")
    with refused, own_folder(tmp_path / "run", "training"):
        pass


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full() -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("exp.files.lock.socket.gethostname", full)
    with pytest.raises(OSError, match="No space left"), own_folder(tmp_path / "run", "training"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_owner_whose_lock_was_removed_notices_and_leaves_the_next_ones(tmp_path: Path):
    with own_folder(tmp_path, "training") as claim:
        claim.check()
        (tmp_path / ".lock").unlink()
        with pytest.raises(InputError, match=r"\.lock: got a lock that is no longer this process's"):
            claim.check()
        (tmp_path / ".lock").write_text("process of another")
        with pytest.raises(InputError, match="nothing more is written there"):
            claim.check()
    assert (tmp_path / ".lock").read_text() == "process of another"


def test_an_owner_whose_lock_a_file_server_forgot_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with own_folder(tmp_path, "training") as claim:

        def lost(*args: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr("exp.files.lock.fcntl.lockf", lost)
        with pytest.raises(InputError, match="lost while it stood still"):
            claim.check()
