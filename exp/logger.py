"""What a run tells: a progress bar, TensorBoard, and one JSON line per logging step."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class NullLogger:
    """The logger of the ranks other than 0: a context manager that writes nothing."""

    def __enter__(self) -> "NullLogger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def step(self, iteration: int) -> None: ...

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def image(self, iteration: int, name: str, image: np.ndarray) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class RunLogger(NullLogger):
    """Rank 0's logger: <run>/log.jsonl is appended to, <run>/tensorboard holds the events."""

    def __init__(self, run_dir: Path, start: int, total: int) -> None:
        self._bar = tqdm(total=total, initial=start, unit="it", dynamic_ncols=True, mininterval=1.0)
        self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=start + 1 if start else None)
        self._log = run_dir / "log.jsonl"

    def step(self, iteration: int) -> None:
        self._bar.update(iteration - self._bar.n)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write named numbers: to TensorBoard under their names, to log.jsonl as one line."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        with open(self._log, "a", encoding="utf-8") as file:
            row = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
            file.write(json.dumps({"iteration": iteration, "time": round(time.time(), 3), **row}) + "\n")
        if "train/loss" in values:
            self._bar.set_postfix_str(f"loss {values['train/loss']:.4f}")

    def image(self, iteration: int, name: str, image: np.ndarray) -> None:
        """(H, W, 3) uint8 -> TensorBoard."""
        self._writer.add_image(name, image, iteration, dataformats="HWC")

    def message(self, text: str) -> None:
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        self._writer.close()


def build_logger(run_dir: Path, start: int, total: int, is_main: bool) -> NullLogger:
    return RunLogger(run_dir, start, total) if is_main else NullLogger()
