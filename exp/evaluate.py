"""Loader -> inference -> rules -> Evaluation: every rule sees the same probabilities of one forward pass."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from exp.config import ExperimentConfig
from exp.data import SegmentationDataset, build_dataset, build_normalize
from exp.data.loader import build_test_loader
from exp.distributed import Dist
from exp.inference import Inference, build_inference
from exp.metrics import EvalResult, count
from exp.predict import Rule, build_rule


@dataclass
class Timing:
    """Wall seconds by what was done, summed over the images and processes; the device was waited for at each end.

    Steps: "load" (waiting for the loader), "forward" (image -> probabilities), "score" (counting), "write" (files of
    the decisions, where they are asked for).
    """

    num_images: int = 0
    steps: dict[str, float] = field(default_factory=dict)
    decisions: dict[str, float] = field(default_factory=dict)  # by rule

    def to_dict(self) -> dict:
        """Milliseconds an image, for JSON."""

        def per_image(seconds: Mapping[str, float]) -> dict[str, float]:
            return {name: round(1000 * value / max(1, self.num_images), 4) for name, value in seconds.items()}

        return {
            "images": self.num_images,
            "milliseconds_per_image": per_image(self.steps),
            "decision_milliseconds_per_image": per_image(self.decisions),
        }


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found, the same on every rank.

    calibration: the counts of exp/calibration.py per image, (N, ...) in the data set's order; None if not asked for.
    """

    results: tuple[EvalResult, ...]
    calibration: np.ndarray | None
    timing: Timing


class Sink(Protocol):
    """What takes the decisions as they are made, such as a writer of masks."""

    def __call__(self, index: int, preds: Mapping[str, Tensor]) -> None:
        """An image's index in the data set and its (H, W) labels a rule."""

    def finish(self) -> None:
        """This process has handed over its last image; called on every rank."""


@dataclass(frozen=True)
class Evaluator:
    """The rules by name, and all it takes to judge them on a data set, each image on one process."""

    dataset: SegmentationDataset
    rules: Mapping[str, Rule]
    inference: Inference
    normalize: Callable[[Tensor], Tensor]
    num_workers: int
    dist: Dist

    def __call__(self, model: nn.Module, sink: Sink | None = None) -> Evaluation:
        """The raw model, the same on every rank and left in eval mode -> a result a rule, on every rank.

        sink: is given every decision of this process, and told when those of all processes are in.
        """
        model.eval()
        loader = build_test_loader(self.dataset, self.num_workers, self.dist)
        num_classes, rows, timing = len(self.dataset.classes), {}, Timing()
        batches = tqdm(loader, desc="evaluating", unit="img", disable=not self.dist.is_main, leave=False)
        for batch in self._timed(batches, timing):
            with self._clock(timing.steps, "forward"):
                prob = self.probabilities(model, batch.image)
            preds = {}
            for name, rule in self.rules.items():
                with self._clock(timing.decisions, name):
                    preds[name] = rule(prob)[0]
            with self._clock(timing.steps, "score"):
                label = batch.label[0].to(self.dist.device, non_blocking=True)
                counts = torch.stack([count(pred, label, num_classes) for pred in preds.values()])
                rows[batch.indices[0]] = counts.cpu().numpy()
            if sink is not None:
                with self._clock(timing.steps, "write"):
                    sink(batch.indices[0], preds)
            timing.num_images += 1
        if sink is not None:
            sink.finish()
        parts = self.dist.gather((rows, timing))
        gathered = {index: row for part, _ in parts for index, row in part.items()}
        table = np.stack([gathered[index] for index in range(len(self.dataset))])
        return Evaluation(self._results(table), None, add_timings([timing for _, timing in parts]))

    def _results(self, table: np.ndarray) -> tuple[EvalResult, ...]:
        """(N, R, 3, C) counts -> a result a rule."""
        samples, classes = self.dataset.samples, self.dataset.classes
        names = tuple(sample.name for sample in samples)
        cases = tuple(sample.case for sample in samples) if samples[0].case is not None else None
        return tuple(EvalResult(rule, names, classes, table[:, i], cases) for i, rule in enumerate(self.rules))

    def _timed(self, batches: Iterator, timing: Timing) -> Iterator:
        """The batches, the time spent waiting for them noted."""
        start = time.perf_counter()
        for batch in batches:
            timing.steps["load"] = timing.steps.get("load", 0.0) + time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    @contextmanager
    def _clock(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        """Add the time that the body takes on this process's device to seconds[name]."""
        self.dist.synchronize()
        start = time.perf_counter()
        yield
        self.dist.synchronize()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    def read_all(self) -> None:
        """Read this process's share of the images and labels; InputError for the first that is damaged."""
        loader = build_test_loader(self.dataset, self.num_workers, self.dist)
        for _ in tqdm(loader, desc="reading the validation set", disable=not self.dist.is_main, leave=False):
            pass

    def decide(self, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
        """(1, channels, H, W) image and a model in eval mode -> (H, W) int64 labels a rule."""
        prob = self.probabilities(model, image)
        return {name: rule(prob)[0] for name, rule in self.rules.items()}

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """(1, channels, H, W) image and a model in eval mode -> (1, C, H, W) float32."""
        return self.inference(model, self.normalize(image.to(self.dist.device, non_blocking=True)))


def add_timings(timings: list[Timing]) -> Timing:
    """The processes' timings -> their sum."""
    total = Timing()
    for timing in timings:
        total.num_images += timing.num_images
        for name in ("steps", "decisions"):
            sums = getattr(total, name)
            for key, value in getattr(timing, name).items():
                sums[key] = sums.get(key, 0.0) + value
    return total


def format_timing(timing: Timing) -> str:
    """Timing -> the lines that a run prints."""
    values = timing.to_dict()
    steps, decisions = values["milliseconds_per_image"], values["decision_milliseconds_per_image"]
    width = max(map(len, ("forward pass", *decisions)))
    rows = {"forward pass": steps["forward"], **decisions}
    lines = ["milliseconds an image", *(f"{name:<{width}} {value:9.2f}" for name, value in rows.items())]
    return "\n".join(lines)


def build_evaluator(config: ExperimentConfig, data_dir: str | None, dist: Dist) -> Evaluator:
    """The experiment's validation set under its rules; InputError if the data set is not there."""
    dataset = build_dataset(config.data, data_dir, "val")
    return Evaluator(
        dataset=dataset,
        rules={c.name: build_rule(c, len(dataset.classes)) for c in config.predict},
        inference=build_inference(config.test),
        normalize=build_normalize(config.data),
        num_workers=config.schedule.num_workers,
        dist=dist,
    )
