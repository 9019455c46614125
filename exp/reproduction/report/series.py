"""Trainings that differ in their length or in the noise of their labels alone, and what rules gain along these."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from exp.reproduction.measured import LENGTH, NOISE, SeedGain, Training, compare_seeds, seed_scores


@dataclass(frozen=True)
class Step:
    """One value of what varies, and the trainings that have it, one per seed. source: whose probabilities are
    evaluated."""

    value: float
    trainings: tuple[Training, ...]
    source: str = ""

    def score(self, rule: str, name: str) -> float:
        """The mean of a rule's score over the seeds, in percent."""
        return float(np.mean(seed_scores(self.trainings, rule, name)))

    def gain(self, rule: str) -> SeedGain:
        return compare_seeds(self.trainings, rule)

    @property
    def rules(self) -> tuple[str, ...]:
        """All of them, argmax first."""
        return self.trainings[0].rules


@dataclass(frozen=True)
class Series:
    """Trainings that differ in one setting and in their seeds alone. label: what varies, LENGTH or NOISE."""

    label: str
    steps: tuple[Step, ...]

    @property
    def training(self) -> Training:
        return self.steps[0].trainings[0]

    @property
    def title(self) -> str:
        name = self.training.name.partition(f", {NOISE}")[0]
        return f"{name}: gain by {'length of training' if self.label == LENGTH else NOISE}"


def find_series(trainings: Sequence[Training], true_maps: Sequence[Training] = ()) -> list[Series]:
    """Trainings, and rules evaluated on true probabilities -> what varies with length or noise, from two steps on."""
    evaluated = [t for t in trainings if len(t.results) > 1 and not t.is_true]
    found = _vary(evaluated, LENGTH, _finished_length)
    for series in _vary(evaluated, NOISE, lambda t: t.config["data"].get("label_noise")):
        first = series.training
        true = {t.config["data"]["label_noise"]: t for t in true_maps if _same_images(t, first)}
        steps = [Step(step.value, step.trainings, "network") for step in series.steps]
        steps += [Step(value, (t,), "true") for value, t in true.items() if len(t.results) > 1]
        found.append(Series(NOISE, tuple(sorted(steps, key=lambda step: (step.source, step.value)))))
    return found


def _finished_length(training: Training) -> int | None:
    """The iterations of a training that has come to its end; None of one by epochs."""
    planned = training.config["schedule"].get("train_iters")
    return planned if planned == training.iteration else None


def _vary(trainings: Sequence[Training], label: str, value_of: Callable[[Training], float | None]) -> list[Series]:
    groups: dict[tuple, dict[float, dict[int, Training]]] = {}
    for training in trainings:
        value = value_of(training)
        if value is not None:
            seeds = groups.setdefault(training.likeness(label), {}).setdefault(value, {})
            known = seeds.setdefault(training.config["seed"], training)
            if len(training.place) < len(known.place):  # the training's own evaluation, not a further one
                seeds[training.config["seed"]] = training
    found = []
    for values in (g for g in groups.values() if len(g) > 1):
        steps = [Step(v, tuple(seeds[s] for s in sorted(seeds))) for v, seeds in sorted(values.items())]
        found.append(Series(label, tuple(steps)))
    return found


def _same_images(true: Training, other: Training) -> bool:
    """Whether the labels come from the same images with, perhaps, another level of noise."""
    keys = ("dataset", "val_split", "val_samples", "label_spread")
    same = all(true.config["data"].get(key) == other.config["data"].get(key) for key in keys)
    same &= true.config["data"].get("label_noise") is not None
    return same and true.metric == other.metric and true.results[0].names == other.results[0].names
