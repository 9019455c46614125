"""The sbatch files, with stand-ins for Slurm's commands; the two agents of torchrun are real."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from exp.checkpoints.checkpoint import load_checkpoint
from exp.checkpoints.checkpoint_files import find_checkpoint
from tests.conftest import ROOT, TINY, TINY_RUN, free_port

SLURM = ROOT / "scripts" / "slurm"
FILES = sorted(SLURM.glob("*.sbatch"))
# What srun does as far as these files use it: the command once a node, all at once, failing if one fails.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do case "$1" in --nodes=*) nodes="${1#*=}" ;; esac; shift; done
for ((i = 0; i < nodes; i++)); do "$@" & jobs+=($!); done
for job in "${jobs[@]}"; do wait "$job" || exit; done
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = requeue ]; then echo "requeued $2"; fi
if [ "$*" = "show hostnames $SLURM_JOB_NODELIST" ]; then printf '127.0.0.1\\nother\\n'; fi
"""


def start(file: str, flags: list, tmp_path: Path, scontrol: str = SCONTROL, **environment: object) -> subprocess.Popen:
    """An sbatch file run from a copy, as Slurm does, in a job of that environment."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", scontrol), ("print_args", '#!/bin/sh\nprintf "%s\\n" "$@"\n')):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    copy = tmp_path / "slurm_script"
    copy.write_text((SLURM / file).read_text())
    slurm = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": 123456, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": 1}
    variables = {**slurm, "OMP_NUM_THREADS": 1, **environment}
    path = {"PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", copy, *map(str, flags)],
        env={**os.environ, **path, **{name: str(value) for name, value in variables.items()}},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def submit(file: str, flags: list, tmp_path: Path, **environment: object) -> subprocess.CompletedProcess:
    """The same to its end."""
    process = start(file, flags, tmp_path, **environment)
    printed, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, printed, err)


def test_all_three_are_there():
    assert [path.name for path in FILES] == ["folds.sbatch", "one_node.sbatch", "several_nodes.sbatch"]


@pytest.mark.parametrize("path", [*FILES, SLURM / "job.sh"], ids=lambda path: path.name)
def test_bash_can_read_them(path: Path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_help_needs_no_cluster(path: Path, tmp_path: Path):
    done = subprocess.run(["bash", path, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"scripts/slurm/{path.name} [flags of exp/main.py]" in done.stdout
    assert "#SBATCH" not in done.stdout
    assert "#SBATCH --requeue" in path.read_text()


def test_the_rendezvous_is_the_jobs(tmp_path: Path):
    done = submit("one_node.sbatch", ["--seed", "3"], tmp_path, RANKSEG_PYTHON="print_args", SLURM_GPUS_ON_NODE=4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=4", "--rdzv_id=123456"),
        *("--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:23456", str(ROOT / "exp" / "main.py"), "--seed", "3"),
    ]


def test_each_job_of_the_array_takes_its_fold(tmp_path: Path):
    done = submit("folds.sbatch", [], tmp_path, RANKSEG_PYTHON="print_args", SLURM_ARRAY_TASK_ID=3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["--set", "data.fold=3"]
    assert "--nproc_per_node=1" in done.stdout


def test_a_failure_is_the_jobs(tmp_path: Path):
    assert submit("one_node.sbatch", [], tmp_path, RANKSEG_PYTHON="false").returncode == 1
    done = submit("one_node.sbatch", [], tmp_path, RANKSEG_PYTHON="no-such-python")
    assert done.returncode == 2
    assert "error: no-such-python: no such program" in done.stderr
    done = submit("one_node.sbatch", [], tmp_path, RANKSEG_ROOT=ROOT, SLURM_SUBMIT_DIR=tmp_path, RANKSEG_PYTHON="true")
    assert done.returncode == 0, done.stderr


def test_a_job_whose_time_is_nearly_up_requeues_itself(tmp_path: Path):
    """The signal reaches the batch shell alone; the training goes on until Slurm ends it."""
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\nkill -USR1 "$(cat /proc/$PPID/stat | cut -d" " -f4)"\nsleep 1\necho finished\n')
    slow.chmod(0o755)
    done = submit("one_node.sbatch", [], tmp_path, RANKSEG_PYTHON=slow)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "finished", "requeued 123456"]


@pytest.mark.slow
def test_two_agents_train_as_one_with_two_processes(tmp_path: Path):
    """torchrun --nnodes=2 with a c10d rendezvous on the loopback device, through several_nodes.sbatch."""
    common = [*TINY, "--predict_yaml", "argmax", "--output_dir"]
    job = next(port for port in iter(free_port, None) if 20000 <= port < 39999)  # its port follows from it: the same
    done = submit(
        "several_nodes.sbatch",
        [*common, tmp_path / "two"],
        tmp_path,
        RANKSEG_PYTHON=sys.executable,
        SLURM_JOB_NUM_NODES=2,
        SLURM_JOB_ID=job - 20000,
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout
    assert (tmp_path / "two" / TINY_RUN / "results" / "argmax.json").exists()
    done = submit(
        "one_node.sbatch",
        [*common, tmp_path / "one"],
        tmp_path,
        RANKSEG_PYTHON=sys.executable,
        RANKSEG_PROCESSES=2,
        SLURM_JOB_ID=job - 19999,
    )
    assert done.returncode == 0, done.stderr
    two, one = (
        load_checkpoint(tmp_path / name / TINY_RUN / "checkpoints" / "iter_0000003.pt") for name in ("two", "one")
    )
    assert all(torch.equal(two.model[name], one.model[name]) for name in one.model)


# The real one sends SIGTERM to the processes of a job that is put back into the queue.
REQUEUE = """#!/usr/bin/env bash
if [ "$1" = requeue ]; then echo "requeued $2"; pkill -TERM -f "main.py .*$FOLDER"; fi
if [ "$*" = "show hostnames $SLURM_JOB_NODELIST" ]; then echo 127.0.0.1; fi
"""


@pytest.mark.slow
def test_a_requeued_job_has_saved_and_goes_on(tmp_path: Path):
    """SIGUSR1 to the batch shell, as --signal=B:USR1@300 sends it."""
    folder = tmp_path / "requeued"
    flags = [*TINY, "schedule.train_iters=60", "schedule.save_iters=1000", "--predict_yaml", "argmax"]
    flags += ["--output_dir", folder]
    job = next(port for port in iter(free_port, None) if 20000 <= port < 39999) - 20000
    settings = {"RANKSEG_PYTHON": sys.executable, "RANKSEG_PROCESSES": 2, "FOLDER": folder, "SLURM_JOB_ID": job}
    process, log = (
        start("one_node.sbatch", flags, tmp_path, scontrol=REQUEUE, **settings),
        folder / TINY_RUN / "log.jsonl",
    )
    until = time.monotonic() + 120
    while not log.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    asked = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    printed, err = process.communicate(timeout=60)
    assert time.monotonic() - asked < 30
    assert f"requeued {job}" in printed
    saved = load_checkpoint(find_checkpoint(folder / TINY_RUN / "checkpoints")).iteration
    assert f"interrupted by SIGTERM: iteration {saved} of 60 is saved; the same command resumes" in err
    assert saved < 60
    done = submit("one_node.sbatch", flags, tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert f"iterations {saved} to 60" in done.stdout
