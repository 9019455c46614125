"""What a run tells: a progress bar, TensorBoard, and one JSON line per logging step."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from exp.files.atomic import append_line
from exp.runtime.errors import printable

T = TypeVar("T")


class Meter:
    """Where the time of a training goes; what it reports is of the steps since its last report."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size, self.device = batch_size, device
        self._restart()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each of them is here is counted as waiting."""
        iterator, none = iter(batches), object()
        while True:
            asked = time.perf_counter()
            batch = next(iterator, none)
            self._waited += time.perf_counter() - asked
            if batch is none:
                return
            self.steps += 1
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside, a validation, is no time of the steps."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def report(self, steps_left: int) -> dict[str, float]:
        """Named figures of the steps since the last report; remaining_seconds is without validations to come."""
        seconds = time.perf_counter() - self._start
        row = {
            "train/images_per_second": self.steps * self.batch_size / seconds,
            "train/step_seconds": seconds / self.steps,
            "train/data_wait_share": self._waited / seconds,
            "train/peak_memory_gib": peak_memory(self.device),
            "train/remaining_seconds": steps_left * seconds / self.steps,
        }
        self._restart()
        return row

    def _restart(self) -> None:
        self.steps, self._waited, self._start = 0, 0.0, time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """The most that this process has held so far, GiB: of the GPU's memory, or else its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Logger:
    """The logger of the ranks other than 0: a context manager that writes nothing."""

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def step(self, iteration: int) -> None: ...

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def image(self, iteration: int, name: str, image: np.ndarray) -> None: ...

    def message(self, text: str) -> None: ...


class RunLogger(Logger):
    """Rank 0's logger: <run>/log.jsonl is appended to, <run>/tensorboard holds the events.

    A progress bar where stderr is a terminal; elsewhere, such as in a file, a line after the first step and every
    logging step.
    """

    def __init__(self, run_dir: Path, start: int, total: int, check_owner: Callable[[], None]) -> None:
        self._check_owner = check_owner
        self._unwritten: set[str] = set()
        self._bar = tqdm(total=total, initial=start, unit="it", dynamic_ncols=True, mininterval=1.0, disable=None)
        self._start, self._total = start, total
        self._run_dir, self._purge_step = run_dir, start + 1 if start else None
        self._log = run_dir / "log.jsonl"

    @cached_property
    def _writer(self) -> Any:
        """Made when there is something to write: importing TensorBoard takes a second or two before the first step."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._run_dir / "tensorboard", purge_step=self._purge_step)

    def step(self, iteration: int) -> None:
        self._bar.update(iteration - self._bar.n)
        if self._bar.disable and iteration == self._start + 1:
            say(f"iteration {iteration} of {self._total} done")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write named numbers: to TensorBoard under their names, to log.jsonl as one line."""
        self._check_owner()
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        with self._survived("log.jsonl"):
            append_line(self._log, json.dumps({"iteration": iteration, "time": round(time.time(), 3), **row}))
        with self._survived("tensorboard"):
            for name, value in values.items():
                self._writer.add_scalar(name, value, iteration)
        if "train/loss" in values:
            text = (
                f"loss {values['train/loss']:.4f}, {values['train/images_per_second']:.1f} img/s, waiting "
                f"{values['train/data_wait_share']:.0%}, {values['train/peak_memory_gib']:.1f} GiB"
            )
            self._bar.set_postfix_str(text)
            if self._bar.disable:
                left = timedelta(seconds=round(values["train/remaining_seconds"]))
                say(f"iteration {iteration} of {self._total}: {text}, {left} left")

    def image(self, iteration: int, name: str, image: np.ndarray) -> None:
        """(H, W, 3) uint8 -> TensorBoard."""
        with self._survived("tensorboard"):
            self._writer.add_image(name, image, iteration, dataformats="HWC")

    @contextmanager
    def _survived(self, name: str) -> Iterator[None]:
        """What cannot be written is told once, and training goes on; the next figures are tried again."""
        try:
            yield
        except OSError as error:
            if name not in self._unwritten:
                say(f"warning: {self._run_dir / name}: cannot be written: {error}; training continues without")
            self._unwritten.add(name)

    def message(self, text: str) -> None:
        self._bar.write(text)
        with suppress(OSError):
            sys.stdout.flush()  # in a file it would show much later

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if "_writer" in vars(self):
            with self._survived("tensorboard"):
                self._writer.close()


def say(text: str) -> None:
    """A line to stderr; where that cannot be written, on a full disk say, training continues without."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def build_logger(
    run_dir: Path, start: int, total: int, is_main: bool, check_owner: Callable[[], None] = lambda: None
) -> Logger:
    """check_owner: called before figures are written; InputError where the folder is another program's by then."""
    return RunLogger(run_dir, start, total, check_owner) if is_main else Logger()
