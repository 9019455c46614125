"""Sections of trainings: each alone, and what several say together over seeds, lengths and noise."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from scipy import stats

from exp.evaluation.comparison import Comparison
from exp.evaluation.metrics import compute_scores
from exp.reproduction.measured import LENGTH, Training, compare_seeds, mean_score, seed_gains, seed_scores
from exp.reproduction.report.sections import Line, Section, format_gain, text_rows
from exp.reproduction.report.trainings import Series, Trainings, group_seeds, training_titles

SCORES = ("Acc", "mIoUI", "mIoUC", "mIoUD", "mDiceI", "mDiceD", "mDice3D")
MAIN_RULES = ("rankseg_rma", "rankseg_exact")  # those of a README's series
OTHERS, PAPER = "Other trainings", "Trainings of these tables"


def paper_sections(trainings: Trainings) -> list[Section]:
    """A section per training of the paper's tables, of seed 0 and fold 0."""
    shown = [t for t in trainings.paper if t.config["seed"] == 0 and t.config["data"].get("fold") in (None, 0)]
    return _each_alone("paper", PAPER, shown)


def other_sections(trainings: Trainings) -> list[Section]:
    """Of trainings that the paper has no table of: all together, then seeds, then each alone."""
    seeds = [seed_section(f"seeds-{i}", group) for i, group in enumerate(trainings.seeded)]
    return [*overview_sections(trainings), *seeds, *_each_alone("training", OTHERS, trainings.all_others)]


def overview_sections(trainings: Trainings, main_rules: bool = False) -> list[Section]:
    """Rules beside argmax, by length and noise, and every loss; none without trainings.

    main_rules: series have RankSEG-RMA and the exact rule alone.
    """
    if not any(len(training.results) > 1 for training in trainings.all_others):
        return []
    series = [series_section(f"series-{i}", one, main_rules) for i, one in enumerate(trainings.series)]
    return [*rules_sections(trainings), *series, losses_section(trainings)]


def _each_alone(key: str, group: str, trainings: Sequence[Training]) -> list[Section]:
    titles = training_titles(trainings)
    return [training_section(f"{key}-{i}", group, title, t) for i, (title, t) in enumerate(zip(titles, trainings))]


def training_section(key: str, group: str, title: str, training: Training) -> Section:
    """A training -> one row per rule: scores, gains over argmax with their intervals, units better and worse."""
    scores = {r.rule: compute_scores(r.counts, r.cases) for r in training.results}
    columns = [name for name in SCORES if name in scores["argmax"]]
    compared = list(dict.fromkeys(c.metric for c in training.comparisons))
    rows, lines = [], []
    place = ("paper" if group == PAPER else "other", title, training.config["data"]["name"])
    for rule, values in scores.items():
        own = {c.metric: c for c in training.comparisons if c.rule == rule}
        gains = [format_gain(own[name]) if own else "" for name in compared]
        rows.append((rule, *(f"{values[name]:.2f}" for name in columns), *gains, _wins(own.get(training.metric))))
        lines += [Line(*place, name, rule, None, values[name]) for name in columns]
    lines += [_gain_line(place, c) for c in training.comparisons]
    header = ("rule", *columns, *(f"{name} against argmax" for name in compared), f"{training.unit}s better / worse")
    notes = (*([loss_note(training)] if compared else []), f"From `{training.place}`.")
    return Section(key, group, title, header, text_rows(rows), notes=notes, lines=tuple(lines), source=training)


def _wins(comparison: Comparison | None) -> str:
    """Units better and worse; nothing for argmax itself."""
    return f"{comparison.wins} / {comparison.losses}" if comparison else ""


def _gain_line(place: tuple[str, str, str], c: Comparison) -> Line:
    return Line(*place, c.metric, f"{c.rule} - argmax", None, c.difference, c.interval)


def loss_note(training: Training) -> str:
    """Where a rule loses to argmax, in a sentence."""
    if not training.losses:
        names = list(dict.fromkeys(c.metric for c in training.comparisons))
        listed = f"{', '.join(names[:-1])} or {names[-1]}"
        return f"No rule loses {listed} against argmax with its whole interval below zero."
    parts = []
    for rule, losses in groupby(sorted(training.losses, key=lambda c: c.rule), key=lambda c: c.rule):
        parts.append(f"{rule} " + ", ".join(f"{c.metric} {format_gain(c)}" for c in losses))
    return f"Losses against argmax, the whole interval below zero: {'; '.join(parts)}."


def seed_section(key: str, group: Sequence[Training]) -> Section:
    """Trainings of several seeds -> one row per rule: its score, and its gains over seeds and images."""
    metric, units = group[0].metric, f"{group[0].unit}s"
    rows = []
    for rule in group[0].rules:
        scores = seed_scores(group, rule, metric)
        row = [rule, f"{np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f}"]
        if rule == "argmax":
            rows.append([*row, *[""] * 6])
            continue
        gains, found = seed_gains(group, rule), compare_seeds(group, rule)
        row += [f"{np.mean(gains):+.2f} ± {np.std(gains, ddof=1):.2f}", " ".join(f"{gain:+.2f}" for gain in gains)]
        row += [f"{stats.ttest_1samp(gains, 0).pvalue:.2g}"]
        rows.append([*row, format_gain(found), _wins(found), f"{found.p_value:.2g}"])
    title = f"{group[0].long_name}: seeds {', '.join(str(t.config['seed']) for t in group)}"
    header = ("rule", metric, "gain over seeds", "gain per seed", "p over seeds")
    header += (f"gain over {units}", "better / worse", f"p over {units}")
    note = (
        f"{metric}, gains over argmax; ± is the standard deviation over the seeds. Over seeds: the paired t-test, n = "
        f"{len(group)} seeds. Over {units}: each one's gain averaged over the seeds, Wilcoxon's signed-rank test and "
        f"the interval, n = {found.num_units} {units} (the same in all seeds)."
    )
    lines = tuple(_mean_lines(title, group, (metric,)))
    return Section(key, OTHERS, title, header, text_rows(rows), notes=(note,), lines=lines)


def _mean_lines(title: str, group: Sequence[Training], names: Sequence[str]) -> Iterator[Line]:
    """Lines of seeds together: scores of every rule, and gains over argmax by the metric."""
    place = ("other", title, group[0].config["data"]["name"])
    for rule in group[0].rules:
        yield from (Line(*place, name, rule, None, mean_score(group, rule, name)) for name in names)
        if rule != "argmax":
            yield _gain_line(place, compare_seeds(group, rule))


def rules_sections(trainings: Trainings) -> list[Section]:
    """All trainings but the shorter and the noisy, which series have: seeds together, one section per metric."""
    steps = [(series, step) for series in trainings.series for step in series.steps]
    lone = {id(t) for series, step in steps if series.label != LENGTH or step is not series.steps[-1]
            for t in step.trainings}  # fmt: skip
    groups = [g for g in group_seeds(trainings.others) if id(g[0]) not in lone and len(g[0].results) > 1]
    alike = groupby(sorted(groups, key=_evaluated_by, reverse=True), key=_evaluated_by)
    return [_rules_section(f"rules-{i}", list(same)) for i, (_, same) in enumerate(alike)]


def _evaluated_by(group: Sequence[Training]) -> tuple[str, str]:
    return group[0].metric, group[0].unit


def _rules_section(key: str, groups: Sequence[Sequence[Training]]) -> Section:
    """Groups of seeds, evaluated alike -> one row per rule."""
    metric, unit = _evaluated_by(groups[0])
    unit = "volume" if unit == "case" else unit
    names = (metric, f"{metric[:-1]}D", *([f"{metric[:-1]}3D"] if unit == "volume" else []), "Acc")
    rows = []
    for group in groups:
        title = f"{group[0].long_name}, {f'{len(group)} seeds' if len(group) > 1 else 'one seed'}"
        for rule in group[0].rules:
            gain = None if rule == "argmax" else compare_seeds(group, rule)
            scores = (f"{mean_score(group, rule, name):.2f}" for name in names)
            rows.append(("" if gain else title, rule, *scores, format_gain(gain) if gain else "", _wins(gain)))
    header = ("training", "rule", *names, f"{metric} against argmax", f"{unit}s better / worse")
    return Section(key, OTHERS, f"Rules beside argmax, by {metric} over {unit}s", header, text_rows(rows))


def series_section(key: str, series: Series, main_rules: bool = False) -> Section:
    """What varies -> one row per value and rule: argmax -> the rule in each score, and the gain by the metric."""
    metric, unit = series.training.metric, series.training.unit
    names, is_sourced = (metric, f"{metric[:-1]}D", "Acc"), series.steps[0].source != ""
    rows, lines = [], []
    for step in series.steps:
        group, value = step.trainings, f"{step.value:g}"
        for rule in (rule for rule in group[0].rules[1:] if rule in MAIN_RULES or not main_rules):
            pairs = [f"{mean_score(group, 'argmax', n):.2f} -> {mean_score(group, rule, n):.2f}" for n in names]
            found = compare_seeds(group, rule)
            rows.append((value, step.source or str(len(group)), rule, *pairs, format_gain(found), _wins(found)))
        source = f", {step.source} probabilities" if is_sourced else ""
        lines += _mean_lines(f"{series.title}, {series.label} {value}{source}", group, names)
    header = (series.label, "probabilities" if is_sourced else "seeds", "rule", *names)
    header += (f"{metric} against argmax", f"{unit}s better / worse")
    notes = []
    if series.label == LENGTH:
        notes.append("Each length is a training of its own, with a schedule of that length.")
    if any(len(step.trainings) > 1 for step in series.steps):
        counts = ", ".join(f"{step.value:g}: {len(step.trainings)}" for step in series.steps)
        notes.append(f"Scores and each {unit}'s gain are means over the seeds ({counts}).")
    if is_sourced:
        notes.append(
            "Under true probabilities a rule is evaluated on those from which the labels were drawn: the best that any "
            "network could give it. With two classes rankseg_exact is the Bayes decision for the image's Dice."
        )
    return Section(key, OTHERS, series.title, header, text_rows(rows), notes=tuple(notes), lines=tuple(lines),
                   source=series)  # fmt: skip


def losses_section(trainings: Trainings) -> Section:
    """Every loss with its whole interval below zero: one row per training and score, with the largest."""
    rows = []
    for group in group_seeds(trainings.all_others):
        losses = [loss for training in group for loss in training.losses]
        for name in dict.fromkeys(loss.metric for loss in losses):
            found = [loss for loss in losses if loss.metric == name]
            rules = Counter(loss.rule for loss in found)
            listed = [rule if len(group) == 1 else f"{rule} ({n} of {len(group)} seeds)" for rule, n in rules.items()]
            worst = min(found, key=lambda loss: loss.difference)
            rows.append((group[0].long_name, name, ", ".join(listed), f"{format_gain(worst)}, {worst.rule}"))
    title = "Losses against argmax, the whole interval below zero"
    if not rows:
        note = "No rule loses anything against argmax with its whole interval below zero."
        return Section("losses", OTHERS, title, (), (), notes=(note,))
    return Section(
        "losses", OTHERS, title, ("training", "score", "rules that lose", "the largest loss"), text_rows(rows)
    )
