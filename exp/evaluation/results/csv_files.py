"""EvalResult <-> CSV: a row per image, and per case; the confusion matrix; the entropies of the images."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from exp.config.families import METRIC_TABLE
from exp.evaluation.metrics import COUNTS, EvalResult, case_scores, count_names, image_scores, split_cases
from exp.files.text import read_text
from exp.runtime.errors import decoding


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


def confusion_csv(result: EvalResult) -> str:
    """A row per class of the label, a column per class decided, in pixels of all images; ignored ones are in none."""
    return _csv([["label", *result.classes], *([c, *row] for c, row in zip(result.classes, result.confusion.tolist()))])


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
        if not classes:
            raise ValueError(f"columns {header[:6]}")
        metrics = tuple(name for name in METRIC_TABLE if f"{name}.part.{classes[0]}" in header)
        kinds, first = count_names(metrics), header.index(f"tp.{classes[0]}")
        if header[0] != "image" or len(header) != first + len(kinds) * len(classes):
            raise ValueError(f"columns {header[:6]}")
        counts = np.array([row[first:] for row in rows], np.int64).reshape(len(rows), len(kinds), len(classes))
        cases = tuple(row[1] for row in rows) if header[1] == "case" else None
        return EvalResult(path.stem, tuple(row[0] for row in rows), classes, counts, cases, metrics)


def load_confusion(path: Path, result: EvalResult) -> np.ndarray:
    """<rule>.confusion.csv -> (C, C) int64; InputError if it is not that of the result's counts."""
    expected = f"the confusion matrix of the counts in {result.rule}.csv"
    text = read_text(path, expected)
    with decoding(path, expected):
        header, *rows = csv.reader(io.StringIO(text, newline=""))
        if [header[1:], [row[0] for row in rows]] != [list(result.classes)] * 2:
            raise ValueError(f"classes {header[1:6]}")
        matrix = np.array([row[1:] for row in rows], np.int64).reshape([len(result.classes)] * 2)
        tp, fp, fn = result.counts[:, : len(COUNTS)].sum(0)
        if (matrix.diagonal() != tp).any() or (matrix.sum(0) != tp + fp).any() or (matrix.sum(1) != tp + fn).any():
            raise ValueError("the sums of other counts")
        return matrix
