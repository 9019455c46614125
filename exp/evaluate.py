"""Loader -> inference -> rules -> EvalResult: every rule sees the same probabilities."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from exp.config import ExperimentConfig
from exp.data import SegmentationDataset, build_dataset, build_normalize
from exp.data.loader import build_test_loader
from exp.distributed import Dist
from exp.inference import Inference, build_inference
from exp.metrics import count
from exp.predict import Rule, build_rule


@dataclass(frozen=True)
class EvalResult:
    """One rule's (N, 3, C) int64 TP, FP, FN per image and class, the images in the data set's order."""

    rule: str
    names: tuple[str, ...]
    classes: tuple[str, ...]
    counts: np.ndarray


@dataclass(frozen=True)
class Evaluator:
    """The rules by name, and all it takes to judge them on a data set, each image on one process."""

    dataset: SegmentationDataset
    rules: Mapping[str, Rule]
    inference: Inference
    normalize: Callable[[Tensor], Tensor]
    num_workers: int
    dist: Dist

    def __call__(self, model: nn.Module) -> list[EvalResult]:
        """The raw model, the same on every rank and left in eval mode -> a result a rule, on every rank."""
        model.eval()
        loader = build_test_loader(self.dataset, self.num_workers, self.dist)
        num_classes, rows = len(self.dataset.classes), {}
        for batch in tqdm(loader, desc="evaluating", unit="img", disable=not self.dist.is_main, leave=False):
            label = batch.label[0].to(self.dist.device, non_blocking=True)
            preds = self.decide(model, batch.image)
            counts = torch.stack([count(pred, label, num_classes) for pred in preds.values()])
            rows[batch.indices[0]] = counts.cpu().numpy()
        gathered = {index: row for part in self.dist.gather(rows) for index, row in part.items()}
        table = np.stack([gathered[index] for index in range(len(self.dataset))])
        names = tuple(sample.name for sample in self.dataset.samples)
        return [EvalResult(rule, names, self.dataset.classes, table[:, i]) for i, rule in enumerate(self.rules)]

    def read_all(self) -> None:
        """Read this process's share of the images and labels; InputError for the first that is damaged."""
        loader = build_test_loader(self.dataset, self.num_workers, self.dist)
        for _ in tqdm(loader, desc="reading the validation set", disable=not self.dist.is_main, leave=False):
            pass

    def decide(self, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
        """(1, 3, H, W) uint8 image and a model in eval mode -> (H, W) int64 labels a rule."""
        prob = self.probabilities(model, image)
        return {name: rule(prob)[0] for name, rule in self.rules.items()}

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """(1, 3, H, W) uint8 image and a model in eval mode -> (1, C, H, W) float32."""
        return self.inference(model, self.normalize(image.to(self.dist.device, non_blocking=True)))


def build_evaluator(config: ExperimentConfig, data_dir: str | None, dist: Dist) -> Evaluator:
    """The experiment's validation set under its rules; InputError if the data set is not there."""
    dataset = build_dataset(config.data, data_dir, "val")
    return Evaluator(
        dataset=dataset,
        rules={c.name: build_rule(c, len(dataset.classes)) for c in config.predict},
        inference=build_inference(config.test),
        normalize=build_normalize(config.data),
        num_workers=config.schedule.num_workers,
        dist=dist,
    )
