"""Plots and pictures of a training, from its results and the files of its run."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exp.evaluation.metrics import image_scores
from exp.files.images import open_image
from exp.files.text import read_json
from exp.reproduction.existing import differences
from exp.reproduction.measured import Training, read_times
from exp.reproduction.report import plots
from exp.runtime.errors import InputError, passing_over

PANEL_WIDTH = 1000  # pixels
SHOWN_RULES = ("argmax", "rankseg_rma")  # of the validations in training
KINDS = {"gain": "largest gain", "loss": "largest loss", "random": "at random"}


@dataclass(frozen=True)
class Picture:
    """An image with its caption. kind: of the file. place: where the page has it: plots or gallery."""

    data: bytes
    caption: str
    kind: str = "svg+xml"
    place: str = "plots"


def illustrate(training: Training) -> Iterator[Picture]:
    """A training -> its plots, and the pictures of --save_pred; without those of damaged files, which are told."""
    if len(training.results) > 1:
        yield from _comparisons(training)
    for part in (_calibration, _times, _curves, _gallery):
        with passing_over():
            yield from part(training)


def _comparisons(training: Training) -> Iterator[Picture]:
    """The first further rule beside argmax: scores and gains of the images."""
    rule, metric = training.rules[1], training.metric
    base, other = (image_scores(result.counts)[metric] for result in training.results[:2])
    both = ~(np.isnan(base) | np.isnan(other))
    svg = plots.scatter_scores(base[both], other[both], rule, metric)
    yield Picture(svg, f"{metric} of each image under both rules")
    yield Picture(plots.histogram_gains((other - base)[both], rule, metric), f"Gains of {rule}")


def _calibration(training: Training) -> Iterator[Picture]:
    path, expected = training.folder / "calibration.json", "the calibration of an evaluation"
    if path.is_file() and not differences(content := read_json(path, expected), training.content):
        top = content.get("top_label")
        try:
            svg = plots.reliability(top["confidence"], top["accuracy"], top["pixels"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error!r}), expected {expected}") from None
        yield Picture(svg, "Reliability diagram of the network")


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


def _gallery(training: Training) -> Iterator[Picture]:
    """The panels of --save_pred, smaller; none of another evaluation."""
    folder = training.folder.parent / "pictures"
    record = folder.with_name("pictures.json")
    origin = read_json(record, "what the pictures are made from") if record.is_file() else {}
    if any(differences(rule, training.content) for rule in origin.get("rules", [])):
        return
    for kind, title in KINDS.items():
        for path in sorted((folder / kind).glob("*.png")):
            with open_image(path) as image:
                picture = image.convert("RGB")
            picture.thumbnail((PANEL_WIDTH, 4 * PANEL_WIDTH))
            buffer = io.BytesIO()
            picture.save(buffer, format="JPEG", quality=80)
            yield Picture(buffer.getvalue(), f"{path.stem}, {title}", "jpeg", "gallery")
