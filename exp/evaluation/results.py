"""EvalResult <-> JSON and per-image CSV; calibration and comparisons as JSON; the tables that a run prints."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exp.config.families import METRIC_TABLE
from exp.evaluation.calibration import CONFIDENCE, HITS, PIXELS, calibration_scores
from exp.evaluation.comparison import (
    LEVEL,
    LOSING_POINTS,
    NUM_POOLED_RESAMPLES,
    NUM_RESAMPLES,
    Comparison,
    compare_rules,
)
from exp.evaluation.metrics import EvalResult, case_scores, count_names, image_scores, per_class_scores, split_cases
from exp.files.atomic import move_aside, write_atomically
from exp.files.text import read_text
from exp.runtime.errors import decoding

MAIN_COLUMNS = ("Acc", *(f"m{score}{over}" for score in ("Acc", "IoU", "Dice") for over in "DIC"))
WORST_ENDINGS = ("I5", "I10", "IQ", "C5", "C10", "CQ", "3D")  # of the score by which rules are compared
COMPARISON, CALIBRATION, IMAGES = "comparison.json", "calibration.json", "images.csv"
LOSING_HEADER = " / ".join(f"> {points}" for points in LOSING_POINTS) + " points"
METHOD = (
    f"per unit: rule - base, in percent points. interval: {LEVEL:.0%}, bootstrap over units, BCa, of {NUM_RESAMPLES} "
    f"resamples (D scores: {NUM_POOLED_RESAMPLES}). p_value: Wilcoxon's signed-rank test, two-sided, units without a "
    "difference dropped. p_holm: the same after Holm over the rules. losing: percent of "
    "the units that lose more than so many points"
)


def report_results(
    results: Sequence[EvalResult],
    folder: Path,
    contexts: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    calibration: np.ndarray | None = None,
) -> str:
    """Compare the rules by `metric` (mAccI, mIoUI, mDiceI) and save_results() all -> what a run prints of it."""
    comparisons = compare_rules(results, metric)
    save_results(results, folder, contexts, comparisons=comparisons, calibration=calibration)
    return format_results(results, metric, comparisons, calibration)


def save_results(
    results: Sequence[EvalResult],
    folder: Path,
    contexts: Sequence[Mapping[str, Any]],
    *,
    comparisons: Sequence[Comparison] = (),
    calibration: np.ndarray | None = None,
) -> None:
    """Write <folder>/<rule>.csv and .json per result, with cases <rule>.cases.csv, comparison.json, calibration.json.

    An older evaluation with other rows is kept in older/, and with it the comparison and calibration of those rows.
    contexts: per result, what the JSON says besides the rule and its scores (config, checkpoint, revision, versions).
    calibration: (N, C + 1, 4, num_bins) counts of the images (exp/evaluation/calibration.py).
    """
    folder.mkdir(parents=True, exist_ok=True)
    changed = [_save_rule(result, folder, context) for result, context in zip(results, contexts, strict=True)]
    shared, contents = _shared_without_rule(contexts), {}
    if comparisons:
        rules = [context.get("config", {}).get("predict") for context in contexts]
        rows = [dataclasses.asdict(c) for c in comparisons]
        contents[COMPARISON] = {"comparisons": rows, "method": METHOD, "rules": rules, **shared}
    if calibration is not None:
        contents[CALIBRATION] = {**describe_calibration(calibration, results[0]), **shared}
    for name in (COMPARISON, CALIBRATION):
        path, text = folder / name, _dump(contents[name]) if name in contents else None
        if path.is_file() and (any(changed) if text is None else _figures(path.read_bytes()) != _figures(text)):
            move_aside([path])
        if text is not None:
            write_atomically(path, text)


def _save_rule(result: EvalResult, folder: Path, context: Mapping[str, Any]) -> bool:
    """Write the files of one rule -> True if an older evaluation with other rows was there and is in older/ now."""
    table, cases, scores = (folder / f"{result.rule}.{end}" for end in ("csv", "cases.csv", "json"))
    text = result_csv(result)
    changed = table.is_file() and table.read_bytes() != text.encode()
    if changed:
        move_aside([table, cases, scores])
    write_atomically(table, text)
    if result.cases is not None:
        write_atomically(cases, case_csv(result))
    write_atomically(scores, result_json(result, context))
    return changed


def result_json(result: EvalResult, context: Mapping[str, Any]) -> str:
    counted = int((result.counts[:, :3].sum((1, 2)) > 0).sum())
    by_class = per_class_scores(result.counts, result.cases, result.metrics)
    content = {
        "rule": result.rule,
        "metrics": finite_or_null(result.scores()),
        "images": {"evaluated": len(result.names), "with_counted_pixels": counted},
        **({} if result.cases is None else {"cases": len(set(result.cases))}),
        "per_class": {
            c: finite_or_null({name: v[i] for name, v in by_class.items()}) for i, c in enumerate(result.classes)
        },
        **context,
    }
    return _dump(content)


def describe_calibration(counts: np.ndarray, result: EvalResult) -> dict[str, Any]:
    """ECE and SCE, and for reliability diagrams the pixels, mean confidence and accuracy of every bin."""
    pooled = counts.sum(0)
    return {
        "metrics": finite_or_null(calibration_scores(counts, result.cases)),
        "images": len(counts),
        "top_label": _bin_rows(pooled[-1]),
        "per_class": {name: _bin_rows(pooled[i]) for i, name in enumerate(result.classes)},
    }


def _bin_rows(counts: np.ndarray) -> dict[str, list]:
    """(4, num_bins) -> pixels, mean confidence and accuracy by bin; null for a bin without pixels."""
    pixels, rows = counts[PIXELS].tolist(), {"pixels": counts[PIXELS].astype(int).tolist()}
    for name, row in (("confidence", CONFIDENCE), ("accuracy", HITS)):
        rows[name] = [total / num if num else None for total, num in zip(counts[row].tolist(), pixels)]
    return rows


def shared_context(contexts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mappings -> what all of them say alike, key by key."""
    first, *others = contexts
    shared = {}
    for key, value in first.items():
        values = [other.get(key) for other in others]
        if all(other == value for other in values):
            shared[key] = value
        elif all(isinstance(v, Mapping) for v in (value, *values)):
            shared[key] = shared_context([value, *values])
    return shared


def _shared_without_rule(contexts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the rules' JSONs say alike besides their figures, without the config of a decision rule."""
    context = shared_context(contexts)
    return {**context, "config": {k: v for k, v in context.get("config", {}).items() if k != "predict"}}


def result_csv(result: EvalResult) -> str:
    """A row per image: its name and case, its scores in percent (empty where undefined), then its counts by class."""
    keys = {"image": result.names} | ({} if result.cases is None else {"case": result.cases})
    return _score_csv(keys, image_scores(result.counts, result.metrics), result.counts, result)


def case_csv(result: EvalResult) -> str:
    """A row per case: its name and number of slices, its scores in percent, then its slices' counts by class."""
    names, scores = case_scores(result.counts, result.cases, result.metrics)
    parts = split_cases(result.counts, result.cases)[1]
    keys = {"case": names, "slices": [len(part) for part in parts]}
    return _score_csv(keys, scores, np.stack([part.sum(0) for part in parts]), result)


def _score_csv(
    keys: Mapping[str, Sequence], scores: Mapping[str, np.ndarray], counts: np.ndarray, result: EvalResult
) -> str:
    rows = [[*keys, *scores, *(f"{kind}.{name}" for kind in count_names(result.metrics) for name in result.classes)]]
    for i, row in enumerate(counts):
        values = [_number(column[i]) for column in scores.values()]
        rows.append([*(key[i] for key in keys.values()), *values, *row.flatten().tolist()])
    return _csv(rows)


def images_csv(names: Sequence[str], entropy: np.ndarray) -> str:
    """A row per image: its name and the network's mean entropy, nats (empty where no pixel counts)."""
    return _csv([["image", "entropy"], *zip(names, map(_number, entropy))])


def _number(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))


def _csv(rows: Sequence[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def load_result(path: Path) -> EvalResult:
    """<rule>.csv -> the EvalResult it was written from."""
    expected = "the counts of an evaluation, a row per image"
    text = read_text(path, expected)
    with decoding(path, expected):
        header, *rows = csv.reader(io.StringIO(text, newline=""))
        classes = tuple(name.removeprefix("tp.") for name in header if name.startswith("tp."))
        metrics = tuple(name for name in METRIC_TABLE if f"{name}.part.{classes[0]}" in header)
        kinds, first = count_names(metrics), header.index(f"tp.{classes[0]}")
        if header[0] != "image" or len(header) != first + len(kinds) * len(classes):
            raise ValueError(f"columns {header[:6]}")
        counts = np.array([row[first:] for row in rows], np.int64).reshape(len(rows), len(kinds), len(classes))
        cases = tuple(row[1] for row in rows) if header[1] == "case" else None
        return EvalResult(path.stem, tuple(row[0] for row in rows), classes, counts, cases, metrics)


def format_results(
    results: Sequence[EvalResult],
    metric: str,
    comparisons: Sequence[Comparison] = (),
    calibration: np.ndarray | None = None,
) -> str:
    """Results -> tables of scores in percent, a line per rule, the comparisons, and the calibration of the network.

    The second table has the worst cases (and, with cases, the 3D scores) of the score by which rules are compared.
    """
    scores = [result.scores() for result in results]
    further = [f"m{METRIC_TABLE[name]}" for name in results[0].metrics]
    blocks = [format_scores([result.rule for result in results], scores, [metric.removesuffix("I")], further)]
    if comparisons:
        holm = ", after Holm over the rules" if len(results) > 2 else ""
        blocks.append(f"differences [{LEVEL:.0%} bootstrap intervals]; p: Wilcoxon's signed-rank test{holm}")
        blocks += [format_comparison(c) for c in comparisons]
    if calibration is not None:
        errors = calibration_scores(calibration, results[0].cases)
        blocks.append("calibration: " + ", ".join(f"{name} {value:.2f}" for name, value in errors.items()))
    return "\n".join(blocks)


def format_scores(
    rules: Sequence[str],
    scores: Sequence[Mapping[str, float]],
    families: Sequence[str],
    further: Sequence[str] = (),
) -> str:
    """Rules and their scores -> the main table, then the worst cases (and 3D) of each of `families`: mIoU, mDice.

    further: scores such as mBIoU for the main table.
    """
    tables = [format_columns(rules, scores, (*MAIN_COLUMNS, *(f"{name}{over}" for name in further for over in "DIC")))]
    for family in (*families, *further):
        columns = [f"{family}{end}" for end in WORST_ENDINGS if f"{family}{end}" in scores[0]]
        tables.append(format_columns(rules, scores, columns))
    return "\n".join(tables)


def format_columns(rows: Sequence[str], scores: Sequence[Mapping[str, float]], columns: Sequence[str]) -> str:
    """Names of rows and the scores of each -> a table of `columns`."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>9}" for name in columns)]
    for row, values in zip(rows, scores, strict=True):
        lines.append(f"{row:<{width}}" + "".join(f"{values[name]:9.2f}" for name in columns))
    return "\n".join(lines)


def format_comparison(comparison: Comparison) -> str:
    """One line: mean difference with its interval, units better and worse, and the test."""
    c = comparison
    if c.difference is None:
        return f"{c.rule} against {c.base}: {c.metric} is defined on no {c.unit}"
    text = f"{c.rule} against {c.base}: {c.metric} {c.difference:+.2f}"
    if c.interval is not None:
        text += f" [{c.interval[0]:+.2f}, {c.interval[1]:+.2f}]"
    if c.wins is None:
        return text
    p_text = "p < 0.0001" if c.p_holm < 0.0001 else f"p = {c.p_holm:.2g}"
    text += f", better on {c.wins} of {c.num_units} {c.unit}s, worse on {c.losses}, {p_text}"
    return f"{text}; {c.unit}s that lose {LOSING_HEADER}: {format_losing(c)}"


def format_losing(comparison: Comparison) -> str:
    """'mIoUI 20.2 / 4.0 %, mDiceI 17.9 / 3.1 %': the shares of units that lose so many points."""
    shares = comparison.losing or {}
    return ", ".join(f"{name} {' / '.join(f'{v:.1f}' for v in values.values())} %" for name, values in shares.items())


def finite_or_null(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores by name -> the same for JSON, which has no NaN."""
    return {name: float(v) if math.isfinite(v) else None for name, v in scores.items()}


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _figures(content: str | bytes) -> list | None:
    """What a comparison or calibration found, without what it says of where that came from; None for damaged files."""
    try:
        found = json.loads(content)
        return [found.get(key) for key in ("comparisons", "metrics", "top_label", "per_class")]
    except (ValueError, AttributeError):
        return None
