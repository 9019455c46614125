"""One owner a folder, and locks whose owner is gone."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from exp.files import lock as locks
from exp.files.lock import FolderLock, Owner, this_process
from exp.runtime.errors import InputError
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from exp.files.lock import FolderLock
FolderLock(Path(sys.argv[1]), ".lock", "training").acquire()
print("held", flush=True)
time.sleep(60)
"""


def lock(folder: Path, **options: object) -> FolderLock:
    return FolderLock(folder, ".lock", "training", **options)


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock of tmp_path / "run"."""
    command = [sys.executable, "-c", HOLD, tmp_path / "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_told_who_has_the_folder(tmp_path: Path, holder: subprocess.Popen):
    with pytest.raises(InputError, match=rf"run: process {holder.pid} on .* is at work there \(training: .*\.lock is"):
        lock(tmp_path / "run").acquire()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path, holder: subprocess.Popen, capsys):
    holder.kill()
    holder.wait()
    start = time.monotonic()
    mine = lock(tmp_path / "run")
    mine.acquire()
    assert time.monotonic() - start < 10
    assert f"taken over from process {holder.pid}" in capsys.readouterr().err
    mine.release()
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_process_that_has_ended_and_was_not_waited_for_is_gone(tmp_path: Path, holder: subprocess.Popen):
    holder.kill()
    until = time.monotonic() + 10
    while locks.started(holder.pid) != locks.ENDED:
        assert time.monotonic() < until
        time.sleep(0.01)
    mine = lock(tmp_path / "run")
    mine.acquire()
    mine.release()


def test_another_process_of_the_same_number_is_not_taken_for_the_owner(tmp_path: Path):
    old = replace(this_process("training"), started="1")
    (tmp_path / ".lock").write_text(json.dumps(asdict(old)))
    lock(tmp_path).acquire()
    assert Owner(**json.loads((tmp_path / ".lock").read_text())).started == this_process("").started


def elsewhere(folder: Path) -> Owner:
    owner = Owner("other-host", "boot pid:[1]", 1, "5", "training", "main.py")
    folder.mkdir(exist_ok=True)
    (folder / ".lock").write_text(json.dumps(asdict(owner)))
    return owner


def test_a_silent_owner_on_another_machine_is_given_up(tmp_path: Path, capsys):
    elsewhere(tmp_path)
    lock(tmp_path, heartbeat=0.05, patience=0.3).acquire()
    assert "taken over from process 1 on other-host" in capsys.readouterr().err


def test_a_living_owner_on_another_machine_keeps_it(tmp_path: Path, monkeypatch):
    elsewhere(tmp_path)
    sleep = time.sleep

    def alive(seconds: float) -> None:
        sleep(seconds)
        os.utime(tmp_path / ".lock")

    monkeypatch.setattr(locks.time, "sleep", alive)
    with pytest.raises(InputError, match="process 1 on other-host"):
        lock(tmp_path, heartbeat=0.05, patience=5).acquire()


def test_the_owner_gives_signs_of_life(tmp_path: Path):
    mine = lock(tmp_path, heartbeat=0.02)
    mine.acquire()
    first = (tmp_path / ".lock").stat().st_mtime_ns
    until = time.monotonic() + 5
    while (tmp_path / ".lock").stat().st_mtime_ns == first:
        assert time.monotonic() < until
        time.sleep(0.01)
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_folders_made_for_the_lock_alone_go_with_it(tmp_path: Path):
    mine = lock(tmp_path / "output" / "run")
    mine.acquire()
    mine.release()
    assert list(tmp_path.iterdir()) == []
    mine = lock(tmp_path / "output" / "run")
    mine.acquire()
    (tmp_path / "output" / "run" / "log").write_text("kept")
    mine.release()
    assert [p.name for p in (tmp_path / "output" / "run").iterdir()] == ["log"]


def test_a_lock_that_another_has_taken_over_is_not_removed(tmp_path: Path):
    mine = lock(tmp_path)
    mine.acquire()
    other = elsewhere(tmp_path)
    mine.release()
    assert Owner(**json.loads((tmp_path / ".lock").read_text())) == other


@pytest.mark.parametrize("text", ["", "[]", "{}", "mine"])
def test_a_file_that_is_no_lock_is_left_alone(tmp_path: Path, text: str):
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(InputError, match=r"\.lock: got a file that is no lock"):
        lock(tmp_path).acquire()
    assert (tmp_path / ".lock").read_text() == text


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch):
    def refuse(*paths: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    mine = lock(tmp_path)
    mine.acquire()
    with pytest.raises(InputError, match="is at work there"):
        lock(tmp_path).acquire()
    mine.release()
    assert list(tmp_path.iterdir()) == []
