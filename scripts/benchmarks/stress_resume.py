#!/usr/bin/env python
"""Kill trainings at random moments, start them again, and compare what comes out with an uninterrupted run, to the bit.

    python scripts/benchmarks/stress_resume.py --kills 20 --kills_in_saves 5 --processes 1 2

Trains a small network on synthetic shapes (exp/main.py, on CPUs) once without interruption and once killed (SIGKILL to
all of its processes) over and over: at random moments from its start on, and while a checkpoint is being written. The
final weights, averages, optimiser, schedule and validations have to be equal, and so has every loss
that any of the starts logged. Status 1 if anything differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

RUN = "unet_mobilenetv3_small_100.shapes.ce.quickstart.adamw_lr6e-4"
FLAGS = [
    "--model_yaml",
    "unet_mobilenetv3_small_100",
    "--data_yaml",
    "shapes",
    "--predict_yaml",
    "argmax",
    "--device",
    "cpu",
    "--set",
    "model.decoder_channels=[8,8,8,8,8]",
    "data.crop_size=[32,32]",
    "data.train_samples=40",
    "data.val_samples=2",
    "schedule.batch_size=8",
    "schedule.num_workers=1",
    "schedule.log_iters=1",
    "schedule.save_iters=4",
    "schedule.val_iters=50",
    "schedule.early_stop=99",
    "schedule.accumulation=2",
    "schedule.amp=bf16",
    "optim.ema_decay=0.9",
    "optim.clip_norm=1",
]
MOST_SECONDS = 3.0  # after the first step of a start: the latest kill
DEADLINE = 240  # seconds for one start


@dataclass(frozen=True)
class Job:
    """A training in `folder`. flags: further --set values; max_restarts: of torchrun, where there are processes."""

    folder: Path
    processes: int
    flags: tuple[str, ...] = ()
    max_restarts: int = 0

    @property
    def run(self) -> Path:
        return self.folder / RUN

    def start(self) -> subprocess.Popen:
        """The training in the background; what it prints goes to <folder>/output.txt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        launch.append(f"--max_restarts={self.max_restarts}")
        command = [sys.executable, *(launch if self.processes > 1 else []), ROOT / "exp" / "main.py", *FLAGS]
        with open(self.folder / "output.txt", "a", encoding="utf-8") as file:
            return subprocess.Popen(
                [*map(str, command), *self.flags, "--output_dir", str(self.folder)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def finish(self) -> None:
        """Start and wait; RuntimeError with the end of its output if it fails."""
        if status := self.start().wait(DEADLINE):
            raise RuntimeError(f"{self.folder}: status {status}: {self.output()[-2000:]}")

    def output(self) -> str:
        return (self.folder / "output.txt").read_text(encoding="utf-8")

    def rows(self) -> list[dict]:
        """What log.jsonl holds, but for a line that a kill cut off."""
        rows = []
        path = self.run / "log.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def losses(self) -> list[tuple[int, float]]:
        """(iteration, loss) of every step of every start."""
        return [(row["iteration"], row["train/loss"]) for row in self.rows() if "train/loss" in row]


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that these did, by /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found, wave = [], [pid]
    while wave:
        wave = [child for child, parent in parents.items() if parent in wave]
        found += wave
    return found


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all that it started; the first is stopped before, so that it starts no more."""
    os.kill(process.pid, signal.SIGSTOP)
    for pid in (*descendants(process.pid), process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def wait_until(condition, process: subprocess.Popen, pause: float = 0.002) -> bool:
    """Whether the condition came true before the process ended."""
    until = time.monotonic() + DEADLINE
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > until:
            raise RuntimeError(f"{process.args}: nothing happened in {DEADLINE} s")
        time.sleep(pause)
    return True


def kill_once(job: Job, kind: str, draw: random.Random) -> int | None:
    """Start the job and kill it -> the iterations logged by then; None if it ended before.

    kind: "start": at any moment from its start on; "step": after its first step; "save": while it writes a checkpoint.
    """
    logged, process = len(job.losses()), job.start()
    delay = draw.uniform(0, 8 if kind == "start" else MOST_SECONDS)
    if kind != "start" and not wait_until(lambda: len(job.losses()) > logged, process):
        return None
    if kind == "save":
        checkpoints = job.run / "checkpoints"
        if not wait_until(lambda: any(checkpoints.glob("*.part")), process, 0.0002):
            return None
        delay = draw.uniform(0, 0.01)
    time.sleep(delay)
    if process.poll() is not None:
        return None
    kill_all(process)
    return max((iteration for iteration, _ in job.losses()), default=0)


def compare(job: Job, whole: Job) -> Iterator[str]:
    """A finished job and an uninterrupted one of the same flags -> what differs."""
    import torch

    from exp.checkpoints.checkpoint import load_checkpoint
    from exp.checkpoints.checkpoint_files import find_checkpoint

    one, other = (load_checkpoint(find_checkpoint(j.run / "checkpoints")) for j in (job, whole))

    def differing(a: object, b: object, where: str) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            for key in a:
                yield from differing(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for i, pair in enumerate(zip(a, b)):
                yield from differing(*pair, f"{where}[{i}]")
        elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            same = a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
            if not (same and torch.equal(a.isnan(), b.isnan())):
                yield where
        elif a != b:
            yield where

    for name in ("iteration", "model", "ema", "training", "config", "classes"):
        yield from differing(getattr(one, name), getattr(other, name), name)
    expected = dict(whole.losses())
    yield from (f"loss of iteration {i}" for i, loss in job.losses() if expected[i] != loss)
    if {i for i, _ in job.losses()} != expected.keys():
        yield "the iterations that were logged"
    for name in ("argmax.csv", "argmax.json"):
        if (job.run / "results" / name).read_bytes() != (whole.run / "results" / name).read_bytes():
            yield f"results/{name}"


def stress(folder: Path, processes: int, kinds: list[str], seed: int, flags: tuple[str, ...] = ()) -> dict:
    """Kill a training once for each of `kinds`, let it finish -> what happened and what differs from a whole run."""
    draw = random.Random(seed)
    iterations = 30 + 15 * len(kinds)
    flags = (*flags, "--set", f"schedule.train_iters={iterations}")
    whole, job = (Job(folder / name, processes, flags) for name in ("whole", "killed"))
    whole.finish()
    places = []
    for kind in kinds:
        place = kill_once(job, kind, draw)
        if place is None:
            raise RuntimeError(f"{job.folder}: ended before kill {len(places) + 1} ({kind}): {job.output()[-2000:]}")
        places.append(place)
    job.finish()
    return {"processes": processes, "kills": dict(zip(range(1, len(kinds) + 1), zip(kinds, places))),
            "iterations": iterations, "differences": list(compare(job, whole))}  # fmt: skip


def choose_kinds(kills: int, in_saves: int, seed: int) -> list[str]:
    """The kills in a random order: in_saves while saving; of the others one in five from the start on."""
    others = kills - in_saves
    kinds = ["save"] * in_saves + ["start"] * (others // 5) + ["step"] * (others - others // 5)
    random.Random(seed).shuffle(kinds)
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for each number of processes (default: 20)")
    parser.add_argument("--kills_in_saves", type=int, default=5, help="of these, while saving (default: 5)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0 <= args.kills_in_saves <= args.kills or min(args.processes) < 1:
        parser.error("expected 0 <= kills_in_saves <= kills, and 1 process or more")
    failed = False
    for processes in args.processes:
        folder = Path(tempfile.mkdtemp(prefix="stress_resume_"))
        start = time.monotonic()
        found = stress(folder, processes, choose_kinds(args.kills, args.kills_in_saves, args.seed), args.seed)
        differences = found["differences"]
        places = ", ".join(f"{place} ({kind})" for kind, place in found["kills"].values())
        print(f"{processes} process(es): {len(found['kills'])} kills in {found['iterations']} iterations, at {places}")
        print(f"  {time.monotonic() - start:.0f} s; differences from the uninterrupted run: {len(differences)}")
        print("".join(f"  {text}\n" for text in differences), end="", flush=True)
        failed |= bool(differences)
        if not differences:
            shutil.rmtree(folder)
        else:
            print(f"  both are in {folder}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
