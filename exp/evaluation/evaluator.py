"""Loader -> inference -> rules -> Evaluation: every rule sees the same probabilities of one forward pass.

On a GPU the host runs ahead: images, probabilities kept for a second pass and counts travel through pinned memory while
the device works, and a clock reads the device's events after they have passed.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exp.config.experiment import ExperimentConfig
from exp.data.base import SegmentationDataset
from exp.data.loader import Batch, build_test_loader
from exp.data.registry import build_dataset, build_normalize
from exp.evaluation.calibration import count_calibration, mean_entropy
from exp.evaluation.inference import Inference, build_inference, require_finite
from exp.evaluation.masks import MaskWriter
from exp.evaluation.metrics import EvalResult, build_results, count_rules
from exp.rules.pooled import PooledRule, RuleThresholds, gather_thresholds
from exp.rules.registry import Rule, bind_rules, build_rule, decide, see_padding
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.runtime.progress import follow

UNFINISHED = "the evaluation is unfinished and has written no results"
IN_FLIGHT = 2  # images whose counts may still be on their way from a GPU


@dataclass
class Timing:
    """Wall seconds by what was done, summed over images and processes.

    Steps: "load" (waiting for the loader), "forward" (image -> probabilities), "pool" (histograms for the pooled
    rules), "score" (counting), "calibration", "write" (files of the decisions, where they are asked for).
    """

    num_images: int = 0
    num_forwards: int = 0  # more than images where probabilities did not fit the cache between two passes
    steps: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)  # by rule

    def to_dict(self) -> dict[str, Any]:
        """Milliseconds per image (the forward pass: per pass), for JSON."""
        passes = {"forward": self.num_forwards}

        def milliseconds(seconds: Mapping[str, float]) -> dict[str, float]:
            return {name: round(1000 * v / passes.get(name, self.num_images), 4) for name, v in seconds.items()}

        return {
            "images": self.num_images,
            "forward_passes": self.num_forwards,
            "milliseconds_per_image": milliseconds(self.steps),
            "decision_milliseconds_per_image": milliseconds(self.decisions),
        }


class Clock:
    """Adds to a Timing how long steps take; on a GPU by events, which are read after they have passed."""

    def __init__(self, device: torch.device) -> None:
        self.timing, self._device = Timing(), device
        self._open: deque[tuple[Counter, str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def __call__(self, seconds: Counter[str], name: str) -> Iterator[None]:
        """Add the time that the body takes to seconds[name]."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            seconds[name] += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._open.append((seconds, name, begin, end))
        self._read()

    def _read(self) -> None:
        while self._open and self._open[0][-1].query():
            seconds, name, begin, end = self._open.popleft()
            seconds[name] += begin.elapsed_time(end) / 1000

    def stop(self) -> Timing:
        """Wait for what is still under way -> all that was noted."""
        if self._open:
            self._open[-1][-1].synchronize()
        self._read()
        return self.timing


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found, the same on every rank.

    calibration: the counts of exp/evaluation/calibration.py per image, (N, C + 1, 4, bins); None if not asked for.
    entropy: with it, (N,) how uncertain the network is of each image (mean_entropy).
    thresholds: those of each pooled rule, for further images.
    """

    results: tuple[EvalResult, ...]
    calibration: np.ndarray | None
    entropy: np.ndarray | None
    timing: Timing
    thresholds: RuleThresholds


@dataclass(frozen=True)
class Evaluator:
    """The rules by name, and all it takes to evaluate them on a data set, each image on one process."""

    dataset: SegmentationDataset
    rules: Mapping[str, Rule | PooledRule]
    inference: Inference
    normalize: Callable[[Tensor], Tensor]
    num_workers: int
    dist: Dist
    calibration: bool = False
    metrics: Sequence[str] = ()
    images_per_forward: int = 1
    cache_bytes: int = 0  # of probabilities, which a process keeps in host memory from a first pass for the second

    def __call__(self, model: nn.Module, sink: MaskWriter | None = None) -> Evaluation:
        """Evaluate all images -> what was found; to be called on every rank, and every rank gets it.

        A model in training mode comes back in eval mode. Where there are pooled rules, their thresholds come from a
        first pass over the images, which looks at no label.
        """
        model.eval()
        clock, cache, rows = Clock(self.dist.device), {}, {}
        num_rules, num_classes = len(self.rules), len(self.dataset.classes)
        confusion = torch.zeros(num_rules, num_classes, num_classes, dtype=torch.int64, device=self.dist.device)
        thresholds = gather_thresholds(self.rules, self._first_pass(model, clock, cache), self.dist.gather)
        counted: deque[tuple[int, list[Callable[[], Any]]]] = deque()
        for batch, whole in self._probabilities(model, "evaluating", clock, cache):
            index, preds, size = batch.indices[0], {}, batch.image.shape[-2:]
            prob = self.inference.inside(whole, *size)
            for name, rule in bind_rules(self.rules, thresholds, self.dataset.samples[index].case).items():
                with clock(clock.timing.decisions, name):
                    preds[name] = self._decide(rule, whole, prob)
            counted.append((index, self._count(preds, prob, batch.label[0], confusion, clock)))
            del whole, prob  # before the next image's is computed: of large images there is room for one
            if sink is not None:
                with clock(clock.timing.steps, "write"):
                    sink(index, preds)
            clock.timing.num_images += 1
            while len(counted) > IN_FLIGHT:
                _fetch(counted.popleft(), rows)
        while counted:
            _fetch(counted.popleft(), rows)
        self.dist.stop_if_asked(UNFINISHED)
        if sink is not None:
            sink.finish()
        parts = self.dist.gather((rows, clock.stop(), self.dist.fetch(confusion)()))
        gathered = {index: row for part, *_ in parts for index, row in part.items()}
        columns = [np.array(column) for column in zip(*(gathered[index] for index in range(len(self.dataset))))]
        calibration, entropy = columns[2:] or (None, None)
        names, cases = zip(*((sample.name, sample.case) for sample in self.dataset.samples))
        matrices = np.sum([matrices for *_, matrices in parts], axis=0)
        found = columns[1], cases, self.metrics, matrices
        results = build_results(list(self.rules), names, self.dataset.classes, *found)
        return Evaluation(results, calibration, entropy, add_timings([timing for _, timing, _ in parts]), thresholds)

    def _first_pass(
        self, model: nn.Module, clock: Clock, cache: dict[int, Tensor]
    ) -> Iterator[tuple[Tensor, str | None]]:
        """Probabilities and case of this process's images; `cache` gets as many of the former as there is room for."""
        room = self.cache_bytes
        for batch, prob in self._probabilities(model, "gathering thresholds", clock, {}):
            index = batch.indices[0]
            with clock(clock.timing.steps, "pool"):
                yield self.inference.inside(prob, *batch.image.shape[-2:]), self.dataset.samples[index].case
            if prob.nbytes <= room:
                host = torch.empty(prob.shape, dtype=prob.dtype, pin_memory=prob.device.type == "cuda")
                cache[index] = host.copy_(prob, non_blocking=True)
                room -= prob.nbytes
            del prob
        self.dist.stop_if_asked(UNFINISHED)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dist.device, non_blocking=True)

    def _probabilities(
        self, model: nn.Module, what: str, clock: Clock, cache: dict[int, Tensor]
    ) -> Iterator[tuple[Batch, Tensor]]:
        """This process's images with their (1, C, H, W) probabilities, cached or images_per_forward at a time.

        Padding is in these if a rule sees it.
        """
        batches = self._batches(what, clock)
        while group := list(islice(batches, self.images_per_forward)):
            new = [batch for batch in group if batch.indices[0] not in cache]
            found = dict(zip((batch.indices[0] for batch in new), self._forward(model, new, clock)))
            for batch in group:
                index = batch.indices[0]
                yield batch, found.pop(index) if index in found else self._to_device(cache.pop(index))

    def _forward(self, model: nn.Module, batches: Sequence[Batch], clock: Clock) -> list[Tensor]:
        if not batches:
            return []
        clock.timing.num_forwards += len(batches)
        with clock(clock.timing.steps, "forward"):
            images = [self.normalize(self._to_device(batch.image)) for batch in batches]
            probs = self.inference.unchecked(model, images)
        if probs[0].device.type != "cuda":  # elsewhere _fetch looks at the sums
            for prob in probs:
                require_finite(prob.sum().item())
        return probs

    def _decide(self, rule: Rule, whole: Tensor, prob: Tensor) -> Tensor:
        """The map with its padding, and without, -> (H, W) labels."""
        try:
            return decide(rule, whole, prob, self.inference.place(*prob.shape[-2:]))
        except ValueError:  # a rule may find non-finite probabilities on a GPU before anybody else has looked
            require_finite(prob.sum().item())
            raise

    def _count(
        self, preds: Mapping[str, Tensor], prob: Tensor, label: Tensor, confusion: Tensor, clock: Clock
    ) -> list[Callable[[], Any]]:
        """An image's decisions, probabilities and label -> functions that return the sum of its probabilities, its
        (R, K, C) counts and, where they are asked for, those of its calibration and its mean entropy.

        confusion: (R, C, C), to which the image's are added.
        """
        label, fetch = self._to_device(label), self.dist.fetch
        with clock(clock.timing.steps, "score"):
            counts = count_rules(list(preds.values()), label, len(self.dataset.classes), self.metrics, confusion)
            found = [fetch(prob.sum()), fetch(counts)]
        if self.calibration:
            with clock(clock.timing.steps, "calibration"):
                found += [fetch(count_calibration(prob, label)), fetch(mean_entropy(prob, label))]
        return found

    def _batches(self, what: str, clock: Clock) -> Iterator[Batch]:
        """This process's images one by one, the time spent waiting for them noted; no more once asked to stop."""
        loader = build_test_loader(self.dataset, self.num_workers, self.dist)
        steps, start = clock.timing.steps, time.perf_counter()
        for batch in follow(loader, what, "img", shown=self.dist.is_main):
            steps["load"] += time.perf_counter() - start
            if self.dist.stop:
                return
            yield batch
            start = time.perf_counter()

    def read_all(self) -> None:
        """Read this process's share of the images and labels; InputError for the first that is damaged."""
        for _ in self._batches("reading the validation set", Clock(self.dist.device)):
            pass
        self.dist.stop_if_asked("nothing was trained yet")

    def decide(
        self, model: nn.Module, image: Tensor, thresholds: RuleThresholds | None = None, case: str | None = None
    ) -> dict[str, Tensor]:
        """(1, channels, H, W) image, of `case`, and a model in eval mode -> (H, W) int64 labels by rule.

        thresholds: of the pooled rules, as an Evaluation found them.
        """
        whole = self.inference(model, self.normalize(self._to_device(image)))
        prob, rules = self.inference.inside(whole, *image.shape[-2:]), bind_rules(self.rules, thresholds or {}, case)
        return {name: self._decide(rule, whole, prob) for name, rule in rules.items()}

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """(1, channels, H, W) image and a model in eval mode -> (1, C, H, W) float32."""
        prob = self.inference(model, self.normalize(self._to_device(image)))
        return self.inference.inside(prob, *image.shape[-2:])


def _fetch(counted: tuple[int, list[Callable[[], Any]]], rows: dict[int, list]) -> None:
    """What _count returned of an image -> its content in `rows`."""
    index, found = counted
    rows[index] = [content() for content in found]
    require_finite(rows[index][0])


def add_timings(timings: list[Timing]) -> Timing:
    """The processes' timings -> their sum."""
    total = Timing()
    for timing in timings:
        total.num_images += timing.num_images
        total.num_forwards += timing.num_forwards
        total.steps.update(timing.steps)
        total.decisions.update(timing.decisions)
    return total


def format_timing(timing: Timing) -> str:
    """Timing -> the lines that a run prints."""
    values = timing.to_dict()
    names = {"forward": "forward pass", "pool": "gathering thresholds"}
    rows = {name: values["milliseconds_per_image"][step] for step, name in names.items() if step in timing.steps}
    rows |= values["decision_milliseconds_per_image"]
    width = max(map(len, rows))
    return "\n".join(["milliseconds per image", *(f"{name:<{width}} {value:9.2f}" for name, value in rows.items())])


def build_evaluator(config: ExperimentConfig, data_dir: str | None, dist: Dist) -> Evaluator:
    """The experiment's validation set under its rules; InputError if the data set is not there."""
    dataset = build_dataset(config.data, data_dir, "val")
    for rule in config.predict:
        if rule.scope == "case" and dataset.samples[0].case is None:
            raise InputError(
                f"--predict_yaml {rule.name}: got {config.data.name}, whose images are in no cases, expected volumes"
            )
    rules = {c.name: build_rule(c, len(dataset.classes), dataset.classes) for c in config.predict}
    return Evaluator(
        dataset=dataset,
        rules=rules,
        inference=build_inference(config.test, see_padding(rules.values())),
        normalize=build_normalize(config.data),
        num_workers=config.schedule.num_workers,
        dist=dist,
        calibration=config.test.calibration,
        metrics=config.test.metrics,
        images_per_forward=config.test.images_per_forward,
        cache_bytes=int(config.test.prob_cache_gb * 2**30),
    )
