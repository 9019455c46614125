"""One run in its folder: train (or go on training), load what was trained, judge it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from exp.checkpoint import (
    TRAINING_GROUPS,
    Checkpoint,
    check_resumable,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from exp.config import ExperimentConfig
from exp.data import build_dataset
from exp.data.loader import build_train_loader, count_iterations
from exp.distributed import Dist
from exp.errors import InputError
from exp.evaluate import EvalResult, Evaluation, Evaluator, format_timing
from exp.logger import NullLogger, build_logger
from exp.losses import build_criterion
from exp.metrics import compute_scores
from exp.models import Segmentor, build_model
from exp.optim import build_optimizer, build_scheduler
from exp.output_folders import claim_folder
from exp.pictures import choose_pictures, predict_panel, save_panel
from exp.provenance import describe_code, record_start
from exp.results import report_results, write_atomically
from exp.train import Intervals, seed_everything, train

LOGGED_PICTURES = 3
POOLING_DECODERS = ("deeplabv3plus", "upernet")


@dataclass(frozen=True)
class Run:
    """An experiment in its folder <output_dir>/<model>.<data>.<loss>.<schedule>.<optim>."""

    config: ExperimentConfig
    folder: Path
    evaluator: Evaluator
    dist: Dist

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.evaluator.dataset.classes

    def load(self, path: Path | None) -> tuple[Segmentor, dict[str, Any]]:
        """The checkpoint at `path`, or the run's newest -> the raw model and how it was trained."""
        path = path or find_checkpoint(self.checkpoints)
        if path is None:
            raise InputError(
                f"{self.checkpoints}: got no checkpoint, expected one: train first (the same flags "
                "without --test-only), or name one with --model_checkpoint"
            )
        checkpoint = load_checkpoint(path)
        return self._model_of(checkpoint), describe_training(checkpoint.iteration, checkpoint.config)

    def train(self, data_dir: str | None) -> tuple[Segmentor, dict[str, Any], Evaluation]:
        """Train to the end of the schedule, from the newest checkpoint if there is one, and evaluate.

        Returns the raw model, how it was trained and its evaluation.
        """
        config, dist = self.config, self.dist
        dataset = build_dataset(config.data, data_dir, "train", config.seed)
        end = count_iterations(config.schedule, len(dataset))
        path = find_checkpoint(self.checkpoints)
        checkpoint = load_checkpoint(path) if path else None
        if checkpoint:
            check_resumable(checkpoint, config.to_dict())
        start = checkpoint.iteration if checkpoint else 0
        self._check_start(start)
        loader = build_train_loader(dataset, config.schedule, start, end, config.seed, dist)
        raw_model = self._model_of(checkpoint) if checkpoint else self._new_model()
        if start >= end:
            if dist.is_main:
                print(f"{path}: training is complete ({end} iterations); evaluating")
            return raw_model, describe_training(start, checkpoint.config), self.evaluator(raw_model)
        if start == 0:
            self.evaluator.read_all()  # a damaged image should not wait for the end of the training
        model = dist.wrap(raw_model)
        optimizer = build_optimizer(config.optim, raw_model)
        scheduler = build_scheduler(config.optim, optimizer, end)
        if checkpoint:
            optimizer.load_state_dict(checkpoint.optimizer)
            scheduler.load_state_dict(checkpoint.scheduler)
        if dist.is_main:
            record_start(self.folder, config, start, dist.world_size)
        with build_logger(self.folder, start, end, dist.is_main) as logger:
            logger.message(self._describe(raw_model, len(dataset), start, end))
            train(
                model,
                build_criterion(config.loss, dist.sum),
                loader,
                optimizer,
                scheduler,
                normalize=self.evaluator.normalize,
                start=start,
                end=end,
                batch_size=config.schedule.batch_size,
                seed=config.seed,
                save=self._saver(raw_model, optimizer, scheduler),
                intervals=Intervals(config.schedule.log_iters, config.schedule.save_iters, config.schedule.val_iters),
                validate=lambda iteration: self._validate(raw_model, iteration, logger),
                logger=logger,
                dist=dist,
            )
            return raw_model, describe_training(end, config.to_dict()), self._validate(raw_model, end, logger)

    def report(
        self,
        model: Segmentor,
        training: dict[str, Any],
        evaluation: Evaluation,
        *,
        num_pictures: int,
        num_maps: int,
    ) -> None:
        """Write results, pictures and probability maps to the run folder and print the table; rank 0 alone."""
        results, code, config = evaluation.results, describe_code(), self.config.to_dict()
        judged = {group: config[group] for group in ("data", "test")}
        contexts = [{"training": training, **code, "config": {**judged, "predict": rule}} for rule in config["predict"]]
        metric, calibration = self.config.test.metric, evaluation.calibration
        print(report_results(results, self.folder / "results", contexts, metric=metric, calibration=calibration))
        write_atomically(
            self.folder / "results" / "timing.json", json.dumps(evaluation.timing.to_dict(), indent=2) + "\n"
        )
        print(format_timing(evaluation.timing))
        if num_pictures:
            self._save_pictures(model, results, contexts, num_pictures)
        for index in range(min(num_maps, len(self.evaluator.dataset))):
            self._save_probabilities(model, index)
        print(f"results: {self.folder / 'results'}")

    def _save_pictures(
        self, model: Segmentor, results: Sequence[EvalResult], contexts: Sequence[dict[str, Any]], num_images: int
    ) -> None:
        """Write <run>/pictures/{gain,loss,random}/<place>_<image>.png; pictures of another evaluation go to older/."""
        metric, dataset = self.config.test.metric, self.evaluator.dataset
        folder = claim_folder(self.folder / "pictures", {"metric": metric, "images": num_images, "rules": contexts})
        for kind, indices in choose_pictures(results, metric, num_images, self.config.seed).items():
            for place, index in enumerate(indices):
                panel = predict_panel(self.evaluator, model, index, metric)
                save_panel(panel, folder / kind, f"{place:02d}_{dataset.samples[index].name}")
        print(f"pictures: {folder}")

    def _save_probabilities(self, model: Segmentor, index: int) -> None:
        """Write <run>/probabilities/<image>.npy, (C, H, W) float32."""
        dataset = self.evaluator.dataset
        prob = self.evaluator.probabilities(model, dataset[index].image[None])[0]
        folder = self.folder / "probabilities"
        folder.mkdir(exist_ok=True)
        np.save(folder / f"{dataset.samples[index].name.replace('/', '_')}.npy", prob.cpu().numpy())

    def _check_start(self, start: int) -> None:
        """InputError if the processes see different checkpoints, or are given batches that batch norm cannot take."""
        starts = self.dist.gather(start)
        if len(set(starts)) > 1:
            raise InputError(
                f"{self.checkpoints}: got checkpoints of iterations {starts} on the processes, expected one "
                "folder that all of them share"
            )
        share = self.dist.split_batch(self.config.schedule.batch_size)
        synchronised = self.dist.world_size > 1 and self.dist.device.type != "cpu"
        if share == 1 and not synchronised and self.config.model.decoder in POOLING_DECODERS:
            raise InputError(
                f"schedule.batch_size: got 1 image a process, expected 2 or more: {self.config.model.decoder} "
                "normalises over the batch what it has pooled to one pixel"
            )

    def _new_model(self) -> Segmentor:
        """Random weights by the seed, the same on every rank, under the encoder's pretrained ones."""
        seed_everything(self.config.seed, 0, 0)
        return self._place(build_model(self.config.model, len(self.classes), self.evaluator.dataset.channels))

    def _model_of(self, checkpoint: Checkpoint) -> Segmentor:
        model = build_model(self.config.model, len(self.classes), self.evaluator.dataset.channels, pretrained=False)
        load_weights(model, checkpoint, self.config.to_dict()["model"], list(self.classes))
        return self._place(model)

    def _place(self, model: Segmentor) -> Segmentor:
        """To the device, channels last: on a CPU a training step of DeepLabV3+ takes 0.6 of the time."""
        return model.to(self.dist.device, memory_format=torch.channels_last)

    def _saver(self, raw_model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> Callable[[int], None]:
        def save(iteration: int) -> None:
            if not all(parameter.isfinite().all() for parameter in raw_model.parameters()):  # the same on every rank
                raise InputError(
                    f"optim.lr: got weights that are no numbers at iteration {iteration}, which are not saved; "
                    "try a lower rate"
                )
            self.dist.share_buffers(raw_model)
            if self.dist.is_main:
                save_checkpoint(
                    self.checkpoints,
                    iteration,
                    model=raw_model,
                    optimizer=optimizer,
                    scheduler=scheduler,
                    config=self.config.to_dict(),
                    classes=list(self.classes),
                    keep=self.config.schedule.keep_checkpoints,
                )

        return save

    def _validate(self, raw_model: nn.Module, iteration: int, logger: NullLogger) -> Evaluation:
        self.dist.share_buffers(raw_model)
        evaluation = self.evaluator(raw_model)
        scores = {result.rule: compute_scores(result.counts, result.cases) for result in evaluation.results}
        logger.scalars(iteration, {f"val/{r}/{name}": v for r, row in scores.items() for name, v in row.items()})
        for index in range(min(LOGGED_PICTURES, len(self.evaluator.dataset)) if self.dist.is_main else 0):
            logger.image(iteration, f"val/{index}", predict_panel(self.evaluator, raw_model, index))
        return evaluation

    def _describe(self, raw_model: nn.Module, num_images: int, start: int, end: int) -> str:
        millions = sum(p.numel() for p in raw_model.parameters()) / 1e6
        text = (
            f"{self.folder}: {millions:.1f} M parameters, {num_images} training images, "
            f"iterations {start} to {end}, {self.dist.world_size} process(es) on {self.dist.device.type}"
        )
        if self.dist.world_size > 1 and self.dist.device.type == "cpu":
            text += "\nbatch norm stays local to each process: PyTorch has no SyncBN for the CPU"
        return text


def describe_training(iteration: int, config: dict[str, Any]) -> dict[str, Any]:
    """What results say of the weights they judge: iterations done and the config they were trained under."""
    return {"iteration": iteration, **{name: config[name] for name in (*TRAINING_GROUPS, "seed")}}
