"""The results section of a README, between two marks, from what was measured below a folder."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from exp.evaluation.comparison import Comparison
from exp.files.atomic import write_atomically
from exp.files.text import read_text
from exp.reproduction.measured import Training, compare_seeds, seed_scores
from exp.reproduction.report.formats import format_gain, markdown_table
from exp.reproduction.report.sections import Trainings, group_seeds
from exp.reproduction.report.series import LENGTH, Series, find_losses
from exp.runtime.errors import InputError

BEGIN = "<!-- results: written by `python scripts/report.py OUTPUT --readme README.md`; do not edit -->"
WIDTH = 120  # of lines of text
END = "<!-- end of results -->"


def update_readme(path: Path, lead: str, trainings: Trainings) -> None:
    """Write `lead` and the results between the marks in the file; InputError if it has not both, once each."""
    text = read_text(path, "a README with marks for results")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"{path}: got no place for results, expected the lines {BEGIN!r} and {END!r}, once each")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    write_atomically(path, f"{before}{BEGIN}\n\n{results_section(lead, trainings)}\n{END}{after}")


def results_section(lead: str, trainings: Trainings) -> str:
    """Markdown: `lead`, rules beside argmax, by length and noise, and every loss."""
    series = trainings.series
    lone = _in_noise(series) | _shorter(series)
    groups = [g for g in group_seeds(trainings.others) if id(g[0]) not in lone and len(g[0].results) > 1]
    parts = [textwrap.fill(lead, WIDTH, break_long_words=False) + "\n"]
    for _, same in groupby(sorted(groups, key=_judged, reverse=True), key=_judged):
        parts += _rules_table(list(same))
    for one in series:
        parts += _series_table(one)
    return "\n".join([*parts, *_losses(trainings)])


def _in_noise(series: Sequence[Series]) -> set[int]:
    return {id(t) for one in series if one.label != LENGTH for step in one.steps for t in step.trainings}


def _shorter(series: Sequence[Series]) -> set[int]:
    """Trainings that are not the longest of theirs."""
    return {id(t) for one in series if one.label == LENGTH for step in one.steps[:-1] for t in step.trainings}


def _judged(group: Sequence[Training]) -> tuple[str, bool]:
    """The metric that trainings are judged by, and whether their images are slices of cases."""
    return group[0].metric, group[0].results[0].cases is not None


def _rules_table(groups: Sequence[Sequence[Training]]) -> list[str]:
    """Groups of seeds, judged alike -> a row a rule."""
    metric, cased = _judged(groups[0])
    names = [metric, f"{metric[:-1]}D", *([f"{metric[:-1]}3D"] if cased else []), "Acc"]
    rows = []
    for group in groups:
        seeds = f"{len(group)} seeds" if len(group) > 1 else "one seed"
        title = f"{_title(group)}, {seeds}"
        for number, rule in enumerate(result.rule for result in group[0].results):
            scores = [f"{np.mean(seed_scores(group, rule, name)):.2f}" for name in names]
            gain = _gain_cells(group, rule) if number else ["", ""]
            rows.append([title if number == 0 else "", rule, *scores, *gain])
    unit = "volumes" if cased else "images"
    return [markdown_table(["training", "rule", *names, f"{metric} against argmax", f"{unit} better / worse"], rows)]


def _gain_cells(group: Sequence[Training], rule: str) -> list[str]:
    found = compare_seeds(group, rule)
    return [format_gain(found.mean, found.interval), f"{found.wins} / {found.losses}"]


def _series_table(series: Series) -> list[str]:
    """What varies -> a row a value and source: argmax -> RankSEG-RMA in each score, and the gain by the metric."""
    metric = series.training.metric
    names = (metric, f"{metric[:-1]}D", "Acc")
    rows = []
    for step in series.steps:
        for rule in (rule for rule in step.rules if rule in ("rankseg_rma", "rankseg_exact")):
            pairs = [f"{step.score('argmax', name):.2f} -> {step.score(rule, name):.2f}" for name in names]
            found = step.gain(rule)
            gain = [format_gain(found.mean, found.interval), f"{found.wins} / {found.losses}"]
            rows.append([f"{step.value:g}", step.source or str(len(step.trainings)), rule, *pairs, *gain])
    second = "probabilities" if series.steps[0].source else "seeds"
    header = [series.label, second, "rule", *names, f"{metric} against argmax", "better / worse"]
    return [f"{series.title}:\n", markdown_table(header, rows)]


def _losses(trainings: Trainings) -> list[str]:
    """Every loss with its whole interval below zero: a row a training and score, with the largest."""
    rows = []
    for group in group_seeds(trainings.all_others):
        found: dict[str, list[Comparison]] = {}
        for loss in (loss for training in group for loss in find_losses(training)):
            found.setdefault(loss.metric, []).append(loss)
        for name, losses in found.items():
            rules = Counter(loss.rule for loss in losses)
            listed = [rule if len(group) == 1 else f"{rule} ({n} of {len(group)} seeds)" for rule, n in rules.items()]
            worst = min(losses, key=lambda loss: loss.difference)
            largest = f"{format_gain(worst.difference, worst.interval)}, {worst.rule}"
            rows.append([_title(group), name, ", ".join(listed), largest])
    if not rows:
        return ["No rule loses anything against argmax with its whole interval below zero.\n"]
    header = ["training", "score", "rules that lose", "the largest loss"]
    return ["Losses against argmax, the whole interval below zero:\n", markdown_table(header, rows)]


def _title(group: Sequence[Training]) -> str:
    return group[0].name if group[0].is_true else f"{group[0].name}, {group[0].iteration} iterations"
