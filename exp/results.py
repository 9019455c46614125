"""EvalResult <-> JSON and per-image CSV; the tables that a run prints."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exp.errors import InputError
from exp.evaluate import EvalResult
from exp.metrics import compute_scores, image_scores, per_class_scores

COUNTS = ("tp", "fp", "fn")


def save_results(results: Sequence[EvalResult], folder: Path, contexts: Sequence[Mapping[str, Any]]) -> None:
    """Write <folder>/<rule>.csv and .json per result; an older evaluation with other rows is kept in older/.

    contexts: per result, what the JSON says besides the rule and its scores (config, checkpoint, revision, versions).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for result, context in zip(results, contexts, strict=True):
        table, scores = folder / f"{result.rule}.csv", folder / f"{result.rule}.json"
        text = result_csv(result)
        if table.is_file() and table.read_text(encoding="utf-8") != text:
            _keep_older([table, scores], folder / "older")
        write_atomically(table, text)
        write_atomically(scores, result_json(result, context))


def result_json(result: EvalResult, context: Mapping[str, Any]) -> str:
    counted = int((result.counts.sum((1, 2)) > 0).sum())
    by_class = per_class_scores(result.counts)
    content = {
        "rule": result.rule,
        "metrics": _finite(compute_scores(result.counts)),
        "images": {"evaluated": len(result.names), "with_counted_pixels": counted},
        "per_class": {c: _finite({name: v[i] for name, v in by_class.items()}) for i, c in enumerate(result.classes)},
        **context,
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def result_csv(result: EvalResult) -> str:
    """A row an image: its name, its scores in percent (empty where undefined), then TP, FP, FN of every class."""
    rows = image_scores(result.counts)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *rows, *(f"{kind}.{c}" for kind in COUNTS for c in result.classes)])
    for i, name in enumerate(result.names):
        scores = ["" if math.isnan(values[i]) else repr(float(values[i])) for values in rows.values()]
        writer.writerow([name, *scores, *result.counts[i].flatten().tolist()])
    return text.getvalue()


def load_result(path: Path) -> EvalResult:
    """<rule>.csv -> the EvalResult it was written from."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    columns = [i for i, name in enumerate(header) if name.startswith("tp.")]
    if not columns or len(header) != columns[0] + 3 * len(columns):
        raise InputError(f"{path}: got the columns {header[:6]}, expected those of a per-image result")
    classes = tuple(header[i].removeprefix("tp.") for i in columns)
    counts = np.array([row[columns[0] :] for row in rows], np.int64).reshape(len(rows), 3, len(classes))
    return EvalResult(path.stem, tuple(row[0] for row in rows), classes, counts)


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file beside `path` and rename it, so that `path` is the old text or the new, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def format_table(results: Sequence[EvalResult], metric: str) -> str:
    """Results -> a table of scores in percent, a line a rule, and each rule's per-image `metric` beside the first's."""
    scores = [compute_scores(result.counts) for result in results]
    width = max(len(result.rule) for result in results)
    lines = [" " * width + "".join(f"{name:>9}" for name in scores[0])]
    for result, values in zip(results, scores):
        lines.append(f"{result.rule:<{width}}" + "".join(f"{value:9.2f}" for value in values.values()))
    for result in results[1:]:
        lines.append(compare(results[0], result, metric))
    return "\n".join(lines)


def compare(base: EvalResult, other: EvalResult, metric: str) -> str:
    """Two results on the same images -> a line: mean difference of the per-image score, images better and worse."""
    gain = image_scores(other.counts)[metric] - image_scores(base.counts)[metric]
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    return (
        f"{other.rule} against {base.rule}: {metric} {np.nanmean(gain):+.2f}, better on {better} of {len(gain)} "
        f"images, worse on {worse}"
    )


def _finite(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(v) if math.isfinite(v) else None for name, v in scores.items()}


def _keep_older(paths: Sequence[Path], folder: Path) -> None:
    """Move files of an earlier evaluation aside, under the first free number."""
    folder.mkdir(exist_ok=True)
    number = 1
    while any((folder / f"{p.stem}.{number}{p.suffix}").exists() for p in paths):
        number += 1
    for path in paths:
        if path.exists():
            os.rename(path, folder / f"{path.stem}.{number}{path.suffix}")
