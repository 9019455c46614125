"""Many independent jobs in parallel, with progress; results appear under their names only when they are complete."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from tqdm import tqdm

from exp.runtime.errors import InputError, printable

Job = TypeVar("Job")
Result = TypeVar("Result")


@contextlib.contextmanager
def worker_pool(workers: int, *, threads: bool = False) -> Iterator[Executor | None]:
    """Processes for run_jobs, or threads, for work that mostly decodes; None for one worker (this thread).

    At the end, also after Ctrl-C, the jobs under way are finished and the others dropped; a worker ends by itself when
    this process is killed.
    """
    if workers == 1:
        yield None
        return
    pool = ThreadPoolExecutor(workers) if threads else _processes(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _processes(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:  # the pool's workers would wait for ever on one that was killed
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], pool: Executor | None, title: str, unit: str
) -> tuple[list[tuple[Job, Result]], list[str]]:
    """function(job) for every job -> (job, result) of those that went well, and a line for each that did not.

    A job goes wrong with an InputError or an OSError (a full disk). InputError if one ends its process.
    """
    done, faults = [], []
    attempt = partial(_attempt, function)
    results = map(attempt, jobs) if pool is None else _results(pool, attempt, jobs)
    for (result, fault), job in zip(tqdm(results, title, len(jobs), unit=unit, disable=None), jobs):
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


def _results(pool: Executor, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    """As map(), in the jobs' order.

    The workers that it starts inherit that Ctrl-C is held back; here one that comes meanwhile is heard afterwards.
    """
    resource_tracker.ensure_running()  # which would end the holding back, were it started with the first worker
    previous, futures = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]), []
    try:
        try:
            for job in jobs:
                futures.append(pool.submit(function, job))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        waiting = [job for job, future in zip(jobs, futures) if future.exception()]
        job = _find_deadly(function, waiting[: 2 * (os.cpu_count() or 1)])  # those that were under way come first
        if job is None:
            problem = (
                "got a worker process that was killed (out of memory?), expected it to end well; try fewer workers"
            )
        else:
            problem = f"{job}: got a file at which the process that reads it dies, expected a sound one; fetch it anew"
        raise InputError(problem) from None


def _find_deadly(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Any | None:
    """The first of the jobs that ends a process which does them alone; None if all go well."""
    with _processes(1) as pool:
        for job in jobs:
            try:
                pool.submit(function, job).result()
            except BrokenProcessPool:
                return job
    return None


def report_faults(faults: Iterable[str], what: str) -> None:
    """Print the faults and raise an InputError that counts them, if there are any."""
    faults = list(faults)
    if faults:
        print(*(printable(f"not prepared: {fault}") for fault in faults), sep="\n")
        raise InputError(f"got {len(faults)} {what} that could not be prepared (above), expected none")
