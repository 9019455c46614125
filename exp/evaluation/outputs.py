"""What the evaluation of a run's weights leaves in its folder, and on the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from exp.evaluation.evaluator import Evaluation, Evaluator, format_timing
from exp.evaluation.pictures import choose_pictures, predict_panel, save_panel
from exp.evaluation.results import IMAGES, images_csv, report_results
from exp.files.atomic import write_atomically
from exp.files.output_folders import claim_folder
from exp.provenance import describe_code
from exp.rules.pooled import thresholds_json


def save_outputs(
    evaluation: Evaluation,
    folder: Path,
    evaluator: Evaluator,
    model: nn.Module,
    *,
    config: Mapping[str, Any],
    training: Mapping[str, Any],
    num_pictures: int,
    num_maps: int,
) -> None:
    """Write results, thresholds, pictures and probability maps of one evaluation, and print the tables; rank 0 alone.

    config: the resolved experiment as plain dicts. training: how the model's weights came about, as the files say it.
    num_pictures: of each kind; num_maps: of the first images.
    """
    results, metric = folder / "results", config["test"]["metric"]
    evaluated = {"data": config["data"], "test": config["test"]}
    code = describe_code()
    contexts = [{"training": training, **code, "config": {**evaluated, "predict": r}} for r in config["predict"]]
    print(report_results(evaluation.results, results, contexts, metric=metric, calibration=evaluation.calibration))
    if evaluation.entropy is not None:
        write_atomically(results / IMAGES, images_csv(evaluation.results[0].names, evaluation.entropy))
    write_atomically(results / "timing.json", json.dumps(evaluation.timing.to_dict(), indent=2) + "\n")
    print(format_timing(evaluation.timing))
    _save_thresholds(evaluation, contexts, results, config["data"]["val_split"])
    if num_pictures:
        origin = {"metric": metric, "images": num_pictures, "rules": contexts}
        pictures = claim_folder(folder / "pictures", origin)
        chosen = choose_pictures(evaluation.results, metric, num_pictures, config["seed"])
        _save_pictures(chosen, pictures, evaluator.under(evaluation.thresholds), model, metric)
    if num_maps:
        maps = claim_folder(folder / "probabilities", {"training": training, "config": evaluated})
        _save_probabilities(num_maps, maps, evaluator, model)
    print(f"results: {results}")


def _save_thresholds(evaluation: Evaluation, contexts: Sequence[Mapping[str, Any]], folder: Path, split: str) -> None:
    """Write <rule>.<split>.thresholds.json of each rule of scope dataset, for rankseg_rma_fixed."""
    for result, context in zip(evaluation.results, contexts):
        if None in evaluation.thresholds.get(result.rule, {}):
            text = thresholds_json(evaluation.thresholds[result.rule][None], result.classes, context)
            write_atomically(folder / f"{result.rule}.{split}.thresholds.json", text)


def _save_pictures(
    chosen: Mapping[str, Sequence[int]], folder: Path, evaluator: Evaluator, model: nn.Module, metric: str
) -> None:
    """Write <folder>/{gain,loss,random}/<place>_<image>.png."""
    for kind, indices in chosen.items():
        for place, index in enumerate(indices):
            panel = predict_panel(evaluator, model, index, metric)
            save_panel(panel, folder / kind, f"{place:02d}_{evaluator.dataset.samples[index].name}")
    print(f"pictures: {folder}")


def _save_probabilities(number: int, folder: Path, evaluator: Evaluator, model: nn.Module) -> None:
    """Write <folder>/<image>.npy, (C, H, W) float32, of the first images."""
    dataset = evaluator.dataset
    for index in range(min(number, len(dataset))):
        prob = evaluator.probabilities(model, dataset[index].image[None])[0]
        np.save(folder / f"{dataset.samples[index].name.replace('/', '_')}.npy", prob.cpu().numpy())
    print(f"probability maps: {folder}")
