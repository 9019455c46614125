"""What the evaluation of a run's weights leaves in its folder, and on the terminal."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from exp.config.experiment import ExperimentConfig
from exp.evaluation.evaluator import Evaluation, Evaluator, format_timing
from exp.evaluation.pictures import choose_pictures, predict_panel, save_panel
from exp.evaluation.results import IMAGES, images_csv, report_results
from exp.files.atomic import write_atomically
from exp.files.output_folders import claim_folder
from exp.provenance import describe_code
from exp.rules.pooled import thresholds_json


@dataclass(frozen=True)
class Report:
    """Results, thresholds, pictures and probability maps of one evaluation; for rank 0 alone.

    training: how the model's weights came about, as the files say it.
    """

    config: ExperimentConfig
    folder: Path
    evaluator: Evaluator
    model: nn.Module
    training: dict[str, Any]

    def save(self, evaluation: Evaluation, *, num_pictures: int, num_maps: int) -> None:
        """Write the files and print the tables; num_pictures of each kind and num_maps maps, if above 0."""
        results, metric, calibration = self.folder / "results", self.config.test.metric, evaluation.calibration
        contexts = self._contexts()
        print(report_results(evaluation.results, results, contexts, metric=metric, calibration=calibration))
        if evaluation.entropy is not None:
            write_atomically(results / IMAGES, images_csv(evaluation.results[0].names, evaluation.entropy))
        write_atomically(results / "timing.json", json.dumps(evaluation.timing.to_dict(), indent=2) + "\n")
        print(format_timing(evaluation.timing))
        self._save_thresholds(evaluation, contexts)
        if num_pictures:
            judge = replace(self, evaluator=self.evaluator.under(evaluation.thresholds))
            judge._save_pictures(evaluation, contexts, num_pictures)
        if num_maps:
            self._save_probabilities(num_maps)
        print(f"results: {results}")

    def _contexts(self) -> list[dict[str, Any]]:
        """What the files of each rule say besides its scores."""
        code, config = describe_code(), self.config.to_dict()
        judged = {group: config[group] for group in ("data", "test")}
        return [{"training": self.training, **code, "config": {**judged, "predict": r}} for r in config["predict"]]

    def _save_thresholds(self, evaluation: Evaluation, contexts: list[dict[str, Any]]) -> None:
        """Write results/<rule>.<split>.thresholds.json of each rule of scope dataset, for rankseg_rma_fixed."""
        split = self.config.data.val_split
        for result, context in zip(evaluation.results, contexts):
            if None in evaluation.thresholds.get(result.rule, {}):
                text = thresholds_json(evaluation.thresholds[result.rule][None], result.classes, context)
                write_atomically(self.folder / "results" / f"{result.rule}.{split}.thresholds.json", text)

    def _save_pictures(self, evaluation: Evaluation, contexts: list[dict[str, Any]], num_images: int) -> None:
        """Write <run>/pictures/{gain,loss,random}/<place>_<image>.png; pictures of another evaluation go to older/."""
        metric, dataset = self.config.test.metric, self.evaluator.dataset
        origin = {"metric": metric, "images": num_images, "rules": contexts}
        folder = claim_folder(self.folder / "pictures", origin)
        for kind, indices in choose_pictures(evaluation.results, metric, num_images, self.config.seed).items():
            for place, index in enumerate(indices):
                panel = predict_panel(self.evaluator, self.model, index, metric)
                save_panel(panel, folder / kind, f"{place:02d}_{dataset.samples[index].name}")
        print(f"pictures: {folder}")

    def _save_probabilities(self, num_images: int) -> None:
        """Write <run>/probabilities/<image>.npy, (C, H, W) float32; maps of another evaluation go to older/."""
        dataset, config = self.evaluator.dataset, self.config.to_dict()
        origin = {"training": self.training, "config": {group: config[group] for group in ("data", "test")}}
        folder = claim_folder(self.folder / "probabilities", origin)
        for index in range(min(num_images, len(dataset))):
            prob = self.evaluator.probabilities(self.model, dataset[index].image[None])[0]
            np.save(folder / f"{dataset.samples[index].name.replace('/', '_')}.npy", prob.cpu().numpy())
        print(f"probability maps: {folder}")
