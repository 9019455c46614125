"""Trainings on several processes that lose one, or are asked to stop; and the stress test, in a short form."""

import json
import os
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from exp.checkpoints.checkpoint import load_checkpoint
from exp.checkpoints.checkpoint_files import find_checkpoint
from exp.runtime import distributed
from exp.runtime.errors import InputError
from exp.runtime.interrupt import Interrupted
from scripts.benchmarks.stress_resume import Job, choose_kinds, compare, descendants, kill_all, stress, wait_until
from tests.conftest import ROOT, free_port


def ranks(process: subprocess.Popen) -> dict[int, int]:
    """The training processes of torchrun by their rank."""
    found = {}
    for pid in descendants(process.pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            values = dict(pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if pair)
        except (OSError, ValueError):
            continue
        if str(ROOT / "exp" / "main.py").encode() in command and "RANK" in values:
            found.setdefault(int(values["RANK"]), pid)  # its loader processes come later
    return found


def flags(*values: str) -> tuple[str, ...]:
    return ("--set", "schedule.num_workers=0", *values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Job:
    """Twenty steps on two processes without interruption."""
    job = Job(tmp_path_factory.mktemp("runs") / "whole", 2, flags("schedule.train_iters=20"))
    job.finish()
    return job


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes(whole: Job, tmp_path: Path):
    """Both leave with the same step saved, within 30 seconds; the same command goes on to the same end."""
    job = Job(tmp_path, 2, whole.flags)
    process = job.start()
    assert wait_until(lambda: len(job.losses()) > 5, process)
    os.kill(ranks(process)[1], signal.SIGTERM)
    start = time.monotonic()
    assert process.wait(60) != 0
    assert time.monotonic() - start < 30
    saved = max(iteration for iteration, _ in job.losses())
    output = job.output()
    assert f"interrupted by a signal to another process: iteration {saved} of 20 is saved" in output
    assert output.count("exitcode  : 75") == 2
    assert load_checkpoint(find_checkpoint(job.run / "checkpoints")).iteration == saved
    job.finish()
    assert list(compare(job, whole)) == []


@pytest.mark.slow
def test_a_process_killed_twice_under_max_restarts(whole: Job, tmp_path: Path):
    job = Job(tmp_path, 2, whole.flags, max_restarts=3)
    process = job.start()
    for steps in (5, 14):
        assert wait_until(lambda steps=steps: max(job.losses(), default=(0,))[0] > steps, process)
        os.kill(ranks(process)[1], signal.SIGKILL)
    assert process.wait(240) == 0, job.output()[-2000:]
    assert list(compare(job, whole)) == []
    starts = [json.loads(line)["iteration"] for line in (job.run / "starts.jsonl").read_text().splitlines()]
    assert starts == sorted(starts)
    assert len(starts) == 3
    assert starts[0] == 0
    assert all(start % 4 == 0 and start > 0 for start in starts[1:])


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_images(whole: Job, tmp_path: Path):
    job = Job(tmp_path, 2, whole.flags)
    process = job.start()
    assert wait_until(lambda: len(job.losses()) > 9, process)
    kill_all(process)
    alone = Job(tmp_path, 1, whole.flags)
    alone.finish()
    assert "resumed by 1 process(es) after 2: the same images in the same order" in alone.output()
    one, other = (load_checkpoint(find_checkpoint(j.run / "checkpoints")) for j in (alone, whole))
    assert one.training["sampler"] == other.training["sampler"]
    assert one.iteration == 20
    first, last = (dict(j.losses()) for j in (alone, whole))
    assert first[4] == last[4]
    assert first[20] == pytest.approx(last[20], rel=0.2)  # batch norm sees eight images instead of four


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments(tmp_path: Path, processes: int):
    """Three for each number of processes, one of them while saving; the script makes twenty."""
    found = stress(tmp_path, processes, choose_kinds(3, 1, processes), seed=processes)
    assert len(found["kills"]) == 3
    assert found["differences"] == []


def place(rank: int, port: int) -> None:
    """What torchrun would set for a process of two."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in values.items()}


def meetings(rank: int, port: int) -> list[str]:
    """Three meetings over one store that is never emptied -> what rank 0 says in each."""
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    said = []
    for meeting in range(3):
        own = distributed.meet(store, rank, 2, timedelta(seconds=60))
        if rank == 0:
            own.set("said", str(meeting))
        said.append(own.get("said").decode())
        own.set(f"done/{rank}", "")
        own.wait(["done/0", "done/1"])
    own.set(f"left/{rank}", "")
    if rank == 0:  # which keeps the store
        own.wait(["left/0", "left/1"])
    return said


def together(rank: int, ports: tuple[int, int], folder: str) -> None:
    """What two processes tell each other; at last rank 1 alone is asked to stop, and both leave."""
    place(rank, ports[0])
    told, calls = {"meetings": meetings(rank, ports[1])}, []

    def refuse() -> None:
        calls.append("refuse")
        raise InputError("folder: taken")

    try:
        with distributed.session("cpu") as dist:
            told["result"] = dist.on_main(lambda: calls.append("act") or "result")
            try:
                dist.on_main(refuse)
            except InputError as error:
                told["refused"] = str(error)
            told["calls"] = calls
            told["before"] = dist.any(False)
            dist.stop_if_asked("nothing yet")
            dist.gather(None)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
                assert dist.stop
            told["after"] = dist.any(dist.stop)
            dist.stop_if_asked("left undone")
    except Interrupted as interruption:
        told["interrupted"] = str(interruption)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("told")
    mp.spawn(together, ((free_port(), free_port()), str(folder)), 2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_processes_meet_anew_over_a_store_that_remembers_earlier_ones(told: list[dict]):
    assert [rank["meetings"] for rank in told] == [["0", "1", "2"]] * 2


def test_what_the_main_process_does_is_known_to_all(told: list[dict]):
    assert [rank["calls"] for rank in told] == [["act", "refuse"], []]
    assert [(rank["result"], rank["refused"]) for rank in told] == [("result", "folder: taken")] * 2


def test_a_request_to_one_process_reaches_all(told: list[dict]):
    assert [rank["before"] for rank in told] == [False] * 2
    assert [rank["after"] for rank in told] == [True] * 2
    assert [rank["interrupted"] for rank in told] == ["SIGUSR1: left undone", ""]  # rank 0 says it for all


def late(rank: int, port: int, folder: str) -> None:
    """Rank 1 stays away from the second step."""
    place(rank, port)
    said = None
    try:
        with distributed.session("cpu", timedelta(seconds=3)) as dist:
            for iteration in (1, 2):
                if (rank, iteration) == (1, 2):
                    time.sleep(6)
                with dist.named_step(iteration):
                    dist.any(False)
    except (InputError, RuntimeError) as error:  # rank 1 comes when the other has left
        said = str(error)
    if rank == 0:
        (Path(folder) / "said").write_text(said)
    os._exit(0)  # the process group has failed and cannot be left in good order


def test_a_process_that_does_not_come_to_a_step_is_named(tmp_path: Path):
    mp.spawn(late, (free_port(), str(tmp_path)), 2)
    assert "rank 1 (last done: 1) did not come through iteration 2" in (tmp_path / "said").read_text()


def dying(rank: int, port: int, folder: str) -> None:
    """Rank 1 dies in the middle of the second step."""
    place(rank, port)
    try:
        with distributed.session("cpu", timedelta(seconds=60)) as dist:
            for iteration in (1, 2):
                with dist.named_step(iteration):
                    if (rank, iteration) == (1, 2):
                        os._exit(0)
                    dist.any(False)
    except InputError as error:
        (Path(folder) / "said").write_text(str(error))
    os._exit(0)


def test_a_process_that_dies_in_a_step_is_named(tmp_path: Path):
    mp.spawn(dying, (free_port(), str(tmp_path)), 2)
    assert "rank 1 (last done: 1) did not come through iteration 2" in (tmp_path / "said").read_text()


def test_other_trouble_in_a_step_is_nobody_elses(monkeypatch):
    dist = distributed.Dist(0, 2, torch.device("cpu"), store=torch.distributed.HashStore())
    with pytest.raises(RuntimeError, match="out of memory"), dist.named_step(1):
        raise RuntimeError("CUDA out of memory")
