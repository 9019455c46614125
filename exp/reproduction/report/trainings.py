"""The trainings below a folder: those of the paper's tables and others, seeds together, and series.

A series are trainings that differ in their length or in the noise of their labels alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from exp.reproduction.measured import LENGTH, NOISE, Measured, Training
from exp.reproduction.plans import ALL, table_jobs


@dataclass(frozen=True)
class Step:
    """One value of what varies, and its trainings, one per seed. source: whose probabilities are evaluated."""

    value: float
    trainings: tuple[Training, ...]
    source: str = ""


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


@dataclass(frozen=True)
class Trainings:
    """By name, length and seed: those that belong to no table of the paper (`others`), those of its tables (`paper`),
    and rules evaluated on true probabilities (`true_maps`)."""

    others: tuple[Training, ...]
    paper: tuple[Training, ...]
    true_maps: tuple[Training, ...]

    @property
    def all_others(self) -> tuple[Training, ...]:
        return *self.others, *self.true_maps

    @property
    def seeded(self) -> list[list[Training]]:
        """Those that differ in their seeds alone, together; each with argmax and another rule."""
        return [group for group in group_seeds(self.others) if len(group) > 1 and len(group[0].results) > 1]

    @property
    def series(self) -> list[Series]:
        return find_series(self.others, self.true_maps)


def find_trainings(measured: Measured) -> Trainings:
    digests = {job.digest for job in table_jobs(ALL)}
    found: tuple[list[Training], list[Training]] = ([], [])
    for digest, training in measured.trainings():
        found[digest in digests].append(training)
    others, paper = (
        tuple(sorted(ts, key=lambda t: (t.name, t.iteration, t.config["seed"], len(t.place), t.place))) for ts in found
    )
    return Trainings(others, paper, tuple(sorted(measured.true_maps(), key=lambda t: (t.name, t.place))))


def group_seeds(trainings: Iterable[Training]) -> list[list[Training]]:
    """Trainings that differ in their seed alone, together; of several evaluations of one seed the first."""
    groups: dict[tuple, dict[int, Training]] = {}
    for training in trainings:
        groups.setdefault(training.unseeded, {}).setdefault(training.config["seed"], training)
    return [list(group.values()) for group in groups.values()]


def training_titles(trainings: Sequence[Training]) -> list[str]:
    """One title each; further evaluations of one training have the names of their folders in it."""
    titles: list[str] = []
    for training in trainings:
        folder = PurePosixPath(training.place).parent.name
        titles.append(f"{training.title} ({folder})" if training.title in titles else training.title)
    return titles


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
