"""Trainings of which the paper has no table, and what they say together, as tables of text."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath

import numpy as np

from exp.evaluation.comparison import Comparison
from exp.evaluation.metrics import compute_scores
from exp.reproduction.measured import Measured, Training, compare_seeds, seed_scores
from exp.reproduction.plans import ALL, table_jobs
from exp.reproduction.report.formats import format_gain
from exp.reproduction.report.series import LENGTH, Series, Step, find_losses, find_series

SCORES = ("Acc", "mIoUI", "mIoUC", "mIoUD", "mDiceI", "mDiceD", "mDice3D")


@dataclass(frozen=True)
class Section:
    """A table under a title, with notes below it. key: unlike any other's, for links."""

    key: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trainings:
    """What lies below a folder: trainings that belong to no table of the paper, by name, length and seed (`others`),
    those of its tables (`paper`), and rules judged on true probabilities (`true_maps`)."""

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
    for digest, trainings in measured.trainings():
        found[digest in digests].extend(trainings)
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
    """A title each; further evaluations of one training have the names of their folders in it."""
    titles: list[str] = []
    for training in trainings:
        folder = PurePosixPath(training.place).parent.name
        titles.append(f"{training.title} ({folder})" if training.title in titles else training.title)
    return titles


def joint_sections(trainings: Trainings) -> list[Section]:
    """What several trainings say together: over seeds, by length, by noise."""
    seeded = [seed_section(f"seeds-{i}", group) for i, group in enumerate(trainings.seeded)]
    return seeded + [series_section(f"series-{i}", series) for i, series in enumerate(trainings.series)]


def training_section(key: str, title: str, training: Training) -> Section:
    """A training -> a row a rule: scores, gains over argmax with their intervals, units better and worse."""
    scores = {r.rule: compute_scores(r.counts, r.cases) for r in training.results}
    columns = [name for name in SCORES if name in scores["argmax"]]
    compared = list(dict.fromkeys(c.metric for c in training.comparisons))
    rows = []
    for result in training.results:
        own = {c.metric: c for c in training.comparisons if c.rule == result.rule}
        gains = [format_gain(own[name].difference, own[name].interval) if own else "" for name in compared]
        better = f"{own[training.metric].wins} / {own[training.metric].losses}" if own else ""
        rows.append((result.rule, *(f"{scores[result.rule][name]:.2f}" for name in columns), *gains, better))
    unit = "image" if training.results[0].cases is None else "case"
    head = ("rule", *columns, *(f"{name} against argmax" for name in compared), f"{unit}s better / worse")
    return Section(key, title, head, tuple(rows), (loss_note(training),) if compared else ())


def loss_note(training: Training) -> str:
    """Where a rule loses to argmax, in a sentence."""
    losses = find_losses(training)
    names = list(dict.fromkeys(c.metric for c in training.comparisons))
    if not losses:
        listed = f"{', '.join(names[:-1])} or {names[-1]}"
        return f"No rule loses {listed} against argmax with its whole interval below zero."
    return f"Losses against argmax, the whole interval below zero: {list_losses(losses)}."


def list_losses(losses: Sequence[Comparison]) -> str:
    by_rule = groupby(sorted(losses, key=lambda c: c.rule), key=lambda c: c.rule)
    parts = []
    for rule, group in by_rule:
        parts.append(f"{rule} " + ", ".join(f"{c.metric} {format_gain(c.difference, c.interval)}" for c in group))
    return "; ".join(parts)


def seed_section(key: str, group: Sequence[Training]) -> Section:
    """Trainings of several seeds -> a row a rule: its score, and its gains over seeds and images."""
    metric = group[0].metric
    rows = [("argmax", _seed_scores(group, "argmax"), *[""] * 6)]
    for result in group[0].results[1:]:
        found = compare_seeds(group, result.rule)
        rows.append(
            (
                result.rule,
                _seed_scores(group, result.rule),
                f"{np.mean(found.values):+.2f} ± {np.std(found.values, ddof=1):.2f}",
                " ".join(f"{value:+.2f}" for value in found.values),
                f"{found.seed_p:.2g}",
                format_gain(found.mean, found.interval),
                f"{found.wins} / {found.losses}",
                f"{found.p_value:.2g}",
            )
        )
    unit = "images" if group[0].results[0].cases is None else "cases"
    header = ("rule", metric, "gain over seeds", "gain a seed", "p over seeds")
    header += (f"gain over {unit}", "better / worse", f"p over {unit}")
    seeds = ", ".join(str(t.config["seed"]) for t in group)
    title = f"{group[0].name}, {group[0].iteration} iterations: seeds {seeds}"
    return Section(key, title, header, tuple(rows), (seed_note(group),))


def _seed_scores(group: Sequence[Training], rule: str) -> str:
    """The mean of a rule's score over the seeds, and its standard deviation."""
    values = seed_scores(group, rule, group[0].metric)
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def seed_note(group: Sequence[Training]) -> str:
    """What the table of several seeds compares, and how many of each there are."""
    found = compare_seeds(group, group[0].results[1].rule)
    units = "images" if group[0].results[0].cases is None else "cases"
    return (
        f"{group[0].metric}, gains over argmax; ± is the standard deviation over the seeds. Over seeds: the paired "
        f"t-test, n = {len(group)} seeds. Over {units}: each one's gain averaged over the seeds, Wilcoxon's signed-rank"
        f" test and the interval, n = {found.num_units} {units} (the same in all seeds)."
    )


def series_section(key: str, series: Series) -> Section:
    """What varies -> a row a value and rule: scores, the gain by the metric, units better and worse."""
    family, metric = series.training.metric.removesuffix("I"), series.training.metric
    sourced = any(step.source for step in series.steps)
    unit = "image" if series.training.results[0].cases is None else "case"
    header = (series.label, *(("probabilities",) if sourced else ()), "rule", metric, f"{family}D", "Acc")
    rows = tuple(row for step in series.steps for row in _step_rows(step, (metric, f"{family}D", "Acc"), sourced))
    seeds = {len(step.trainings) for step in series.steps}
    notes = []
    if series.label == LENGTH:
        notes.append("Each length is a training of its own, with a schedule of that length.")
    if seeds != {1}:
        counts = ", ".join(f"{step.value:g}: {len(step.trainings)}" for step in series.steps)
        notes.append(f"Scores and each {unit}'s gain are means over the seeds ({counts}).")
    if sourced:
        notes.append(
            "Under true probabilities a rule is judged on those from which the labels were drawn: the best that any "
            "network could give it. With two classes rankseg_exact is the Bayes decision for the image's Dice."
        )
    return Section(key, series.title, (*header, "gain", f"{unit}s better / worse"), rows, tuple(notes))


def _step_rows(step: Step, names: Sequence[str], sourced: bool) -> Iterator[tuple[str, ...]]:
    for rule in step.rules:
        place = (f"{step.value:g}", *((step.source,) if sourced else ()), rule)
        scores = [f"{step.score(rule, name):.2f}" for name in names]
        if rule == "argmax":
            yield *place, *scores, "", ""
        else:
            found = step.gain(rule)
            yield *place, *scores, format_gain(found.mean, found.interval), f"{found.wins} / {found.losses}"
