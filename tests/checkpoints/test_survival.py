"""Whole runs that are interrupted, damaged, or short of something: they go on to the bit, or say why not."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from exp.checkpoints.checkpoint import load_checkpoint
from exp.checkpoints.checkpoint_files import find_checkpoint, list_checkpoints
from exp.data.sets.shapes import Shapes
from exp.evaluation.evaluator import Evaluator
from exp.files import lock as locks
from exp.runtime import interrupt
from exp.runtime.interrupt import STATUS
from exp.training import logger as loggers
from exp.training import loop as training
from exp.training.step import TrainStep
from tests.conftest import ROOT, TINY, TINY_RUN, free_port

EVERYTHING = ["optim.ema_decay=0.9", "optim.clip_norm=1", "schedule.amp=bf16", "schedule.val_iters=3"]


def signal_at(monkeypatch, steps: dict[int, signal.Signals]) -> None:
    """The run gets each signal once, at the beginning of that step, counted from 1."""
    seed = training.seed_everything

    def signalling(value: int, iteration: int, rank: int) -> None:
        seed(value, iteration, rank)
        if iteration + 1 in steps:
            os.kill(os.getpid(), steps.pop(iteration + 1))

    monkeypatch.setattr(training, "seed_everything", signalling)


def checkpoint_of(run: Path):
    return load_checkpoint(find_checkpoint(run / "checkpoints"))


def assert_same(one: object, other: object) -> None:
    """Nested dicts and lists of tensors and scalars are equal to the bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other):
            assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
        assert torch.equal(one.isnan(), other.isnan())
    else:
        assert one == other


def losses_of(run: Path) -> set[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {(row["iteration"], row["train/loss"]) for row in rows if "train/loss" in row}


def assert_equal_runs(run: Path, whole: Path) -> None:
    """The same final state, and the same loss in every step of every start."""
    one, other = checkpoint_of(run), checkpoint_of(whole)
    for part in ("iteration", "model", "ema", "training"):
        assert_same(getattr(one, part), getattr(other, part))
    assert losses_of(run) == losses_of(whole)
    for name in ("argmax.csv", "argmax.json"):
        assert (run / "results" / name).read_bytes() == (whole / "results" / name).read_bytes()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(
    ("workers", "accumulation"),
    [(2, 1), pytest.param(0, 4, marks=pytest.mark.slow), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_five_interruptions_in_a_row(program, tmp_path: Path, monkeypatch, workers: int, accumulation: int):
    flags = [*TINY, *EVERYTHING, "schedule.train_iters=8", f"schedule.accumulation={accumulation}"]
    flags += ["data.train_samples=24", "schedule.batch_size=8"]
    flags += [f"schedule.num_workers={workers}", "schedule.save_iters=100", "--predict_yaml", "argmax"]
    assert program(*flags, "--output_dir", tmp_path / "whole")[0] == 0
    names = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]
    signal_at(monkeypatch, dict(zip((1, 2, 3, 5, 7), names)))
    for iteration, name in zip((1, 2, 3, 5, 7), names):
        status, _, err = program(*flags, "--output_dir", tmp_path / "cut")
        assert status == STATUS == 75
        assert f"interrupted by {name.name}: iteration {iteration} of 8 is saved; the same command resumes" in err
        assert checkpoint_of(tmp_path / "cut" / TINY_RUN).iteration == iteration
    assert program(*flags, "--output_dir", tmp_path / "cut")[0] == 0
    assert_equal_runs(tmp_path / "cut" / TINY_RUN, tmp_path / "whole" / TINY_RUN)


def test_what_a_checkpoint_tells_without_being_loaded(program, tmp_path: Path):
    flags = [*TINY, "schedule.train_iters=5", "schedule.save_iters=99", "schedule.save_epochs=2"]
    assert program(*flags, "--output_dir", tmp_path, "--predict_yaml", "argmax")[0] == 0
    folder = tmp_path / TINY_RUN / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["iter_0000004.pt", "iter_0000005.pt"]  # 2 an epoch
    facts = json.loads((folder / "iter_0000005.pt.json").read_text())
    assert (facts["iteration"], facts["epoch"], facts["processes"]) == (5, 2, 1)
    assert len(facts["config_digest"]) == len(facts["sha256"]) == 64
    assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert checkpoint_of(tmp_path / TINY_RUN).training["sampler"]["position"] == 4  # the third epoch's first batch


def test_a_damaged_checkpoint_is_left_out_and_the_one_before_goes_on(program, tmp_path: Path):
    flags = [*TINY, "schedule.train_iters=4", "--predict_yaml", "argmax"]
    assert program(*flags, "--output_dir", tmp_path / "whole")[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    run = tmp_path / "cut" / TINY_RUN
    newest = run / "checkpoints" / "iter_0000004.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    status, printed, err = program(*flags, "--output_dir", tmp_path / "cut", "--test-only")
    assert status == 0
    assert f"warning: {newest}: damaged, left out" in err
    assert json.loads((run / "results" / "argmax.json").read_text())["training"]["iteration"] == 2
    status, printed, err = program(*flags, "--output_dir", tmp_path / "cut")
    assert status == 0
    assert "iterations 2 to 4" in printed
    assert (run / "checkpoints" / "iter_0000004.pt.damaged").read_bytes() == data
    assert_same(checkpoint_of(run).model, checkpoint_of(tmp_path / "whole" / TINY_RUN).model)
    status, _, err = program(*flags, "--output_dir", tmp_path / "cut", "--test-only", "--model_checkpoint",
                             newest.with_name("iter_0000004.pt.damaged"))  # fmt: skip
    assert status == 2


def test_a_second_run_in_the_same_folder_is_refused(program, tmp_path: Path):
    hold = (
        "import sys; from pathlib import Path; from exp.files.lock import own_folder\n"
        "with own_folder(Path(sys.argv[1]), 'training'): print(flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", hold, tmp_path / TINY_RUN]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    owner.stdout.readline()
    for more in ([], ["--test-only", "--model_checkpoint", __file__]):
        status, _, err = program(*TINY, "--output_dir", tmp_path, *more)
        assert status == 2
        assert f"{tmp_path / TINY_RUN}: process {owner.pid} on" in err
    owner.communicate()
    assert list(tmp_path.iterdir()) == []


def fingerprint(run: Path, *parts: str) -> dict[str, str]:
    """The checksums of a run's files and of those in its folders."""
    files = [path for part in parts for path in [run / part, *(run / part).rglob("*")] if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_evaluation_changes_nothing_that_training_wrote(program, tmp_path: Path):
    assert program(*TINY, "--output_dir", tmp_path, "--predict_yaml", "argmax")[0] == 0
    run, parts = tmp_path / TINY_RUN, ("checkpoints", "config.yaml", "starts.jsonl", "log.jsonl", "tensorboard")
    before = fingerprint(run, *parts)
    assert len(before) > 8
    assert program(*TINY, "--output_dir", tmp_path, "--predict_yaml", "rankseg_rma", "--test-only")[0] == 0
    assert fingerprint(run, *parts) == before


def test_an_interrupted_evaluation_writes_no_results(program, tmp_path: Path, monkeypatch):
    flags = [*TINY, "--output_dir", tmp_path, "--predict_yaml", "argmax"]
    assert program(*flags)[0] == 0
    before = fingerprint(tmp_path, TINY_RUN)
    count = Evaluator._count

    def signalling(self: Evaluator, *args: object) -> tuple:
        os.kill(os.getpid(), signal.SIGTERM)
        return count(self, *args)

    monkeypatch.setattr(Evaluator, "_count", signalling)
    status, _, err = program(*flags, "--test-only")
    assert status == STATUS
    assert "interrupted by SIGTERM: the evaluation is unfinished and has written no results" in err
    assert fingerprint(tmp_path, TINY_RUN) == before


def test_a_validation_that_is_interrupted_is_made_up_for(program, tmp_path: Path, monkeypatch):
    flags = [*TINY, "schedule.val_iters=1", "schedule.save_iters=100", "--predict_yaml", "argmax"]
    assert program(*flags, "--output_dir", tmp_path / "whole")[0] == 0
    evaluate, calls = Evaluator.__call__, []

    def signalling(self: Evaluator, *args: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(self, *args)

    monkeypatch.setattr(Evaluator, "__call__", signalling)
    assert program(*flags, "--output_dir", tmp_path / "cut")[0] == STATUS
    assert checkpoint_of(tmp_path / "cut" / TINY_RUN).iteration == 2
    assert program(*flags, "--output_dir", tmp_path / "cut")[0] == 0
    assert_equal_runs(tmp_path / "cut" / TINY_RUN, tmp_path / "whole" / TINY_RUN)


def test_curves_that_cannot_be_written_end_no_training(program, tmp_path: Path, monkeypatch):
    def full(path: Path, line: str) -> None:
        if path.name == "log.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loggers, "append_line", full)
    status, printed, err = program(*TINY, "--output_dir", tmp_path, "--predict_yaml", "argmax")
    assert status == 0
    assert (
        err.count("log.jsonl: cannot be written: [Errno 28] No space left on device; training continues without") == 1
    )
    assert "mIoUI" in printed


def test_a_full_disk_under_stderr_ends_no_training(tmp_path: Path):
    command = [sys.executable, ROOT / "exp" / "main.py", *TINY, "--output_dir", tmp_path]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=full, text=True, timeout=120)
    assert done.returncode == 0
    assert "mIoUI" in done.stdout


def test_a_lock_that_finds_no_room_is_one_line(program, tmp_path: Path, monkeypatch):
    def full(file: object, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(locks, "_lock", full)
    status, _, err = program(*TINY, "--output_dir", tmp_path)
    assert status == 2
    assert "No space left on device" in err
    assert err.count("\n") <= 2


def test_limits_of_a_files_size_are_told_by_the_real_writers(tmp_path: Path):
    """What PyTorch and safetensors make of a disk that refuses to take more, shown with a limit of the process's."""
    code = (
        "import resource, sys, torch; from pathlib import Path; from torch import nn\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from exp.checkpoints.checkpoint import Saver; from exp.runtime.errors import InputError\n"
        "saver = Saver(Path(sys.argv[1]), nn.Linear(300, 300), None, {}, ['a'], {})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "for save in (lambda: saver.save(1, 0, {}, 2), lambda: saver.export('last', 1, 0)):\n"
        "    try:\n        save()\n    except InputError as error:\n        print(error)"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout
    assert all("not written (" in line and "File too large" in line for line in lines), lines
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_during_the_run(program, small_disk: Path):
    flags = [*TINY, "schedule.train_iters=40", "schedule.save_iters=1", "schedule.keep_checkpoints=99"]
    status, _, err = program(*flags, "--output_dir", small_disk, "--predict_yaml", "argmax")
    assert status == 2
    error = err.splitlines()[-1]
    assert "not written" in error
    assert "bytes" in error
    assert "are free; what was written before is whole: make room and start the same command again" in error
    checkpoints = list_checkpoints(small_disk / TINY_RUN / "checkpoints")
    assert len(checkpoints) > 2
    assert find_checkpoint(small_disk / TINY_RUN / "checkpoints") == checkpoints[-1]
    last = load_checkpoint(checkpoints[-1]).iteration
    for path in checkpoints[:-1]:
        path.unlink()
    flags = [flag.replace("=99", "=2").replace("_iters=40", f"_iters={40}") for flag in flags]
    status, printed, err = program(*flags, "--output_dir", small_disk, "--predict_yaml", "argmax")
    assert status == 0, err
    assert f"iterations {last} to 40" in printed


@pytest.mark.parametrize("more", [[], ["--test-only"]])
def test_a_disk_without_a_free_byte_at_the_start(program, small_disk: Path, more: list[str]):
    flags = [*TINY, "--predict_yaml", "argmax", "--output_dir", small_disk]
    if more:
        assert program(*flags)[0] == 0
    with open(small_disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    status, _, err = program(*flags, *more)
    assert status == 2
    assert "No space left on device" in err
    assert not list(small_disk.rglob(".lock"))
    (small_disk / "filler").unlink()
    status, _, err = program(*flags, *more)
    assert status == 0, err


def test_a_run_whose_folder_is_taken_over_writes_no_more(program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, seed = tmp_path / TINY_RUN, training.seed_everything

    def taken_over(value: int, iteration: int, rank: int) -> None:
        seed(value, iteration, rank)
        if iteration == 1:  # before the second step, which a line in the log and a checkpoint follow
            (run / ".lock").unlink()
            (run / ".lock").write_text("process 1 on another (training)")

    monkeypatch.setattr(training, "seed_everything", taken_over)
    status, _, err = program(*TINY, "--output_dir", tmp_path)
    assert status == 2
    assert f"{run / '.lock'}: got a lock that is no longer this process's" in err
    assert not (run / "checkpoints").exists()
    assert len((run / "log.jsonl").read_text().splitlines()) == 1
    assert (run / ".lock").read_text() == "process 1 on another (training)"


def test_a_run_whose_worker_stands_still_saves_and_leaves(program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interrupt, "PATIENCE", 1)
    flags = [
        *TINY,
        "schedule.num_workers=1",
        "schedule.train_iters=8",
        "schedule.save_iters=99",
        "--output_dir",
        tmp_path,
    ]
    assert program(*flags[:-1], tmp_path / "whole", "--predict_yaml", "argmax")[0] == 0
    read, step = Shapes.read, TrainStep.__call__

    def stand(self: Shapes, index: int) -> tuple:
        if self.split == "train" and next(reads) == 18:  # of the fifth batch of four
            time.sleep(600)
        return read(self, index)

    def ask(self: TrainStep, batch: object) -> object:
        outcome = step(self, batch)
        if next(steps) == 4:
            threading.Timer(1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM)).start()
        return outcome

    reads, steps = itertools.count(1), itertools.count(1)
    monkeypatch.setattr(Shapes, "read", stand)
    monkeypatch.setattr(TrainStep, "__call__", ask)
    status, _, err = program(*flags, "--predict_yaml", "argmax")
    assert status == STATUS
    assert "interrupted by SIGTERM: left while it waited for images; the same command resumes" in err
    assert checkpoint_of(tmp_path / TINY_RUN).iteration == 4
    monkeypatch.setattr(Shapes, "read", read)
    assert program(*flags, "--predict_yaml", "argmax")[0] == 0
    assert_same(checkpoint_of(tmp_path / TINY_RUN).model, checkpoint_of(tmp_path / "whole" / TINY_RUN).model)


def test_a_damaged_training_image_stops_the_run_or_is_skipped(program, tmp_path: Path, camvid_dir: Path):
    path = camvid_dir / "camvid" / "train" / "train_3.png"
    path.write_bytes(path.read_bytes()[:-40])
    flags = [*TINY, "data.train_samples=6", "schedule.batch_size=3", "schedule.train_iters=4", "--data_yaml", "camvid",
             "--data_dir", camvid_dir, "--predict_yaml", "argmax"]  # fmt: skip
    status, _, err = program(*flags, "--output_dir", tmp_path / "out")
    assert status == 2
    assert "train_3.png: got a file that cannot be read" in err.splitlines()[-1]
    status, printed, err = program(*flags, "--output_dir", tmp_path / "out", "--set", "data.damaged=skip")
    assert status == 0, err
    assert err.count("skipped: ") == 2  # once an epoch
    assert str(path) in err
    assert "2 damaged images skipped" in printed
    run = tmp_path / "out" / TINY_RUN.replace("shapes", "camvid")
    assert checkpoint_of(run).training["faults"] == {"in_row": 0, "steps": 0, "images": 2}
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-2])["train/images_skipped"] in (1, 2)


def test_a_loader_process_that_is_killed_ends_the_run(tmp_path: Path):
    """In a process of its own, which the news of a dead child reaches by a signal."""
    code = (
        "import multiprocessing, os, signal, sys\n"
        "from exp.training.logger import RunLogger; from exp.main import main\n"
        "from exp.runtime.errors import run_and_report\n"
        "RunLogger.step = lambda self, i: [os.kill(c.pid, signal.SIGKILL) for c in multiprocessing.active_children()]\n"
        "sys.exit(run_and_report(main))"
    )
    flags = [*TINY, "schedule.train_iters=500", "schedule.num_workers=1", "--output_dir", tmp_path]
    root, start = ROOT, time.monotonic()
    command = [sys.executable, "-c", code, *map(str, flags)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert time.monotonic() - start < 60
    assert "error: schedule.num_workers: a process that loads images died" in done.stderr
    assert "Killed" in done.stderr or "exited unexpectedly" in done.stderr


def test_steps_without_numbers_are_named_by_their_images(program, tmp_path: Path, monkeypatch):
    call = TrainStep._backward

    def spoil(self: TrainStep, image, label, counted):
        call(self, image, label, counted)
        return torch.tensor(float("inf"))

    monkeypatch.setattr(TrainStep, "_backward", spoil)
    flags = [*TINY, "schedule.train_iters=9", "schedule.nonfinite_limit=3", "--output_dir", tmp_path]
    status, _, err = program(*flags)
    assert status == 2
    assert "iteration 1: got a loss that is non-finite, nothing updated; its images: shapes_train_000" in err
    assert "iteration 3: got a loss that is non-finite" in err.splitlines()[-1]
    assert "3 such steps in a row (schedule.nonfinite_limit)" in err.splitlines()[-1]


def test_a_rank_that_does_not_come_is_named(tmp_path: Path):
    """A process that says that it is one of two, and never meets the other."""
    code = (
        "from datetime import timedelta; from exp.runtime import distributed\n"
        "from exp.runtime.errors import run_and_report; import sys\n"
        "def main():\n    with distributed.session('cpu', timedelta(seconds=3)): pass\n"
        "sys.exit(run_and_report(main))"
    )
    store = torch.distributed.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    place = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    root = ROOT
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "error: rank 0 did not arrive at the start within 0:00:03" in done.stderr
