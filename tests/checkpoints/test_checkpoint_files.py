"""Whatever happens while a checkpoint is written or lies on the disk, the newest whole one is found."""

import errno
import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from exp.checkpoints import checkpoint_files
from exp.checkpoints.checkpoint_files import (
    facts_path,
    find_checkpoint,
    list_checkpoints,
    remove_leftovers,
    set_aside_damaged,
    write_checked,
)
from exp.files import atomic as durable
from exp.runtime.errors import InputError


def write(folder: Path, iteration: int, content: bytes = b"content") -> Path:
    path = folder / f"iter_{iteration:07d}.pt"
    write_checked(path, lambda temporary: temporary.write_bytes(content), {"iteration": iteration}, len(content))
    return path


def test_the_json_beside_a_checkpoint_has_its_checksum(tmp_path: Path):
    path = write(tmp_path, 5)
    facts = json.loads(facts_path(path).read_text())
    expected = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert (facts["sha256"], facts["bytes"], facts["iteration"]) == (expected, 7, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005.pt", "iter_0000005.pt.json"]


def test_every_cut_and_every_flipped_bit_is_noticed_and_the_one_before_used(tmp_path: Path, capsys):
    draw = random.Random(0)
    first, second = (write(tmp_path, i, draw.randbytes(10_000)) for i in (1, 2))
    whole = second.read_bytes()
    for trial in range(200):
        place = draw.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        second.write_bytes(whole[:place] if trial % 2 else flipped)
        assert find_checkpoint(tmp_path) == first
        assert f"warning: {second}: damaged, left out: its SHA-256 is" in capsys.readouterr().err
    second.write_bytes(whole)
    assert find_checkpoint(tmp_path) == second


@pytest.mark.parametrize("text", ["", "{}", "[1]", "not json", '{"sha256": 1}'])
def test_a_damaged_json_leaves_its_checkpoint_out(tmp_path: Path, capsys, text: str):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    facts_path(second).write_text(text)
    assert find_checkpoint(tmp_path) == first
    assert f"{facts_path(second)}: cannot be read" in capsys.readouterr().err


def test_only_if_none_is_left_it_is_an_error(tmp_path: Path):
    assert find_checkpoint(tmp_path) is None
    for i in (1, 2):
        write(tmp_path, i).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"damaged checkpoints alone \(iter_0000002\.pt, iter_0000001\.pt\)"):
        find_checkpoint(tmp_path)


def test_one_without_a_checksum_is_taken_with_a_warning(tmp_path: Path, capsys):
    path = write(tmp_path, 1)
    facts_path(path).unlink()
    assert find_checkpoint(tmp_path) == path
    assert "no checksum beside it, taken unchecked" in capsys.readouterr().err


def test_damaged_files_are_kept_under_another_name(tmp_path: Path):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    second.write_bytes(b"damaged")
    set_aside_damaged(tmp_path, first)
    assert list_checkpoints(tmp_path) == [first]
    assert (tmp_path / "iter_0000002.pt.damaged").read_bytes() == b"damaged"
    assert (tmp_path / "iter_0000002.pt.json.damaged").exists()


def test_leftovers_of_killed_processes_go_and_the_users_files_stay(tmp_path: Path):
    path = write(tmp_path, 1)
    mine = [tmp_path / ".tmp-notes", tmp_path / ".tmp-host-7-notes.txt", tmp_path / "iter_0000001.pt.damaged"]
    for name in ("host-77-iter_0000002.pt", "host-3-best.pt.json", "other-12-last.safetensors"):
        (tmp_path / f".tmp-{name}.part").write_text("half")
    for other in mine:
        other.write_text("mine")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([path, facts_path(path), *mine])


class Crash(BaseException):
    """A power cut: nothing after it runs, not even what cleans up."""


# What a save does, in its order: a crash comes instead of one of these.
STAGES = ["write", "fsync", "checksum", "fsync", "replace", "fsync", "fsync", "replace", "fsync"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stage", range(len(STAGES)))
def test_a_crash_at_each_stage_leaves_the_newest_whole_file(tmp_path: Path, monkeypatch, stage: int, overwrite: bool):
    write(tmp_path, 1, b"one")
    if overwrite:
        write(tmp_path, 2, b"before")
    calls = [None] * len(STAGES)  # what overwriting does before is no stage

    def crashing(name: str, function):
        def call(*args):
            calls.append(name)
            if len(calls) == stage + 1:
                raise Crash
            return function(*args)

        return call

    monkeypatch.setattr(os, "fsync", crashing("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", crashing("replace", os.replace))
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    monkeypatch.setattr(checkpoint_files, "file_sha256", crashing("checksum", checkpoint_files.file_sha256))

    def half(temporary: Path) -> None:
        temporary.write_bytes(b"ne")
        calls.clear()
        crashing("write", lambda: None)()
        temporary.write_bytes(b"new")

    path = tmp_path / "iter_0000002.pt"
    with pytest.raises(Crash):
        write_checked(path, half, {}, 3)
    monkeypatch.undo()
    assert calls == STAGES[: stage + 1]
    found = find_checkpoint(tmp_path)
    if overwrite:
        assert found.read_bytes() in (b"before", b"new")
        assert found == path
    else:
        assert found.read_bytes() in (b"one", b"new")
    remove_leftovers(tmp_path)
    write(tmp_path, 3, b"three")
    assert find_checkpoint(tmp_path).read_bytes() == b"three"


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch):
    path = write(tmp_path, 1)
    monkeypatch.setattr(durable, "free_bytes", lambda folder: 999)
    match = r"iter_0000002\.pt: not written .*: it needs 5,000 bytes .* and 999 are free; what was written before is"
    with pytest.raises(InputError, match=match):
        write(tmp_path, 2, bytes(5000))
    assert list_checkpoints(tmp_path) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), OSError(errno.EDQUOT, "Quota exceeded")])
def test_a_disk_that_fills_up_on_the_way_leaves_what_was_there(tmp_path: Path, monkeypatch, error: OSError):
    path = write(tmp_path, 1, b"before")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(InputError, match=f"not written .*{error.strerror}.*it needs 7 bytes"):
        write_checked(path, fail, {}, 7)
    assert path.read_bytes() == b"before"
    assert find_checkpoint(tmp_path) == path
    assert len(list(tmp_path.iterdir())) == 2


def test_other_errors_keep_their_names(tmp_path: Path):
    def fail(temporary: Path) -> None:
        raise PermissionError("not yours")

    with pytest.raises(PermissionError, match="not yours"):
        write_checked(tmp_path / "iter_0000001.pt", fail, {}, 1)


def test_text_files_are_old_or_new(tmp_path: Path, monkeypatch):
    path = tmp_path / "results.json"
    durable.write_atomically(path, "old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        durable.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_lines_are_appended_whole_after_one_that_was_cut_off(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    durable.append_line(path, "{}")
    path.write_bytes(path.read_bytes() + b'{"iteration": 5')
    durable.append_line(path, "[]")
    assert path.read_text() == '{}\n{"iteration": 5\n[]\n'
