"""EvalResults, calibration and comparisons -> the files of a results folder."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exp.evaluation.calibration import calibration_scores, describe_bins
from exp.evaluation.comparison import LEVEL, NUM_POOLED_RESAMPLES, NUM_RESAMPLES, Comparison, compare_rules
from exp.evaluation.metrics import EvalResult, per_class_scores
from exp.evaluation.results.csv_files import case_csv, confusion_csv, result_csv
from exp.evaluation.results.tables import format_results
from exp.files.atomic import move_aside, write_atomically

COMPARISON, CALIBRATION, IMAGES = "comparison.json", "calibration.json", "images.csv"
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
    """Write <folder>/<rule>.csv, .confusion.csv and .json per result, with cases <rule>.cases.csv; then what is of all:
    comparison.json, calibration.json.

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
    ends = ("csv", "cases.csv", "confusion.csv", "json")
    table, cases, confusion, scores = (folder / f"{result.rule}.{end}" for end in ends)
    text = result_csv(result)
    changed = table.is_file() and table.read_bytes() != text.encode()
    if changed:
        move_aside([table, cases, confusion, scores])
    write_atomically(table, text)
    if result.cases is not None:
        write_atomically(cases, case_csv(result))
    if result.confusion is not None:
        write_atomically(confusion, confusion_csv(result))
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
        "top_label": describe_bins(pooled[-1]),
        "per_class": {name: describe_bins(pooled[i]) for i, name in enumerate(result.classes)},
    }


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
