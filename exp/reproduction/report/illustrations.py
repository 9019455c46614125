"""Plots and pictures of a training or a series, from its results and the files of its run."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exp.evaluation.metrics import EvalResult, class_scores, image_scores
from exp.evaluation.results import IMAGES, load_entropy
from exp.files.images import open_image
from exp.files.text import read_json
from exp.reproduction.measured import Training, compare_seeds, read_times
from exp.reproduction.report import plots
from exp.reproduction.report.trainings import Series
from exp.runtime.errors import InputError

PANEL_WIDTH = 1000  # pixels
SHOWN_RULES = ("argmax", "rankseg_rma")  # of the validations in training
KINDS = {"gain": "largest gain", "loss": "largest loss", "random": "at random"}
NO_ENTROPY = "Gain against the network's uncertainty: these results came without the entropy of the images."


@dataclass(frozen=True)
class Picture:
    """An image with its caption. kind: of the file. place: where the page has it: plots, wide or gallery."""

    data: bytes
    caption: str
    kind: str = "svg+xml"
    place: str = "plots"


def illustrate(source: Training | Series | None) -> tuple[list[Picture], list[str]]:
    """What a section is about -> its plots and pictures, and remarks on those that cannot be drawn."""
    if source is None:
        return [], []
    if isinstance(source, Series):
        return [_series_plot(source)], []
    pictures, remarks = _comparisons(source) if len(source.results) > 1 else ([], [])
    run = source.folder.parent
    pictures += [*_calibration(source.folder), *_times(source.folder), *_curves(run / "log.jsonl")]
    return [*pictures, *_gallery(run / "pictures")], remarks


def _series_plot(series: Series) -> Picture:
    """Gains of every rule, under each source of probabilities, along what varies."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for step in series.steps:
        for rule in step.trainings[0].rules[1:]:
            found = compare_seeds(step.trainings, rule)
            if found.interval is not None:
                name = f"{rule}, {step.source}" if step.source else rule
                lines.setdefault(name, []).append((step.value, found.difference, *found.interval))
    svg = plots.gains_along(lines, series.label, series.training.metric)
    return Picture(svg, f"{series.title}, with 95 % intervals", place="wide")


def _comparisons(training: Training) -> tuple[list[Picture], list[str]]:
    """The first further rule beside argmax: scores and gains of the images, by size and by uncertainty."""
    base, other = training.results[:2]
    rule, metric = other.rule, training.metric
    first, second = (image_scores(result.counts)[metric] for result in (base, other))
    both = ~(np.isnan(first) | np.isnan(second))
    sizes, objects, score = gains_of_objects(base, other, metric)
    area = "area of a class in an image, %"
    pictures = [
        Picture(
            plots.scatter_scores(first[both], second[both], rule, metric), f"{metric} of each image under both rules"
        ),
        Picture(plots.histogram_gains((second - first)[both], rule, metric), f"Gains of {rule}"),
        Picture(
            plots.gains_by(objects, sizes, area, rule, score, log=True),
            f"Gain of {rule} against the size of objects: a dot for each class in each image",
        ),
    ]
    entropy = _entropy(training.folder / IMAGES, base)
    if entropy is None:
        return pictures, [NO_ENTROPY]
    known = both & ~np.isnan(entropy)
    svg = plots.gains_by((second - first)[known], entropy[known], "mean entropy of the image, nats", rule, metric)
    return [*pictures, Picture(svg, f"Gain of {rule} against the network's uncertainty")], []


def _entropy(path: Path, result: EvalResult) -> np.ndarray | None:
    """(N,) the mean entropy of the images, NaN where one has none; None without a file of the same images."""
    if not path.is_file():
        return None
    by_name = load_entropy(path)
    values = np.array([by_name.get(name, np.nan) for name in result.names])
    return None if np.isnan(values).all() else values


def gains_of_objects(base: EvalResult, other: EvalResult, metric: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Two rules -> of each class in each image's label its share of the counted pixels, in percent, (K,); what its
    score gains, in percent points, (K,); and which score that is: the metric's. With two classes the foreground alone.

    By class, as the mean over an image's classes tells little of size where all classes are in all images.
    """
    score = metric.removeprefix("m")[:-1]
    sizes = base.counts[:, 0] + base.counts[:, 2]  # TP + FN
    chosen = sizes > 0
    chosen[:, 0] &= sizes.shape[1] > 2
    shares = 100 * sizes / np.maximum(sizes.sum(1, keepdims=True), 1)
    first, second = (class_scores(result.counts)[score] for result in (base, other))
    return shares[chosen], (second - first)[chosen], score


def _calibration(folder: Path) -> Iterator[Picture]:
    path, expected = folder / "calibration.json", "the calibration of an evaluation"
    if path.is_file():
        top = read_json(path, expected).get("top_label")
        try:
            svg = plots.reliability(top["confidence"], top["accuracy"], top["pixels"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error!r}), expected {expected}") from None
        yield Picture(svg, "Reliability diagram of the network")


def _times(folder: Path) -> Iterator[Picture]:
    if (folder / "timing.json").is_file():
        times = read_times(folder / "timing.json")
        steps = {"forward pass": times["milliseconds_per_image"]["forward"], **times["decision_milliseconds_per_image"]}
        yield Picture(plots.bars(steps), "Milliseconds of network and rules")


def _curves(path: Path) -> Iterator[Picture]:
    """A run's log -> its loss, and its validations where there are several."""
    losses, scores = read_log(path)
    if losses:
        yield Picture(plots.curves({"loss": sorted(losses.items())}, "training loss"), "Training loss")
    if any(len(points) > 1 for points in scores.values()):
        by_rule = {rule: sorted(points.items()) for rule, points in scores.items()}
        yield Picture(plots.curves(by_rule, "mIoUI in training"), "Validation scores by iteration")


def read_log(path: Path) -> tuple[dict[int, float], dict[str, dict[int, float]]]:
    """log.jsonl -> losses by iteration, and by rule the mIoUI of the validations; of an iteration twice the last."""
    losses: dict[int, float] = {}
    scores: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a crash
            continue
        if not isinstance(row, dict) or "iteration" not in row:
            continue
        if row.get("train/loss") is not None:
            losses[row["iteration"]] = row["train/loss"]
        for rule in SHOWN_RULES:
            if row.get(f"val/{rule}/mIoUI") is not None:
                scores.setdefault(rule, {})[row["iteration"]] = row[f"val/{rule}/mIoUI"]
    return losses, scores


def _gallery(folder: Path) -> Iterator[Picture]:
    """The panels of --save_pred, smaller."""
    for kind, title in KINDS.items():
        for path in sorted((folder / kind).glob("*.png")):
            yield Picture(_small_panel(path), f"{path.stem}, {title}", "jpeg", "gallery")


def _small_panel(path: Path) -> bytes:
    with open_image(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((PANEL_WIDTH, 4 * PANEL_WIDTH))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()
