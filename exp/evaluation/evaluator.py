"""Loader -> inference -> rules -> Evaluation: every rule sees the same probabilities of one forward pass."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from exp.config.experiment import ExperimentConfig
from exp.data.base import SegmentationDataset
from exp.data.loader import Batch, build_test_loader
from exp.data.registry import build_dataset, build_normalize
from exp.evaluation.calibration import count_calibration, mean_entropy
from exp.evaluation.inference import Inference, build_inference
from exp.evaluation.metrics import EvalResult, count
from exp.rules.pooled import PooledRule, Pools, Thresholds
from exp.rules.registry import Rule, bind_rules, build_rule
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError

UNFINISHED = "the evaluation is unfinished and has written no results"


@dataclass
class Timing:
    """Wall seconds by what was done, summed over images and processes; the device was waited for at each end.

    Steps: "load" (waiting for the loader), "forward" (image -> probabilities), "pool" (histograms for the rules of a
    wider scope), "score" (counting), "calibration", "write" (files of the decisions, where they are asked for).
    """

    num_images: int = 0
    num_forwards: int = 0  # more than images where probabilities did not fit the cache between two passes
    steps: dict[str, float] = field(default_factory=dict)
    decisions: dict[str, float] = field(default_factory=dict)  # by rule

    def to_dict(self) -> dict[str, Any]:
        """Milliseconds an image (the forward pass: milliseconds a pass), for JSON."""
        steps = {name: _milliseconds(value, self.num_images) for name, value in self.steps.items()}
        if "forward" in steps:
            steps["forward"] = _milliseconds(self.steps["forward"], self.num_forwards)
        decisions = {name: _milliseconds(value, self.num_images) for name, value in self.decisions.items()}
        return {
            "images": self.num_images,
            "forward_passes": self.num_forwards,
            "milliseconds_per_image": steps,
            "decision_milliseconds_per_image": decisions,
        }


def _milliseconds(seconds: float, number: int) -> float:
    return round(1000 * seconds / max(1, number), 4)


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found, the same on every rank.

    calibration: the counts of exp/evaluation/calibration.py per image, (N, C + 1, 3, bins); None if not asked for.
    entropy: with it, (N,) how uncertain the network is of each image (mean_entropy).
    thresholds: those of each rule of a wider scope, by case (None: of the whole data set); `Evaluator.under` takes
        them for further images.
    """

    results: tuple[EvalResult, ...]
    calibration: np.ndarray | None
    entropy: np.ndarray | None
    timing: Timing
    thresholds: Mapping[str, Mapping[str | None, Thresholds]]


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
    rules: Mapping[str, Rule | PooledRule]
    inference: Inference
    normalize: Callable[[Tensor], Tensor]
    num_workers: int
    dist: Dist
    calibration: bool = False
    cache_bytes: int = 0  # of probabilities, which a process keeps from a first pass for the second
    thresholds: Mapping[str, Mapping[str | None, Thresholds]] = field(default_factory=dict)

    def __call__(self, model: nn.Module, sink: Sink | None = None) -> Evaluation:
        """The raw model, the same on every rank and left in eval mode -> a result a rule, on every rank.

        Rules of a wider scope than an image take a first pass over the images, which looks at no label.
        sink: is given every decision of this process, and told when those of all processes are in.
        """
        model.eval()
        timing, cache = Timing(), {}
        judge, rows = self.under(self._pool(model, timing, cache) if self._pooled() else {}), {}
        for batch in self._batches("evaluating", timing):
            index = batch.indices[0]
            prob = cache.pop(index) if index in cache else self._forward(model, batch.image, timing)
            preds = judge._timed_decisions(prob, index, timing)
            rows[index] = self._count(preds, prob, batch.label[0], timing)
            del prob  # before the next image's is computed: of large images there is room for one
            if sink is not None:
                with self._clock(timing.steps, "write"):
                    sink(index, preds)
            timing.num_images += 1
        self.dist.stop_if_asked(UNFINISHED)
        if sink is not None:
            sink.finish()
        parts = self.dist.gather((rows, timing))
        gathered = {index: row for part, _ in parts for index, row in part.items()}
        table = [gathered[index] for index in range(len(self.dataset))]
        results = self._results(np.stack([counts for counts, *_ in table]))
        calibration = np.stack([counts for _, counts, _ in table]) if self.calibration else None
        entropy = np.array([value for *_, value in table]) if self.calibration else None
        timing = add_timings([timing for _, timing in parts])
        return Evaluation(results, calibration, entropy, timing, judge.thresholds)

    def _timed_decisions(self, prob: Tensor, index: int, timing: Timing) -> dict[str, Tensor]:
        """Probabilities of an image -> (H, W) int64 labels a rule."""
        preds = {}
        for name, rule in bind_rules(self.rules, self.thresholds, self.dataset.samples[index].case).items():
            with self._clock(timing.decisions, name):
                preds[name] = rule(prob)[0]
        return preds

    def _count(
        self, preds: Mapping[str, Tensor], prob: Tensor, label: Tensor, timing: Timing
    ) -> tuple[np.ndarray, np.ndarray | None, float | None]:
        """An image's decisions, probabilities and label -> (R, 3, C) int64 counts, those of its calibration, and its
        mean entropy."""
        label = label.to(self.dist.device, non_blocking=True)
        with self._clock(timing.steps, "score"):
            counts = (
                torch.stack([count(pred, label, len(self.dataset.classes)) for pred in preds.values()]).cpu().numpy()
            )
        if not self.calibration:
            return counts, None, None
        with self._clock(timing.steps, "calibration"):
            return counts, count_calibration(prob, label), mean_entropy(prob, label)

    def _pooled(self) -> dict[str, PooledRule]:
        return {name: rule for name, rule in self.rules.items() if isinstance(rule, PooledRule)}

    def _pool(self, model: nn.Module, timing: Timing, cache: dict[int, Tensor]) -> dict:
        """The first pass: the thresholds of the pooled rules; `cache` gets the probabilities of as many as fit."""
        pools, room = Pools(self._pooled()), self.cache_bytes
        for batch in self._batches("gathering thresholds", timing):
            prob = self._forward(model, batch.image, timing)
            with self._clock(timing.steps, "pool"):
                pools.add(prob, self.dataset.samples[batch.indices[0]].case)
            if prob.nbytes <= room:
                cache[batch.indices[0]] = prob
                room -= prob.nbytes
            del prob
        self.dist.stop_if_asked(UNFINISHED)
        return pools.merge(self.dist.gather(pools)).thresholds()

    def _forward(self, model: nn.Module, image: Tensor, timing: Timing) -> Tensor:
        timing.num_forwards += 1
        with self._clock(timing.steps, "forward"):
            return self.probabilities(model, image)

    def _results(self, table: np.ndarray) -> tuple[EvalResult, ...]:
        """(N, R, 3, C) counts -> a result a rule."""
        samples, classes = self.dataset.samples, self.dataset.classes
        names = tuple(sample.name for sample in samples)
        cases = tuple(sample.case for sample in samples) if samples[0].case is not None else None
        return tuple(EvalResult(rule, names, classes, table[:, i], cases) for i, rule in enumerate(self.rules))

    def _batches(self, what: str, timing: Timing) -> Iterator[Batch]:
        """This process's images one by one, the time spent waiting for them noted; no more once asked to stop."""
        loader = build_test_loader(self.dataset, self.num_workers, self.dist)
        start = time.perf_counter()
        for batch in tqdm(loader, desc=what, unit="img", disable=self.dist.hides_bars, leave=False):
            timing.steps["load"] = timing.steps.get("load", 0.0) + time.perf_counter() - start
            if self.dist.asked_to_stop:
                return
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
        for _ in tqdm(loader, desc="reading the validation set", disable=self.dist.hides_bars, leave=False):
            if self.dist.asked_to_stop:
                break
        self.dist.stop_if_asked("nothing was trained yet")

    def under(self, thresholds: Mapping[str, Mapping[str | None, Thresholds]]) -> "Evaluator":
        """Decide further images by what an Evaluation found for the rules of a wider scope."""
        return replace(self, thresholds=thresholds)

    def decide(self, model: nn.Module, image: Tensor, case: str | None = None) -> dict[str, Tensor]:
        """(1, channels, H, W) image, of `case`, and a model in eval mode -> (H, W) int64 labels a rule.

        Rules of a wider scope need thresholds: see under().
        """
        prob = self.probabilities(model, image)
        return {name: rule(prob)[0] for name, rule in bind_rules(self.rules, self.thresholds, case).items()}

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """(1, channels, H, W) image and a model in eval mode -> (1, C, H, W) float32."""
        return self.inference(model, self.normalize(image.to(self.dist.device, non_blocking=True)))


def add_timings(timings: list[Timing]) -> Timing:
    """The processes' timings -> their sum."""
    total = Timing()
    for timing in timings:
        total.num_images += timing.num_images
        total.num_forwards += timing.num_forwards
        for name in ("steps", "decisions"):
            sums = getattr(total, name)
            for key, value in getattr(timing, name).items():
                sums[key] = sums.get(key, 0.0) + value
    return total


def format_timing(timing: Timing) -> str:
    """Timing -> the lines that a run prints."""
    values = timing.to_dict()
    steps, decisions = values["milliseconds_per_image"], values["decision_milliseconds_per_image"]
    pooling = {"gathering thresholds": steps["pool"]} if "pool" in steps else {}
    rows = {"forward pass": steps["forward"], **pooling, **decisions}
    width = max(map(len, rows))
    lines = ["milliseconds an image", *(f"{name:<{width}} {value:9.2f}" for name, value in rows.items())]
    return "\n".join(lines)


def build_evaluator(config: ExperimentConfig, data_dir: str | None, dist: Dist) -> Evaluator:
    """The experiment's validation set under its rules; InputError if the data set is not there."""
    dataset = build_dataset(config.data, data_dir, "val")
    for rule in config.predict:
        if rule.scope == "case" and dataset.samples[0].case is None:
            raise InputError(
                f"--predict_yaml {rule.name}: got {config.data.name}, whose images are in no cases, expected volumes"
            )
    return Evaluator(
        dataset=dataset,
        rules={c.name: build_rule(c, len(dataset.classes)) for c in config.predict},
        inference=build_inference(config.test),
        normalize=build_normalize(config.data),
        num_workers=config.schedule.num_workers,
        dist=dist,
        calibration=config.test.calibration,
        cache_bytes=int(config.test.prob_cache_gb * 2**30),
    )
