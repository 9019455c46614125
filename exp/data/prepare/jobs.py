"""Many independent jobs in parallel, with progress; results appear under their names only when they are complete."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from exp.runtime.errors import InputError, printable

Job = TypeVar("Job")
Result = TypeVar("Result")
SPARE_BYTES = 64 * 2**20  # of the disk, beyond what is needed
TEMPORARY = f".tmp-{socket.gethostname()}-"


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for run_jobs, None for one worker (this process). At the end, also after Ctrl-C, the jobs under way
    are finished and the others dropped; a worker ends by itself when this process is killed."""
    if workers == 1:
        yield None
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise InputError(
            "got a worker process that was killed (out of memory?), expected it to end well; try fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def thread_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for run_jobs, for work that mostly decodes; at the end, also after Ctrl-C, waiting jobs are dropped."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], pool: Executor | None, title: str, unit: str
) -> tuple[list[tuple[Job, Result]], list[str]]:
    """function(job) for every job -> (job, result) of those that went well, and a line for each that did not.

    A job goes wrong with an InputError or an OSError (a full disk).
    """
    done, faults = [], []
    attempt = partial(_attempt, function)
    with tqdm(total=len(jobs), desc=title, unit=unit, disable=None) as bar:
        for job, (result, fault) in zip(jobs, map(attempt, jobs) if pool is None else _submit(pool, attempt, jobs)):
            bar.update()
            if fault is None:
                done.append((job, result))
            else:
                faults.append(fault)
    return done, faults


def _attempt(function: Callable[[Any], Any], job: Any) -> tuple[Any, str | None]:
    try:
        return function(job), None
    except (InputError, OSError) as error:
        return None, " ".join(str(error).split())


def _submit(pool: Executor, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    """As map(), in the jobs' order. The workers that it starts inherit that Ctrl-C is held back; here one that comes
    meanwhile is heard afterwards."""
    resource_tracker.ensure_running()  # which would end the holding back, were it started with the first worker
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.map(function, jobs, chunksize=max(1, len(jobs) // 512))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _start_worker() -> None:
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:  # the pool's workers would wait for ever on one that was killed
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, which becomes it at the end; after an error it is removed."""
    temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{target.name}")
    try:
        yield temporary
        if target.exists():
            raise InputError(f"{target}: got something that was not there before, expected a free name")
        temporary.rename(target)
    finally:
        _remove(temporary)


def remove_stale(folder: Path) -> None:
    """Remove what processes of this machine that no longer live have left half-written in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        pid = path.name.removeprefix(TEMPORARY).partition("-")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            _remove(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_space(folder: Path, needed: int) -> None:
    """InputError if the disk of `folder` has less than `needed` bytes and some to spare."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE_BYTES:
        raise InputError(
            f"{folder}: got {free / 1e9:.2f} GB of free disk space, expected {(needed + SPARE_BYTES) / 1e9:.2f} GB"
        )


def report_faults(faults: Iterable[str], what: str) -> None:
    """Print the faults and raise an InputError that counts them, if there are any."""
    faults = list(faults)
    if faults:
        print(*(printable(f"not prepared: {fault}") for fault in faults), sep="\n")
        raise InputError(f"got {len(faults)} {what} that could not be prepared (above), expected none")
