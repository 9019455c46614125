"""Results below a folder -> measured counterparts of published figures, computed from the counts of every image."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from exp.comparison import mean_interval, paired_differences, signed_rank
from exp.errors import InputError
from exp.metrics import EvalResult, compute_scores, per_class_scores
from exp.reproduction.cells import Cell, Existing
from exp.reproduction.plans import Counterpart
from exp.results import load_result
from exp.text_files import read_json

PAIRED = ("mIoUI", "mDiceI", "mAccI")  # scores that every image, or case, has


@dataclass(frozen=True)
class Gain:
    """A rule's score minus argmax's, in percent points, with its 95 % interval where the score has one."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class SeedGain:
    """One score's gain over several seeds of one training.

    values: a seed each. mean, interval, p_value, wins, losses: of the gains of the images (cases), each averaged over
    the seeds; p by Wilcoxon's signed-rank test. seed_p: of the seeds' gains, by the paired t-test.
    """

    values: tuple[float, ...]
    num_units: int
    mean: float
    interval: tuple[float, float] | None
    p_value: float
    wins: int
    losses: int
    seed_p: float


class Measured:
    """What was measured below `output`; results are recognised by their configs and computed from their CSVs."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.existing = Existing(output)
        self._results: dict[Path, EvalResult] = {}

    def load(self, path: Path) -> EvalResult:
        """<rule>.json or .csv -> the counts of its rule."""
        table = path.with_suffix(".csv")
        if table not in self._results:
            self._results[table] = load_result(table)
        return self._results[table]

    def find(self, cell: Cell, rule: str) -> EvalResult | None:
        path = self.existing.find(cell, rule)
        return None if path is None else self.load(path)

    def value(self, counterpart: Counterpart) -> float | None:
        """The measured value, in percent or seconds (p as it is); None unless all of its trainings are judged."""
        if counterpart.joined == "p":
            pairs = [[self._score(cell, rule, counterpart) for rule in ("argmax", counterpart.rule)]
                     for cell in counterpart.cells]  # fmt: skip
            if any(value is None for pair in pairs for value in pair):
                return None
            return float(stats.ttest_rel(*zip(*pairs)).pvalue)
        values = [self._score(cell, counterpart.rule, counterpart) for cell in counterpart.cells]
        if any(value is None for value in values):
            return None
        return float(np.std(values, ddof=1) if counterpart.joined == "std" else np.mean(values))

    def _score(self, cell: Cell, rule: str, counterpart: Counterpart) -> float | None:
        kind, _, name = counterpart.score.partition(":")
        if kind == "seconds":
            return self._seconds(cell, rule, name)
        result = self.find(cell, rule)
        if result is None:
            return None
        if kind == "IoUC":
            return float(per_class_scores(result.counts, result.cases)["IoUC"][result.classes.index(name)])
        return float(compute_scores(result.counts, result.cases)[kind])

    def _seconds(self, cell: Cell, rule: str, step: str) -> float | None:
        """Total seconds of the forward passes, or of a rule's decisions, over the evaluation."""
        path = self.existing.find(cell, rule)
        if path is None or not path.with_name("timing.json").is_file():
            return None
        timing = read_times(path.with_name("timing.json"))
        if step == "forward":
            return timing["milliseconds_per_image"]["forward"] * timing["forward_passes"] / 1000
        each = timing["decision_milliseconds_per_image"].get(rule)
        return None if each is None else each * timing["images"] / 1000

    def gain(self, base: Counterpart, other: Counterpart) -> Gain | None:
        """What the rule of `other` gains over that of `base`, both on the same trainings; the interval is over the
        images (cases) of all folds, or over the seeds."""
        first, second = self.value(base), self.value(other)
        if first is None or second is None:
            return None
        if other.score not in PAIRED:
            return Gain(second - first)
        differences = [paired_differences(self.find(cell, base.rule), self.find(cell, other.rule), other.score)
                       for cell in other.cells]  # fmt: skip
        seeds = len({cell.seed for cell in other.cells}) > 1
        values = np.array([d.mean() for d in differences]) if seeds else np.concatenate(differences)
        return Gain(second - first, mean_interval(values))


def read_times(path: Path) -> dict[str, Any]:
    """timing.json -> its content; InputError unless the fields that tables and page take are numbers."""
    expected = "the times of an evaluation"
    timing = read_json(path, expected)
    try:
        forward, decisions = timing["milliseconds_per_image"]["forward"], timing["decision_milliseconds_per_image"]
        numbers = [forward, timing["forward_passes"], timing["images"], *decisions.values()]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}), expected {expected}") from None
    if not all(isinstance(number, int | float) for number in numbers):
        raise InputError(f"{path}: got {numbers}, expected numbers, {expected}")
    return timing


@dataclass(frozen=True)
class Training:
    """The rules that judged one training in one results folder, argmax first. place: its run, below the output."""

    folder: Path
    config: dict
    iteration: int
    metric: str
    results: tuple[EvalResult, ...]
    temperature: float = 1.0  # of the evaluation
    place: str = ""

    @cached_property
    def name(self) -> str:
        parts = [self.config[group]["name"] for group in ("model", "data", "loss")]
        fold, noise = (self.config["data"].get(key) for key in ("fold", "label_noise"))
        parts += [] if fold is None else [f"fold {fold}"]
        parts += [] if noise is None else [f"label noise {noise:g}"]
        return ", ".join([*parts, *([] if self.temperature == 1 else ["after temperature scaling"])])

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.config['seed']}, {self.iteration} iterations"

    @property
    def unseeded(self) -> tuple:
        """What trainings that differ in their seed alone have in common."""
        names = tuple(result.rule for result in self.results)
        plain = {key: value for key, value in self.config.items() if key != "seed"}
        judged = (self.metric, self.temperature == 1)  # fitted ones differ from seed to seed
        return str(sorted(plain.items(), key=str)), self.iteration, judged, names, self.results[0].names


def compare_seeds(trainings: Sequence[Training], rule: str) -> SeedGain:
    """Trainings of several seeds -> what a rule gains over argmax by their metric."""
    metric, rows = trainings[0].metric, []
    for training in trainings:
        by_rule = {result.rule: result for result in training.results}
        rows.append(paired_differences(by_rule["argmax"], by_rule[rule], metric))
    gains = [float(row.mean()) for row in rows]
    images = np.mean(rows, axis=0)
    return SeedGain(
        values=tuple(gains),
        num_units=len(images),
        mean=float(images.mean()),
        interval=mean_interval(images),
        p_value=signed_rank(images),
        wins=int((images > 0).sum()),
        losses=int((images < 0).sum()),
        seed_p=float(stats.ttest_1samp(gains, 0).pvalue),
    )
