"""Jobs one after the other on this machine, or as the tasks of a Slurm job array."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from exp.reproduction.existing import DONE, TRAINED, UNTRAINED, WAITING, Existing, State
from exp.reproduction.job import Job
from exp.runtime.errors import InputError
from exp.runtime.interrupt import Interrupted, StopRequest

ROOT = Path(__file__).resolve().parents[2]
LOG = "reproduce.log"  # in a job's folder: what its program printed
SBATCH = """#!/usr/bin/env bash
# Written by scripts/reproduce.py: task k of the array runs the flags in line k of jobs.txt beside this file.
#SBATCH --job-name=reproduce
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --array=0-{last}
#SBATCH --output={folder}/slurm-%A_%a.out

source {launcher}
eval "flags=($(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {jobs}))"
launch "${{flags[@]}}"
"""


@dataclass(frozen=True)
class Runner:
    """Runs jobs: data_dir and output as given to the program; processes: of torchrun, on this machine."""

    data_dir: Path
    output: Path
    processes: int = 1
    device: str = "auto"

    def flags(self, job: Job, state: State) -> list[str]:
        """The flags of exp/main.py that do what is missing: train and evaluate, or evaluate alone."""
        flags = job.flags(self.data_dir, self.output, state.rules or job.rules)
        if state.kind == TRAINED and state.weights is not None:
            flags = ["--test-only", "--model_checkpoint", str(state.weights), *flags]
        if state.kind == WAITING:
            flags = ["--test-only", "--model_checkpoint", "WEIGHTS", *flags]  # for a person to read
        return ["--device", self.device, *flags] if self.device != "auto" and state.kind != UNTRAINED else flags

    def command(self, job: Job, state: State) -> list[str]:
        if state.kind == UNTRAINED:
            return [sys.executable, str(ROOT / "scripts" / "evaluate_probabilities.py"), *self.flags(job, state)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        return [
            sys.executable,
            *(launcher if self.processes > 1 else []),
            str(ROOT / "exp" / "main.py"),
            *self.flags(job, state),
        ]

    def run(self, job: Job, state: State, stop: StopRequest) -> str | None:
        """Run a job to its end -> None, or why it failed. Interrupted if this program was asked to stop meanwhile."""
        if job.reevaluation is not None:  # its training may have come to its end just before
            state = Existing(self.output).state(job)
            if state.kind == WAITING:
                return "there are no weights: its training is not complete"
        folder = self.output / job.name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOG, "a", encoding="utf-8") as log:
            process = subprocess.Popen(self.command(job, state), stdout=log, stderr=subprocess.STDOUT)
            status = _wait(process, stop)
        if stop:
            raise Interrupted(f"{stop.signal_name}: {job.name} has saved what it had")
        if status == 0:
            return None
        return f"status {status}: {last_error(folder / LOG)} ({folder / LOG})"

    def write_array(self, pairs: Sequence[tuple[Job, State]], folder: Path) -> Path:
        """Write jobs.txt and array.sbatch into <folder>, or <folder>.2 and so on if that is there -> the latter."""
        numbered = (folder.with_name(f"{folder.name}.{number}") for number in count(2))
        folder = next(path for path in chain([folder], numbered) if not path.exists())
        folder.mkdir(parents=True)
        jobs, script = folder / "jobs.txt", folder / "array.sbatch"
        jobs.write_text("".join(shlex.join(self.flags(*pair)) + "\n" for pair in pairs), encoding="utf-8")
        names = {
            "folder": str(folder),
            "jobs": shlex.quote(str(jobs)),
            "launcher": shlex.quote(str(ROOT / "scripts" / "slurm" / "job.sh")),
        }
        script.write_text(SBATCH.format(last=len(pairs) - 1, **names), encoding="utf-8")
        return script


def _wait(process: subprocess.Popen, stop: StopRequest) -> int:
    """Wait for a process; it is asked to stop, too, once this one is."""
    told = False
    while True:
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            if stop and not told:
                process.send_signal(signal.SIGTERM)
                told = True


def last_error(log: Path) -> str:
    """The last line of a program's output that tells an error, or else the last of all."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no output"]
    errors = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    return (errors or lines)[-1][:500]


def missing_jobs(jobs: Sequence[Job], existing: Existing) -> list[tuple[Job, State]]:
    """The jobs that are not done, with how far they are."""
    states = [(job, existing.state(job)) for job in jobs]
    return [(job, state) for job, state in states if state.kind != DONE]


def laptop_data(data_dir: Path, output: Path) -> Path:
    """A folder of the program's own below `output`, with links to camvid/ and hippocampus/ of data_dir.

    The slices of hippocampus are prepared there unless data_dir has them; nothing of data_dir is changed.
    """
    for name in ("camvid", "hippocampus"):
        if not (data_dir / name).is_dir():
            raise InputError(f"--data_dir: {data_dir / name}: no such folder, expected it for laptop (see DATA.md)")
    if (data_dir / "hippocampus" / "train").is_dir():
        return data_dir
    own = output / "data"
    links = {own / "camvid": data_dir / "camvid"}
    for name in ("images", "labels", "imagesTr", "labelsTr"):
        if (data_dir / "hippocampus" / name).is_dir():
            links[own / "hippocampus" / name] = data_dir / "hippocampus" / name
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            os.symlink(target.resolve(), link)
    command = [sys.executable, ROOT / "scripts" / "prepare_data.py", "hippocampus", "--data_dir", own]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}, without a word"]  # if it was killed
        raise InputError(f"{own / 'hippocampus'}: not prepared: {said[-1]}")
    return own
