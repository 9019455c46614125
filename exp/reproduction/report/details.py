"""What the page alone says of a training: the classes, the images that lose, the calibration."""

import numpy as np

from exp.evaluation.calibration import calibration_unit
from exp.evaluation.comparison import LEVEL, LOSING_POINTS, class_differences, losing_names, mean_interval
from exp.evaluation.metrics import unit_class_scores
from exp.files.paths import flat_names
from exp.reproduction.measured import Training
from exp.reproduction.report.sections import NOTHING, Cell, Section, format_interval, format_number, text_rows

ERRORS = ("ECED", "ECEI", "SCED", "SCEI", "SCED_paper", "SCEI_paper")


def training_details(key: str, training: Training) -> tuple[Section, ...]:
    """A training -> its tables that stand on the page alone. key: that of its section."""
    parts = [_classes(key, training)]
    if len(training.results) > 1:
        parts += [_count_losing(key, training), _list_losing(key, training)]
    return *parts, *_calibration(key, training)


def _classes(key: str, training: Training) -> Section:
    """A row per class: its share of the pixels, its score under argmax, what every rule gains."""
    base, score = training.results[0], training.metric[1:-1]  # IoU of mIoUI
    scores = unit_class_scores(base.counts, base.cases)[score]
    gains = {r.rule: class_differences(base, r, score) for r in training.results[1:]}
    pixels = (base.counts[:, 0] + base.counts[:, 2]).sum(0)
    rows = []
    for i, name in enumerate(base.classes):
        own = scores[:, i][~np.isnan(scores[:, i])]
        share = format_number(100 * pixels[i] / max(1, pixels.sum()))
        facts = (name, share, str(len(own)), format_number(own.mean() if len(own) else None))
        rows.append((*map(Cell, facts), *(_gain(values[:, i]) for values in gains.values())))
    unit = training.unit
    facts = ("class", "% of pixels", f"{unit}s", f"{score}C, argmax, %")
    header = (*facts, *(f"{rule} - argmax, points" for rule in gains))
    lead = f"{score}C: the mean of the {score} over the {unit}s that have the class."
    if gains:
        lead += (
            f" Gains over argmax on the same {unit}s, with {LEVEL:.0%} intervals (bootstrap over {unit}s); in colour "
            "where the whole interval is on one side of zero."
        )
    return Section(f"{key}-classes", "", "Classes", header, tuple(rows), lead)


def _gain(values: np.ndarray) -> Cell:
    """(N,) differences of a class, NaN where it is not active -> their mean and its interval."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Cell(NOTHING)
    interval = mean_interval(values)
    low, high = interval or (0, 0)
    tone = "gain" if low > 0 else "loss" if high < 0 else ""
    return Cell(f"{values.mean():+.2f} {format_interval(interval)}", tone=tone)


def _count_losing(key: str, training: Training) -> Section:
    """A row per rule and score: how many images (cases) lose more than 1 and 5 points, and the largest loss."""
    rows, unit = [], training.unit
    for rule in training.rules[1:]:
        for name in losing_names(training.metric):
            gains = training.unit_gains(rule, name)
            gains = gains[~np.isnan(gains)]
            counts = [f"{n} ({100 * n / max(1, len(gains)):.1f} %)" for n in _losing(gains)]
            rows.append((rule, name, str(len(gains)), *counts, f"{gains.min():+.2f}" if (gains < 0).any() else NOTHING))
    header = ("rule", "score", f"{unit}s", *(f"lose > {points}" for points in LOSING_POINTS), "largest loss, points")
    lead = f"How many {unit}s lose more than {' and '.join(map(str, LOSING_POINTS))} points against argmax."
    return Section(f"{key}-losing", "", f"{unit.capitalize()}s that lose", header, text_rows(rows), lead)


def _losing(gains: np.ndarray) -> list[int]:
    return [int((gains < -points).sum()) for points in LOSING_POINTS]


def _list_losing(key: str, training: Training) -> Section:
    """A row per image (case) that loses more than 1 point under any rule, the largest loss first."""
    names, scores = training.unit_scores("argmax", training.metric)
    gains = np.stack([training.unit_gains(rule, training.metric) for rule in training.rules[1:]], 1)
    worst, links = np.nan_to_num(gains).min(1), _link_panels(key, training)
    rows = []
    for i in np.argsort(worst, kind="stable"):
        if worst[i] < -LOSING_POINTS[0]:
            cells = [Cell(names[i], link=links.get(names[i], "")), Cell(format_number(scores[i]))]
            rows.append((*cells, *map(_difference, gains[i].tolist())))
    unit, few, many = training.unit, *LOSING_POINTS
    header = (unit, f"{training.metric}, argmax, %", *(f"{rule} - argmax, points" for rule in training.rules[1:]))
    lead = (
        f"By {training.metric}, every {unit} that loses more than {few} point under any rule, the largest loss first; "
        f"losses above {few} in colour, above {many} bold. Names lead to the pictures, where there is one."
    )
    if not rows:
        header, lead = (), f"No {unit} loses more than {few} point of {training.metric} under any rule."
    return Section(f"{key}-losing-names", "", f"Which {unit}s lose", header, tuple(rows), lead)


def _difference(value: float) -> Cell:
    few, many = LOSING_POINTS
    tone = "heavy" if value < -many else "loss" if value < -few else ""
    return Cell(NOTHING if np.isnan(value) else f"{value:+.2f}", tone=tone)


def _link_panels(key: str, training: Training) -> dict[str, str]:
    """Names of images (cases) -> the key of the first picture of --save_pred that shows them."""
    result = training.results[0]
    units = dict(zip(flat_names(result.names), result.cases or result.names))
    links: dict[str, str] = {}
    for panel, path in training.panels.items():
        unit = units.get(path.stem.partition("_")[2])  # 00_<name>
        if unit is not None:
            links.setdefault(unit, f"{key}-{panel}")
    return links


def _calibration(key: str, training: Training) -> list[Section]:
    """Calibration errors of the evaluation, and before and after a temperature that was fitted; none without either."""
    rows = []
    if training.calibration is not None:
        errors = training.calibration["metrics"]
        what = f"all pixels of the evaluation, temperature {training.temperature:.4g}"
        rows.append((what, NOTHING, *(format_number(errors.get(name)) for name in ERRORS)))
    if training.fit is not None:
        temperatures = {"before": "temperature 1", "after": f"temperature {training.fit['temperature']:.4g}"}
        for part, title in (("held_out", "held out"), ("fitted_on", "fitted on")):
            for when, temperature in temperatures.items():
                found = training.fit[part][when]
                what = f"{training.fit[part]['pixels']} pixels {title}, {temperature}"
                errors = (format_number(found.get(name)) for name in ERRORS)
                rows.append((what, f"{found['NLL']:.4f}", *errors))
    if not rows:
        return []
    header = ("pixels", "NLL, nats", *(f"{name}, {calibration_unit(name)}" for name in ERRORS))
    lead = (
        "ECE: expected calibration error of the top label; SCE: of every class; D: over all pixels, I: image by image. "
        "NLL: negative log-likelihood. The names with _paper are the SCE of the paper's code."
    )
    return [Section(f"{key}-calibration", "", "Calibration", header, text_rows(rows), lead)]
