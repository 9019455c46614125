"""Results below a folder -> measured counterparts of published values, computed from the counts of every image."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from scipy import stats

from exp.evaluation.comparison import (
    Comparison,
    compare_pooled,
    compare_rules,
    losing_names,
    mean_interval,
    paired_differences,
    share_losing,
    unit_differences,
)
from exp.evaluation.metrics import EvalResult, case_scores, compute_scores, image_scores, per_class_scores
from exp.evaluation.results import CALIBRATION, format_comparisons, load_result
from exp.files.text import read_json
from exp.reproduction.existing import PUBLISHED, Existing, differences
from exp.reproduction.job import Job
from exp.reproduction.plans import ALL, Counterpart, table_jobs
from exp.runtime.errors import InputError, passing_over

PAIRED = ("mIoUI", "mDiceI", "mAccI")  # scores that every image, or case, has
KINDS = ("gain", "loss", "random")  # of the pictures of --save_pred
Interval = tuple[float, float]


def _place(rule: str) -> tuple[int, str]:
    """Where a rule stands among the further ones: that of the paper first."""
    first = ("rankseg_rma", "rankseg_rma_paper")
    return first.index(rule) if rule in first else len(first), rule


class Measured:
    """What was measured below `output`; results are recognised by their configs and computed from their CSVs."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.existing = Existing(output)
        self._results: dict[Path, EvalResult | None] = {}

    def load(self, path: Path) -> EvalResult | None:
        """<rule>.json or .csv -> the counts of its rule; None, and a warning, if its table is damaged."""
        table = path.with_suffix(".csv")
        if table not in self._results:
            self._results[table] = None
            with passing_over():
                self._results[table] = load_result(table)
        return self._results[table]

    def find(self, job: Job, rule: str) -> EvalResult | None:
        path = self.existing.find(job, rule)
        return None if path is None else self.load(path)

    def trainings(self) -> tuple[list["Training"], list["Training"]]:
        """Evaluations by argmax and perhaps other rules, one per folder: those of the paper's trainings, and others,
        with those of networks that others trained, true probabilities and other programs' maps behind them."""
        digests = {job.digest for job in table_jobs(ALL)}
        paper, others = [], list(self._by_folder([*self.existing.published, *self.existing.without_training]))
        for digest, entries in self.existing.results.items():
            (paper if digest in digests else others).extend(self._by_folder(entries))
        return sorted(paper, key=_order), sorted(others, key=_order)

    def run(self) -> "Training | None":
        """The evaluation whose results lie in `output` itself, the folder of a run; None without results of argmax."""
        folder = self.output / "results"
        own = self.existing
        entries = chain(own.published, own.without_training, *own.results.values())
        return next(self._by_folder([entry for entry in entries if entry[0].parent == folder]), None)

    def _by_folder(self, entries: Iterable[tuple[Path, dict]]) -> Iterator["Training"]:
        """Results of one training -> those with argmax and a score that every image has, one per folder.

        A rule that was evaluated otherwise than argmax, or on other weights, is not compared with it.
        """
        folders: dict[Path, dict[str, dict]] = {}
        for path, content in entries:
            folders.setdefault(path.parent, {})[path.stem] = content
        for folder, contents in sorted(folders.items()):
            content = contents.pop("argmax", None)
            if content is None:
                continue
            test = content["config"].get("test", {"metric": content.get("metric", "mDiceI"), "temperature": 1.0})
            metric, temperature = test.get("metric"), test.get("temperature")
            if metric not in PAIRED or not isinstance(temperature, int | float):
                continue
            base, same, apart = self.load(folder / "argmax.csv"), [], []
            if base is None:
                continue
            for rule in sorted(contents, key=_place):
                result, differing = self.load(folder / f"{rule}.csv"), differences(content, contents[rule])
                if result is None:
                    continue
                if differing := differing or other_images(base, result):
                    apart.append(f"{rule}: {', '.join(differing)}")
                else:
                    same.append(result)
            no_training = {
                "data": content["config"].get("data"),
                "maps": content.get("maps"),
                "seed": 0,
                "iteration": 0,
            }
            config = content.get("training", no_training)
            if PUBLISHED in config:
                config = {**no_training, **config}
            run = folder.parent
            place = run.resolve().name if run == self.output else run.relative_to(self.output).as_posix()
            yield Training(
                folder,
                config,
                config["iteration"],
                metric,
                (base, *same),
                temperature,
                place,
                test,
                content,
                tuple(apart),
            )

    def value(self, counterpart: Counterpart) -> float | None:
        """The measured value, in percent or seconds (p as it is); None unless all of its trainings are evaluated."""
        rules = ("argmax", counterpart.rule) if counterpart.joined == "p" else (counterpart.rule,)
        columns = [[self._score(job, rule, counterpart) for job in counterpart.jobs] for rule in rules]
        if any(value is None for column in columns for value in column):
            return None
        if counterpart.joined == "p":
            return float(stats.ttest_rel(*columns).pvalue)
        return float(np.std(columns[0], ddof=1) if counterpart.joined == "std" else np.mean(columns[0]))

    def _score(self, job: Job, rule: str, counterpart: Counterpart) -> float | None:
        kind, _, name = counterpart.score.partition(":")
        if kind == "seconds":
            return self._seconds(job, rule, name)
        result = self.find(job, rule)
        if result is None:
            return None
        if kind == "IoUC":
            return float(per_class_scores(result.counts, result.cases)["IoUC"][result.classes.index(name)])
        return float(compute_scores(result.counts, result.cases)[kind])

    def _seconds(self, job: Job, rule: str, step: str) -> float | None:
        """Total seconds of the forward passes, or of a rule's decisions, over the evaluation."""
        path = self.existing.find(job, rule)
        if path is None or not path.with_name("timing.json").is_file():
            return None
        timing = None
        with passing_over():
            timing = read_times(path.with_name("timing.json"))
        if timing is None or differences(timing, read_json(path, "the results of a rule")):
            return None
        if step == "forward":
            return timing["milliseconds_per_image"]["forward"] * timing["forward_passes"] / 1000
        each = timing["decision_milliseconds_per_image"].get(rule)
        return None if each is None else each * timing["images"] / 1000

    def gain(self, base: Counterpart, other: Counterpart) -> tuple[float | None, Interval | None]:
        """What the rule of `other` gains over that of `base` on the same trainings, in percent points, with its 95 %
        interval where the score has one: over the images (cases) of all folds, or over the seeds."""
        first, second = self.value(base), self.value(other)
        if first is None or second is None:
            return None, None
        if other.score not in PAIRED:
            return second - first, None
        differences = [paired_differences(self.find(job, base.rule), self.find(job, other.rule), other.score)
                       for job in other.jobs]  # fmt: skip
        is_seeded = len({job.seed for job in other.jobs}) > 1
        values = np.array([d.mean() for d in differences]) if is_seeded else np.concatenate(differences)
        return second - first, mean_interval(values)


def beside_argmax(run: Path, rules: Sequence[str], metric: str) -> str:
    """The folder of a run, whose argmax was evaluated before, rules evaluated now, and mAccI, mIoUI or mDiceI -> what a
    run prints of these beside it, and of those that were evaluated otherwise what differs."""
    training = Measured(run).run()
    if training is None:
        return ""
    blocks = [f"not compared with argmax, evaluated otherwise: {t}" for t in training.apart if t.split(":")[0] in rules]
    same = [result for result in training.results if result.rule in ("argmax", *rules)]
    if len(same) > 1:
        blocks += ["beside argmax, evaluated before:", format_comparisons(compare_rules(same, metric), metric)]
    return "\n".join(blocks)


def other_images(base: EvalResult, other: EvalResult) -> list[str]:
    """What differs in the images and labels of two results: nothing if the labelled pixels of all classes are equal."""
    if any(getattr(base, name) != getattr(other, name) for name in ("names", "cases", "classes")):
        return ["other images or classes"]
    labelled = [result.counts[:, 0] + result.counts[:, 2] for result in (base, other)]  # tp + fn, under every rule
    return [] if np.array_equal(*labelled) else ["other labels"]


def read_times(path: Path) -> dict[str, Any]:
    """timing.json -> its content; InputError unless the fields that tables and page take are numbers."""
    expected = "the times of an evaluation"
    times = read_json(path, expected)
    with _fields(path, expected):
        numbers = [times["milliseconds_per_image"]["forward"], times["forward_passes"], times["images"]]
        numbers += times["decision_milliseconds_per_image"].values()
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError(f"got {numbers}, expected numbers")
    return times


def read_calibration(path: Path) -> dict[str, Any]:
    """calibration.json -> its content; InputError unless its scores and the bins of its top label are numbers."""
    expected = "the calibration of an evaluation"
    content = read_json(path, expected)
    with _fields(path, expected):
        _check_numbers([*content["metrics"].values(), *_bins(content["top_label"])])
    return content


def read_fit(path: Path) -> dict[str, Any]:
    """temperature.json -> its content; InputError unless temperature, scores and bins are numbers.

    Files of before had no bins (`top_label`).
    """
    expected = "a fitted temperature"
    content = read_json(path, expected)
    with _fields(path, expected):
        numbers = [content["temperature"]]
        for part in ("fitted_on", "held_out"):
            numbers.append(content[part]["pixels"])
            for row in (content[part]["before"], content[part]["after"]):
                numbers += [
                    row["NLL"],
                    row["ECED"],
                    row["SCED"],
                    *(_bins(row["top_label"]) if "top_label" in row else []),
                ]
        _check_numbers(numbers)
    return content


def _bins(top_label: Mapping[str, list]) -> list:
    return [*top_label["pixels"], *top_label["confidence"], *top_label["accuracy"]]


def _check_numbers(values: Sequence[Any]) -> None:
    """TypeError unless each is a number or None."""
    if not all(value is None or isinstance(value, int | float) for value in values):
        raise TypeError(f"got {values}, expected numbers")


@contextmanager
def _fields(path: Path, expected: str) -> Iterator[None]:
    """Inside, fields of a JSON are looked up: one that is missing or of another kind is an InputError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}), expected {expected}") from None


@dataclass(frozen=True)
class Training:
    """The rules that evaluated one training in one results folder, argmax first. place: its run, below the output."""

    folder: Path
    config: dict
    iteration: int
    metric: str
    results: tuple[EvalResult, ...]
    temperature: float = 1.0  # of the evaluation
    place: str = ""
    test: Mapping[str, Any] = field(default_factory=dict)  # how it was evaluated
    content: Mapping[str, Any] = field(default_factory=dict)  # of the JSON of argmax
    apart: tuple[str, ...] = ()  # the folder's other rules, with what differs in their evaluation

    @cached_property
    def name(self) -> str:
        if "maps" in self.content:
            return f"maps in {Path(self.content['maps']['prob_dir']).name}"
        groups = ("model", "data", "loss") if self.is_trained else ("data",)
        parts = ["true probabilities"] if self.is_true else []
        if PUBLISHED in self.config:
            network = self.config[PUBLISHED]
            words = (network["source"], network.get("architecture"), PurePath(network["weights"]).name)
            parts = [" ".join(word for word in words if word)]
        parts += [self.config[group]["name"] for group in groups]
        fold, noise = (self.config["data"].get(key) for key in ("fold", "label_noise"))
        parts += [] if fold is None else [f"fold {fold}"]
        parts += [] if noise is None else [f"label noise {noise:g}"]
        return ", ".join([*parts, *([] if self.temperature == 1 else ["after temperature scaling"])])

    @property
    def long_name(self) -> str:
        return f"{self.name}, {self.iteration} iterations" if self.is_trained else self.name

    @property
    def rules(self) -> tuple[str, ...]:
        """All of them, argmax first."""
        return tuple(result.rule for result in self.results)

    @property
    def unit(self) -> str:
        """What is scored each: an image or, where images are slices of volumes, a case."""
        return "image" if self.results[0].cases is None else "case"

    def unit_scores(self, rule: str, metric: str) -> tuple[tuple[str, ...], np.ndarray]:
        """The names of the N images (cases), and their scores under a rule, (N,) in percent; NaN where undefined."""
        result = self.results[self.rules.index(rule)]
        if result.cases is None:
            return result.names, image_scores(result.counts)[metric]
        names, scores = case_scores(result.counts, result.cases)
        return names, scores[metric]

    def unit_gains(self, rule: str, metric: str) -> np.ndarray:
        """What a rule gains over argmax by a metric, per image (case); NaN where the score is undefined."""
        return unit_differences(self.results[0], self.results[self.rules.index(rule)], metric)

    @property
    def is_true(self) -> bool:
        """Whether the probabilities are those from which the labels were drawn."""
        return self.content.get("probabilities") == "true"

    @property
    def is_trained(self) -> bool:
        """Whether `config` is that of a training: of no network of others, true probabilities or other maps."""
        return "model" in self.config

    @property
    def title(self) -> str:
        if not self.is_trained:
            return self.name
        return f"{self.name}, seed {self.config['seed']}, {self.iteration} iterations"

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Every further rule beside argmax: by the metric of an image (case), of a volume in 3D, of the data set, and
        by the accuracy of all pixels."""
        base, *others = self.results
        return *compare_rules(self.results, self.metric), *(compare_pooled(base, other, "Acc") for other in others)

    @cached_property
    def calibration(self) -> dict | None:
        """calibration.json of this evaluation; None where there is none. One that is damaged is told."""
        path, content = self.folder / CALIBRATION, None
        with passing_over():
            if path.is_file():
                content = read_calibration(path)
        return None if content is None or differences(content, self.content) else content

    @cached_property
    def fit(self) -> dict | None:
        """temperature.json of these weights; None where there is none. One that is damaged is told."""
        path, content = self.folder / "temperature.json", None
        with passing_over():
            if path.is_file():
                content = read_fit(path)
        own = self.content.get("weights_checksum")
        return None if content is None or content.get("weights_checksum") != own else content

    @cached_property
    def panels(self) -> dict[str, Path]:
        """The pictures of --save_pred by "<kind>-<number>"; none of another evaluation."""
        folder, origin = self.folder.parent / "pictures", {}
        record = folder.with_name("pictures.json")
        with passing_over():
            origin = read_json(record, "what the pictures are made from") if record.is_file() else {}
        if any(differences(rule, self.content) for rule in origin.get("rules", [])):
            return {}
        return {f"{kind}-{i}": path for kind in KINDS for i, path in enumerate(sorted((folder / kind).glob("*.png")))}

    @property
    def losses(self) -> list[Comparison]:
        """Where a rule stays below argmax with its whole interval."""
        return [c for c in self.comparisons if c.interval is not None and c.interval[1] < 0]

    @property
    def unseeded(self) -> tuple:
        """What trainings that differ in their seed alone have in common."""
        config = {key: value for key, value in self.config.items() if key != "seed"}
        test = {**self.test, "metric": self.metric, "temperature": self.temperature == 1}  # fitted: differs by seed
        return json.dumps([config, test], sort_keys=True), self.rules, self.results[0].names, self.iteration


def _order(training: Training) -> tuple:
    seed = training.config["seed"]
    return not training.is_trained, training.name, training.iteration, seed, len(training.place), training.place


def group_seeds(trainings: Iterable[Training]) -> list[list[Training]]:
    """Trainings that differ in their seed alone, together; of several evaluations of one seed the first."""
    groups: dict[tuple, dict[int, Training]] = {}
    for training in trainings:
        groups.setdefault(training.unseeded, {}).setdefault(training.config["seed"], training)
    return [list(group.values()) for group in groups.values()]


def compare_seeds(trainings: Sequence[Training], rule: str) -> Comparison:
    """Trainings of several seeds -> a rule beside argmax by their metric, over the images (cases).

    Each one's gain is averaged over the seeds, where the score is defined in all of them.
    """

    def mean_gains(metric: str) -> np.ndarray:
        values = np.mean([training.unit_gains(rule, metric) for training in trainings], axis=0)
        return values[~np.isnan(values)]

    metric = trainings[0].metric
    values = mean_gains(metric)
    difference, wins, losses = (float(values.mean()) if len(values) else None), (values > 0).sum(), (values < 0).sum()
    alike = ("argmax", metric, trainings[0].unit, len(values))
    losing = {name: share_losing(mean_gains(name)) for name in losing_names(metric)} if len(values) else None
    interval = mean_interval(values)
    return Comparison(rule, *alike, difference, interval, wins=int(wins), losses=int(losses), losing=losing)


def mean_score(trainings: Sequence[Training], rule: str, name: str) -> float:
    """The mean of a rule's score over several trainings, in percent."""
    results = [training.results[training.rules.index(rule)] for training in trainings]
    return float(np.mean([compute_scores(r.counts, r.cases)[name] for r in results]))
