"""What the evaluation of a run's weights leaves in its folder, and on the terminal."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from exp.checkpoints.checkpoint import weights_checksum
from exp.evaluation.evaluator import Evaluation, Evaluator, format_timing
from exp.evaluation.pictures import choose_pictures, predict_panel, save_panel
from exp.evaluation.results import IMAGES, images_csv, report_results
from exp.files.atomic import move_aside, write_atomically
from exp.files.output_folders import claim_folder
from exp.files.paths import flat_names
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
    weights = {"training": training, "weights_checksum": weights_checksum(model)}
    code = describe_code()
    contexts = [{**weights, **code, "config": {**evaluated, "predict": r}} for r in config["predict"]]
    print(report_results(evaluation.results, results, contexts, metric=metric, calibration=evaluation.calibration))
    _save_entropies(evaluation, results / IMAGES)
    times = {**evaluation.timing.to_dict(), **weights, "config": evaluated}
    write_atomically(results / "timing.json", json.dumps(times, indent=2) + "\n")
    print(format_timing(evaluation.timing))
    for result, context in zip(evaluation.results, contexts):
        if None in (found := evaluation.thresholds.get(result.rule, {})):  # for rankseg_rma_fixed
            path = results / f"{result.rule}.{config['data']['val_split']}.thresholds.json"
            write_atomically(path, thresholds_json(found[None], result.classes, context))
    names = flat_names([sample.name for sample in evaluator.dataset.samples])
    if num_pictures:
        origin = {"metric": metric, "images": num_pictures, "rules": contexts}
        pictures = claim_folder(folder / "pictures", origin)
        for kind, indices in choose_pictures(evaluation.results, metric, num_pictures, config["seed"]).items():
            for place, index in enumerate(indices):
                panel = predict_panel(evaluator, model, evaluation.thresholds, index, metric)
                save_panel(panel, pictures / kind, f"{place:02d}_{names[index]}")
        print(f"pictures: {pictures}")
    if num_maps:
        maps = claim_folder(folder / "probabilities", {"training": training, "config": evaluated})
        for index in range(min(num_maps, len(evaluator.dataset))):
            prob = evaluator.probabilities(model, evaluator.dataset[index].image[None])[0]
            np.save(maps / f"{names[index]}.npy", prob.cpu().numpy())
        print(f"probability maps: {maps}")
    print(f"results: {results}")


def _save_entropies(evaluation: Evaluation, path: Path) -> None:
    """Write images.csv, or none where nothing was measured; one of another evaluation is kept in older/."""
    entropy = evaluation.entropy
    text = None if entropy is None else images_csv(evaluation.results[0].names, entropy)
    if path.is_file() and (text is None or path.read_bytes() != text.encode()):
        move_aside([path])
    if text is not None:
        write_atomically(path, text)
