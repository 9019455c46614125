"""One run in its folder: train (or go on training), load what was trained, evaluate it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exp.checkpoints.checkpoint import (
    BEST,
    Checkpoint,
    check_resumable,
    load_checkpoint,
    load_weights,
    weights_checksum,
)
from exp.checkpoints.checkpoint_files import find_checkpoint, remove_leftovers, set_aside_damaged
from exp.config.experiment import TRAINING_GROUPS, ExperimentConfig
from exp.config.families import DECODER_TABLE
from exp.data.base import SegmentationDataset
from exp.data.loader import Loader, SkipDamaged, build_train_loader, count_iterations, describe_images
from exp.data.registry import build_dataset
from exp.evaluation.evaluator import Evaluation, Evaluator
from exp.evaluation.inference import build_inference
from exp.evaluation.masks import MaskWriter
from exp.evaluation.temperature import describe_fit, draw_pixels, fit, load_temperature, split_half, spread
from exp.files.atomic import write_atomically
from exp.files.lock import FolderLock
from exp.models import Segmentor, build_model
from exp.provenance import describe_code, record_start
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.training.logger import NullLogger, build_logger
from exp.training.loop import Intervals, train
from exp.training.precision import Autocast
from exp.training.saving import Saving, build_saving, restore
from exp.training.step import TrainStep, build_step, seed_everything
from exp.training.validation import ScoreHistory, Validation


@dataclass(frozen=True)
class Run:
    """An experiment in its folder <output_dir>/<model>.<data>.<loss>.<schedule>.<optim>."""

    config: ExperimentConfig
    folder: Path
    evaluator: Evaluator
    dist: Dist
    save_masks: bool = False  # of the evaluation that is reported

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.evaluator.dataset.classes

    @contextmanager
    def locked(self, doing: str) -> Iterator[None]:
        """Inside, the run's folder is this program's alone; InputError, on every rank, where another one has it."""
        lock = FolderLock(self.folder, ".lock", doing)
        self.dist.on_main(lock.acquire)
        try:
            yield
        finally:
            if self.dist.is_main:
                lock.release()

    def load(self, path: Path | None) -> tuple["Run", nn.Module, dict[str, Any]]:
        """The checkpoint at `path`, the run's best ("best") or its newest (None).

        Returns the run that judges it, the model, and how it was trained. Where the test YAML names no window it is
        the crop of that training, whatever data.crop_size the flags have.
        """
        if path == Path(BEST):
            path = self.checkpoints / f"{BEST}.pt"
        path = path or self.dist.on_main(lambda: find_checkpoint(self.checkpoints))
        if path is None:
            raise InputError(
                f"{self.checkpoints}: got no checkpoint, expected one: train first (the same flags "
                "without --test-only), or name one with --model_checkpoint"
            )
        checkpoint = load_checkpoint(path)
        train_crop = tuple(checkpoint.config["data"]["crop_size"])
        if self.config.test.crop_size is None and train_crop != self.config.data.crop_size and self.dist.is_main:
            print(
                f"windows of {train_crop[0]}x{train_crop[1]} as in the training of {path}, not data.crop_size "
                f"{list(self.config.data.crop_size)} (test.crop_size sets others)"
            )
        config = self.config.with_window(train_crop)
        evaluator = replace(self.evaluator, inference=build_inference(config.test))
        run = replace(self, config=config, evaluator=evaluator)
        model = self._model_of(checkpoint, config.test.weights)
        return run, self._judged(model), self._describe_training(checkpoint.iteration, checkpoint.config)

    def fit_temperature(self, model: nn.Module, training: dict[str, Any], part: str, data_dir: str | None) -> None:
        """Fit on the "train" images, or on "val-part", and write results/temperature.json; rank 0 prints a line."""
        data, judge = self.config.data, self.evaluator
        fit_on, check_on = judge.dataset, judge.dataset
        if part == "train":
            plain = replace(data, val_split=data.train_split, val_samples=data.train_samples)  # not augmented
            fit_on = build_dataset(plain, data_dir, "val")
            fit_indices, check_indices = spread(range(len(fit_on))), spread(range(len(check_on)))
        else:
            fit_indices, check_indices = split_half(check_on)
        fitted, held_out = (
            draw_pixels(model, dataset, indices, judge.inference, judge.normalize, self.config.seed, self.dist)
            for dataset, indices in ((fit_on, fit_indices), (check_on, check_indices))
        )
        content = describe_fit(fit(fitted), fitted, held_out)
        if self.dist.is_main:
            origin = {"part": part, "weights_checksum": weights_checksum(model), "training": training}
            config = self.config.to_dict()
            origin |= {"config": {"data": config["data"], "test": config["test"]}, **describe_code()}
            self.temperature_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.temperature_file, json.dumps({**content, **origin}, indent=2) + "\n")
            before, after = (content["held_out"][when]["ECED"] for when in ("before", "after"))
            print(
                f"temperature {content['temperature']:.4f} fitted on {part}; ECED of other images "
                f"{before:.2f} -> {after:.2f} ({self.temperature_file}); from now on test.temperature=fitted uses it"
            )
        self.dist.gather(None)  # the file is there before another process reads it

    @property
    def temperature_file(self) -> Path:
        return self.folder / "results" / "temperature.json"

    def with_temperature(self, model: nn.Module) -> "Run":
        """The run under the fitted temperature, if the test YAML asks for that."""
        if self.config.test.temperature != "fitted":
            return self
        temperature = load_temperature(self.temperature_file, weights_checksum(model))
        config = replace(self.config, test=replace(self.config.test, temperature=temperature))
        return replace(self, config=config, evaluator=replace(self.evaluator, inference=build_inference(config.test)))

    def evaluate(self, model: nn.Module, training: dict[str, Any]) -> Evaluation:
        """The model, how it was trained -> its evaluation, which writes masks if the run is to save them."""
        return self.evaluator(model, self._mask_writer(model, training))

    def _mask_writer(self, model: nn.Module, training: dict[str, Any]) -> MaskWriter | None:
        """What writes <run>/masks/<rule>/ in an evaluation; None where no masks are asked for."""
        if not self.save_masks:
            return None
        config, checksum = self.config.to_dict(), weights_checksum(model)
        origins = {
            rule["name"]: {
                "training": training,
                "weights_checksum": checksum,
                "config": {"data": config["data"], "test": config["test"], "predict": rule},
            }
            for rule in config["predict"]
        }
        return MaskWriter(self.folder / "masks", self.evaluator.dataset, origins, self.dist)

    def train(self, data_dir: str | None) -> tuple[nn.Module, dict[str, Any], Evaluation]:
        """Train to the end of the schedule, from the newest checkpoint if there is one, and evaluate.

        Returns the model that was judged, how it was trained and its evaluation.
        """
        config, dist = self.config, self.dist
        if config.test.temperature == "fitted":
            raise InputError("test.temperature: got fitted, expected a number in training: it is for --test-only")
        dataset = build_dataset(config.data, data_dir, "train", config.seed)
        end = count_iterations(config.schedule, len(dataset))
        checkpoint, history = self._resume(dataset)
        start = checkpoint.iteration if checkpoint else 0
        self._check_start(start)
        readable = SkipDamaged(dataset, config.data.crop_size) if config.data.damaged == "skip" else dataset
        loader = build_train_loader(readable, config.schedule, start, end, config.seed, dist)
        if checkpoint and (history.stopped or end in checkpoint.training["validations"]["scores"]):
            return self._evaluate_trained(checkpoint)
        raw_model = self._model_of(checkpoint, "raw") if checkpoint else self._new_model()
        if start == 0:
            self.evaluator.read_all()  # a damaged image should not wait for the end of the training
        step = build_step(config, raw_model, self.evaluator.normalize, end, dist)
        if checkpoint:
            restore(step, checkpoint, dist)
        if dist.is_main:
            remove_leftovers(self.checkpoints)
            record_start(self.folder, config, start, dist.world_size)
        with build_logger(self.folder, start, end, dist.is_main) as logger:
            logger.message(self._describe(raw_model, len(dataset), start, end))
            saving = build_saving(config, self.checkpoints, step, history, dataset, dist)
            validation = self._validation(step, history, end, saving, logger)
            return self._run_loop(step, loader, validation, saving, start, end, logger)

    def _run_loop(
        self,
        step: TrainStep,
        loader: Loader,
        validation: Validation,
        saving: Saving,
        start: int,
        end: int,
        logger: NullLogger,
    ) -> tuple[nn.Module, dict[str, Any], Evaluation]:
        """Iterations start to end, then the evaluation of what came out."""
        schedule, scores = self.config.schedule, validation.history.scores

        def due(iteration: int) -> bool:
            regular = schedule.val_iters is not None and iteration % schedule.val_iters == 0
            return iteration not in scores and iteration > 0 and (regular or iteration == end)

        # A checkpoint is written before its validation; a run that was interrupted in between goes on with that.
        stop, done = due(start) and validation(start), start
        if not stop:
            done = train(
                step,
                loader,
                start=start,
                end=end,
                batch_size=schedule.batch_size,
                seed=self.config.seed,
                intervals=Intervals(schedule.log_iters, saving.intervals(), schedule.val_iters),
                nonfinite_limit=schedule.nonfinite_limit,
                names=[sample.name for sample in saving.dataset.samples],
                save=saving,
                validate=validation,
                logger=logger,
                dist=self.dist,
            )
        if due(done):
            validation(done)
        saving.export_last(done)
        saving(done)  # again: the checkpoint says that its weights are judged, and that nothing is left to do
        if faults := step.faults.describe():
            logger.message(faults)
        model, training = validation.model, self._describe_training(done, self.config.to_dict())
        if self.save_masks and done < end:  # that it is the last one showed only after the validation
            return model, training, self.evaluate(model, training)
        return model, training, validation.evaluate(done)

    def _resume(self, dataset: SegmentationDataset) -> tuple[Checkpoint | None, ScoreHistory]:
        """The newest checkpoint, if any, and the validations so far; InputError if it is not this run's."""
        config = self.config
        if config.test.weights == "ema" and config.optim.ema_decay is None:
            raise InputError("test.weights: got ema, expected raw where optim.ema_decay keeps no moving average")
        rule, metric, weights = config.predict[0].name, config.test.metric, config.test.weights
        images = f"{len(self.evaluator.dataset)} images of {config.data.val_split}"
        history = ScoreHistory(f"{metric} of {rule}, {weights} weights, {images}", config.schedule.early_stop)
        path = self.dist.on_main(lambda: find_checkpoint(self.checkpoints))
        if path is None:
            return None, history
        checkpoint = load_checkpoint(path)
        check_resumable(checkpoint, config.to_dict(), describe_images(dataset))
        if self.dist.is_main:
            set_aside_damaged(self.checkpoints, path)
            before, now = checkpoint.training["world_size"], self.dist.world_size
            if before != now:
                print(
                    f"{path}: goes on with {now} process(es) after {before}: the same images in the same order; sums "
                    "are rounded otherwise"
                )
        history.load_state_dict(checkpoint.training["validations"])
        return checkpoint, history

    def _evaluate_trained(self, checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, Any], Evaluation]:
        """What train() returns where there is nothing left to train."""
        done = checkpoint.iteration
        if self.dist.is_main:
            print(f"{checkpoint.path}: training is complete ({done} iterations); evaluating")
        model = self._judged(self._model_of(checkpoint, self.config.test.weights))
        training = self._describe_training(done, checkpoint.config)
        return model, training, self.evaluate(model, training)

    def _validation(
        self, step: TrainStep, history: ScoreHistory, end: int, saving: Saving, logger: NullLogger
    ) -> Validation:
        config = self.config
        model = self._judged(step.ema.module if config.test.weights == "ema" else step.raw_model)

        def sink(iteration: int) -> MaskWriter | None:
            training = self._describe_training(iteration, config.to_dict())
            return self._mask_writer(model, training) if iteration == end else None

        return Validation(
            model=model,
            evaluator=self.evaluator,
            metric=config.test.metric,
            history=history,
            save_best=saving.save_best if config.schedule.val_iters else None,
            logger=logger,
            dist=self.dist,
            sink=sink,
        )

    def _check_start(self, start: int) -> None:
        """InputError if the processes see different checkpoints, or are given batches that batch norm cannot take."""
        starts = self.dist.gather(start)
        if len(set(starts)) > 1:
            raise InputError(
                f"{self.checkpoints}: got checkpoints of iterations {starts} on the processes, expected one "
                "folder that all of them share"
            )
        schedule, decoder = self.config.schedule, self.config.model.decoder
        share, rest = divmod(self.dist.split_batch(schedule.batch_size), schedule.accumulation)
        if rest or not share:
            raise InputError(
                f"schedule.accumulation: got {schedule.accumulation} for batches of {schedule.batch_size} on "
                f"{self.dist.world_size} process(es), expected a divisor of each process's share"
            )
        synchronised = self.dist.world_size > 1 and self.dist.device.type != "cpu"
        if share == 1 and not synchronised and DECODER_TABLE[decoder].pools:
            raise InputError(
                f"schedule.batch_size: got 1 image a process (and micro-batch), expected 2 or more: {decoder} "
                "normalises over the batch what it has pooled to one pixel"
            )

    def _new_model(self) -> Segmentor:
        """Random weights by the seed, the same on every rank, under the encoder's pretrained ones."""
        seed_everything(self.config.seed, 0, 0)
        return self._place(build_model(self.config.model, len(self.classes), self.evaluator.dataset.channels))

    def _model_of(self, checkpoint: Checkpoint, weights: str) -> Segmentor:
        model = build_model(self.config.model, len(self.classes), self.evaluator.dataset.channels, pretrained=False)
        load_weights(model, checkpoint, self.config.to_dict()["model"], list(self.classes), weights)
        return self._place(model)

    def _place(self, model: Segmentor) -> Segmentor:
        layout = torch.channels_last if self.config.schedule.channels_last else torch.contiguous_format
        return model.to(self.dist.device, memory_format=layout)

    def _judged(self, model: nn.Module) -> nn.Module:
        """The model as the evaluator gets it: in float32, or in the test YAML's mixed precision."""
        amp = self.config.test.amp
        return model if amp == "off" else Autocast(model, amp, self.dist.device)

    def _describe(self, raw_model: nn.Module, num_images: int, start: int, end: int) -> str:
        millions = sum(p.numel() for p in raw_model.parameters()) / 1e6
        text = (
            f"{self.folder}: {millions:.1f} M parameters, {num_images} training images, "
            f"iterations {start} to {end}, {self.dist.world_size} process(es) on {self.dist.device.type}"
        )
        if self.dist.world_size > 1 and self.dist.device.type == "cpu":
            text += "\nbatch norm stays local to each process: PyTorch has no SyncBN for the CPU"
        if self.config.loss.dataset_weight and self.config.schedule.accumulation > 1:
            text += (
                "\nthe loss over the data set is taken over each micro-batch: schedule.accumulation="
                f"{self.config.schedule.accumulation} is not the loss of the whole batch"
            )
        return text

    def _describe_training(self, iteration: int, config: dict[str, Any]) -> dict[str, Any]:
        """What results say of the weights they judge: which, iterations done, the config they were trained under."""
        groups = {name: config[name] for name in (*TRAINING_GROUPS, "seed")}
        return {"iteration": iteration, "weights": self.config.test.weights, **groups}
