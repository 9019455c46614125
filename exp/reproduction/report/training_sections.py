"""Sections of trainings: the rules of all beside argmax, what these lose, and each training alone."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import PurePosixPath

from exp.evaluation.comparison import Comparison
from exp.evaluation.metrics import compute_scores
from exp.reproduction.measured import Training, compare_seeds, group_seeds, mean_score
from exp.reproduction.report.details import training_details
from exp.reproduction.report.sections import Section, format_gain, text_rows

SCORES = ("Acc", "mIoUI", "mIoUC", "mIoUD", "mDiceI", "mDiceD", "mDice3D")
OTHERS, PAPER = "Other trainings", "Trainings of these tables"
TRUE_NOTE = (
    "Under true probabilities a rule is evaluated on those from which the labels were drawn: the best that any network "
    "could give it. With two classes rankseg_exact is the Bayes decision for the image's Dice."
)


def paper_sections(paper: Sequence[Training]) -> list[Section]:
    """A section per training of the paper's tables, of seed 0 and fold 0."""
    shown = [t for t in paper if t.config["seed"] == 0 and t.config["data"].get("fold") in (None, 0)]
    return _each_alone("paper", PAPER, shown)


def other_sections(others: Sequence[Training]) -> list[Section]:
    """Of trainings that the paper has no table of: all together, then each alone."""
    return [*overview_sections(others), *_each_alone("training", OTHERS, others)]


def overview_sections(others: Sequence[Training]) -> list[Section]:
    """Rules beside argmax, with a section per metric, and every loss; none without trainings."""
    groups = [group for group in group_seeds(others) if len(group[0].results) > 1]
    if not groups:
        return []
    alike = groupby(sorted(groups, key=_evaluated_by, reverse=True), key=_evaluated_by)
    rules = [_rules_section(f"rules-{i}", list(same)) for i, (_, same) in enumerate(alike)]
    return [*rules, _losses_section(groups)]


def _evaluated_by(group: Sequence[Training]) -> tuple[str, str]:
    return group[0].metric, group[0].unit


def _each_alone(key: str, group: str, trainings: Sequence[Training]) -> list[Section]:
    titles = [training.title for training in trainings]
    sections = []
    for i, (title, training) in enumerate(zip(titles, trainings)):
        if title in titles[:i]:  # a further evaluation: told by its folder
            title += f" ({PurePosixPath(training.place).parent.name})"
        sections.append(training_section(f"{key}-{i}", group, title, training))
    return sections


def training_section(key: str, group: str, title: str, training: Training) -> Section:
    """A training -> one row per rule: scores, gains over argmax with their intervals, units better and worse."""
    scores = {r.rule: compute_scores(r.counts, r.cases) for r in training.results}
    columns = [name for name in SCORES if name in scores["argmax"]]
    compared = list(dict.fromkeys(c.metric for c in training.comparisons))
    rows = []
    for rule, values in scores.items():
        own = {c.metric: c for c in training.comparisons if c.rule == rule}
        gains = [format_gain(own[name]) if own else "" for name in compared]
        rows.append((rule, *(f"{values[name]:.2f}" for name in columns), *gains, *_units(own.get(training.metric))))
    header = ("rule", *columns, *(f"{name} against argmax" for name in compared), *_units_header(training.unit))
    notes = [f"From `{training.place}`."]
    if training.apart:
        notes.append(f"Evaluated otherwise than argmax, and not compared with it: {'; '.join(training.apart)}.")
    details = training_details(key, training)
    return Section(key, group, title, header, text_rows(rows), notes=tuple(notes), details=details, source=training)


def run_section(training: Training) -> Section:
    """A run on a page of its own."""
    return training_section("run", "Rules side by side", "Scores in percent, and gains over argmax in points", training)


def describe_run(training: Training) -> str:
    """What stands above that page."""
    result, others = training.results[0], training.rules[1:]
    cases = "" if result.cases is None else f" in {len(set(result.cases))} volumes"
    compared = f" and {', '.join(others)}, compared by {training.metric}" if others else ""
    return f"{len(result.names)} images{cases} of {len(result.classes)} classes under argmax{compared}."


def _units_header(unit: str) -> tuple[str, str]:
    return f"{unit}s up / down", "% lose > 1 / 5: IoU, Dice"  # short: LaTeX has one landscape page for it


def _units(comparison: Comparison | None) -> tuple[str, str]:
    """Units better and worse, and the shares that lose so many points; nothing for argmax itself."""
    if comparison is None:
        return "", ""
    shares = (" / ".join(f"{v:.1f}" for v in values.values()) for values in (comparison.losing or {}).values())
    return f"{comparison.wins} / {comparison.losses}", ", ".join(shares)


def _rules_section(key: str, groups: Sequence[Sequence[Training]]) -> Section:
    """Groups of seeds, evaluated alike -> one row per rule."""
    metric, unit = _evaluated_by(groups[0])
    unit = "volume" if unit == "case" else unit
    names = (metric, f"{metric[:-1]}D", *([f"{metric[:-1]}3D"] if unit == "volume" else []), "Acc")
    rows, is_seeded = [], any(len(group) > 1 for group in groups)
    for group in groups:
        seeds = f"{len(group)} seeds" if len(group) > 1 else "one seed"
        title = f"{group[0].long_name}, {seeds}" if group[0].is_trained else group[0].name
        for rule in group[0].rules:
            gain = None if rule == "argmax" else compare_seeds(group, rule)
            scores = (f"{mean_score(group, rule, name):.2f}" for name in names)
            row = ["" if gain else title, rule, *scores, format_gain(gain) if gain else "", *_units(gain)]
            rows.append([*row, _seed_gains(group, rule)] if is_seeded else row)
    header = ("training", "rule", *names, f"{metric} against argmax", *_units_header(unit))
    header += ("gain of each seed",) if is_seeded else ()
    has_true, title = any(group[0].is_true for group in groups), f"Rules beside argmax, by {metric} over {unit}s"
    return Section(key, OTHERS, title, header, text_rows(rows), notes=(TRUE_NOTE,) if has_true else ())


def _seed_gains(group: Sequence[Training], rule: str) -> str:
    """What a rule gains over argmax by the metric in each training; nothing for one seed or argmax itself."""
    if len(group) == 1 or rule == "argmax":
        return ""
    pairs = [[mean_score([t], name, t.metric) for name in ("argmax", rule)] for t in group]
    return " ".join(f"{second - first:+.2f}" for first, second in pairs)


def _losses_section(groups: Sequence[Sequence[Training]]) -> Section:
    """Every loss with its whole interval below zero: one row per training and score, with the largest."""
    rows = []
    for group in groups:
        losses = [loss for training in group for loss in training.losses]
        for name in dict.fromkeys(loss.metric for loss in losses):
            found = [loss for loss in losses if loss.metric == name]
            rules = Counter(loss.rule for loss in found)
            listed = [rule if len(group) == 1 else f"{rule} ({n} of {len(group)} seeds)" for rule, n in rules.items()]
            worst = min(found, key=lambda loss: loss.difference)
            rows.append((group[0].long_name, name, ", ".join(listed), f"{format_gain(worst)}, {worst.rule}"))
    header, notes = ("training", "score", "rules that lose", "the largest loss"), ()
    if not rows:
        header, notes = (), ("No rule loses anything against argmax with its whole interval below zero.",)
    title = "Losses against argmax, the whole interval below zero"
    return Section("losses", OTHERS, title, header, text_rows(rows), notes=notes)
