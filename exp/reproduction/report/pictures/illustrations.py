"""Plots and pictures of a training, from its results and the files of its run."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exp.evaluation.results import load_confusion
from exp.files.images import open_image
from exp.reproduction.existing import differences
from exp.reproduction.measured import Training, read_times
from exp.reproduction.report.pictures import plots
from exp.runtime.errors import passing_over

PANEL_WIDTH = 1000  # pixels
SHOWN_RULES = ("argmax", "rankseg_rma")  # of the validations in training
KINDS = {"gain": "largest gain", "loss": "largest loss", "random": "at random"}


@dataclass(frozen=True)
class Picture:
    """An image with its caption. kind: of the file. place: of the page: comparisons, plots, matrices or gallery.

    key: unlike any other's of the training, for links.
    """

    data: bytes
    caption: str
    kind: str = "svg+xml"
    place: str = "plots"
    key: str = ""


def illustrate(training: Training) -> Iterator[Picture]:
    """A training -> its plots, and the pictures of --save_pred; without those of damaged files, which are told."""
    if len(training.results) > 1:
        yield from _comparisons(training)
    yield from _calibration(training)
    for part in (_times, _curves, _confusions, _gallery):
        with passing_over():
            yield from part(training)


def _comparisons(training: Training) -> Iterator[Picture]:
    """The further rules beside argmax, in the tables' order: gains and scores of the images (cases)."""
    rules, metric, unit = training.rules[1:], training.metric, training.unit
    gains = {rule: training.unit_gains(rule, metric) for rule in rules}
    gains = {rule: own for rule, values in gains.items() if len(own := values[~np.isnan(values)])}
    if not gains:
        return
    svg = plots.distribute_gains(gains, metric, unit)
    yield Picture(svg, f"Gains of the {unit}s over argmax: the further right a line, the better", place="comparisons")
    base, *others = (training.unit_scores(rule, metric)[1] for rule in training.rules)
    svg = plots.scatter_scores(base, dict(zip(rules, others)), metric, unit)
    yield Picture(
        svg, f"{metric} of each {unit} under argmax and the rules; dots above the line gain", place="comparisons"
    )


def _calibration(training: Training) -> Iterator[Picture]:
    if training.calibration is not None:
        svg = plots.reliability({"network": training.calibration["top_label"]})
        yield Picture(svg, "Reliability diagram of the network")
    fit = training.fit
    if fit is not None and all("top_label" in fit["held_out"][when] for when in ("before", "after")):
        names = {"before": "temperature 1", "after": f"temperature {fit['temperature']:.2f}"}
        svg = plots.reliability({name: fit["held_out"][when]["top_label"] for when, name in names.items()})
        yield Picture(svg, "Reliability before and after the temperature, on pixels that it was not fitted on")


def _times(training: Training) -> Iterator[Picture]:
    path = training.folder / "timing.json"
    if path.is_file() and not differences(times := read_times(path), training.content):
        steps = {"forward pass": times["milliseconds_per_image"]["forward"], **times["decision_milliseconds_per_image"]}
        yield Picture(plots.bars(steps), "Milliseconds of network and rules")


def _curves(training: Training) -> Iterator[Picture]:
    """A run's log -> its loss, and its validations where there are several."""
    losses, scores = read_log(training.folder.parent / "log.jsonl")
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


def _confusions(training: Training) -> Iterator[Picture]:
    """A matrix per rule; evaluations of before left none."""
    for result in training.results:
        path = training.folder / f"{result.rule}.confusion.csv"
        if path.is_file():
            svg = plots.confusion(load_confusion(path, result), result.classes)
            caption = f"Confusion matrix of {result.rule}; results/{path.name} has the pixels"
            yield Picture(svg, caption, place="matrices")


def _gallery(training: Training) -> Iterator[Picture]:
    """The panels of --save_pred, smaller."""
    for key, path in training.panels.items():
        with open_image(path) as image:
            picture = image.convert("RGB")
        picture.thumbnail((PANEL_WIDTH, 4 * PANEL_WIDTH))
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=80)
        caption = f"{path.stem}, {KINDS[path.parent.name]}"
        yield Picture(buffer.getvalue(), caption, "jpeg", "gallery", key)
