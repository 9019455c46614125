"""One run in its folder <output_dir>/<model>.<data>.<loss>.<schedule>.<optim>: a training session, and what loads and
evaluates trained weights."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exp.checkpoints.checkpoint import (
    BEST,
    Checkpoint,
    check_name,
    check_orientation,
    check_resumable,
    load_checkpoint,
    load_weights,
    unlike,
    weights_checksum,
)
from exp.checkpoints.checkpoint_files import find_checkpoint, remove_leftovers, set_aside_damaged
from exp.config.experiment import TRAINING_GROUPS, ExperimentConfig, dump_config
from exp.config.families import DECODER_TABLE
from exp.config.published import SHA256, weights_sha256
from exp.data.base import SegmentationDataset
from exp.data.loader import (
    Loader,
    SkipDamaged,
    build_train_loader,
    count_iterations,
    describe_images,
    describe_position,
)
from exp.data.registry import build_dataset
from exp.evaluation.evaluator import Evaluation, Evaluator, build_evaluator
from exp.evaluation.masks import MaskWriter
from exp.evaluation.temperature import describe_fit, draw_pixels, fit, load_temperature, split_half, spread
from exp.files.atomic import write_atomically
from exp.files.lock import own_folder
from exp.models import Segmentor, build_model, describe_origin, load_network_weights
from exp.models.published import build_published
from exp.provenance import describe_code, record_start
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.training.logger import Logger, build_logger
from exp.training.loop import train
from exp.training.saving import Saving, restore
from exp.training.step import TrainStep, build_step, seed_everything
from exp.training.validation import ScoreHistory, Validation

CHECKPOINTS = "checkpoints"
TEMPERATURE = Path("results") / "temperature.json"


@dataclass(frozen=True)
class Trained:
    """A model, how it is evaluated, and how it came about (`training`, as results tell it)."""

    config: ExperimentConfig
    evaluator: Evaluator
    model: nn.Module
    training: dict[str, Any]


@contextmanager
def locked(folder: Path, doing: str, dist: Dist) -> Iterator[Callable[[], None]]:
    """Inside, the run's folder is this program's alone; InputError, on every rank, where another one has it.

    Gives a function for rank 0 to call before it writes there: InputError if the folder is another's by then.
    """
    with ExitStack() as stack:
        claims = []
        dist.on_main(lambda: claims.append(stack.enter_context(own_folder(folder, doing))))
        yield claims[0].check if claims else lambda: None


def load_trained(
    config: ExperimentConfig, folder: Path, path: Path | None, data_dir: str | None, dist: Dist
) -> Trained:
    """The checkpoint at `path`, the run's best ("best") or its newest (None) -> the model in it.

    Where the test YAML names no window it is the crop of that training, whatever data.crop_size the flags have.
    A published network comes with its own weights.
    """
    if config.is_published:
        evaluator = build_evaluator(config, data_dir, dist)
        tell_old_slices(evaluator.dataset, dist)
        model = build_published(config.model, evaluator.dataset.classes, evaluator.dataset.channels)
        network = {**config.model.identity, SHA256: weights_sha256(model.files)}
        return Trained(config, evaluator, model.to(dist.device), {"published": network})
    if path == Path(BEST):
        path = folder / CHECKPOINTS / f"{BEST}.pt"
    newest = path is None
    path = path or dist.on_main(lambda: find_checkpoint(folder / CHECKPOINTS))
    if path is None:
        raise InputError(
            f"{folder / CHECKPOINTS}: got no checkpoint, expected one: train first (the same flags without "
            "--test-only), or name one with --model_checkpoint"
        )
    checkpoint = load_checkpoint(path)
    if newest:
        check_name(checkpoint)
    if dist.is_main:
        print(f"weights: {path}, after iteration {checkpoint.iteration}", flush=True)
    crop = tuple(checkpoint.config["data"]["crop_size"])
    if config.test.crop_size not in (None, crop) and config.given_test.crop_size is None and dist.is_main:
        print(
            f"windows of {crop[0]}x{crop[1]} as in the training of {path}, not data.crop_size "
            f"{list(config.data.crop_size)} (test.crop_size sets others)"
        )
    config = config.with_window(crop)
    evaluator = build_evaluator(config, data_dir, dist)
    tell_old_slices(evaluator.dataset, dist)
    check_orientation(checkpoint, evaluator.dataset.orientations)
    model = build_network(config, evaluator.dataset, dist, checkpoint, config.test.weights)
    return _trained(config, evaluator, model, checkpoint.iteration, checkpoint.config)


def tell_old_slices(dataset: SegmentationDataset, dist: Dist) -> None:
    """Rank 0: a warning about slices that an earlier version cut as their files store them."""
    volumes = getattr(dataset, "volumes", None)
    if dist.is_main and volumes and dataset.orientations not in ((), (volumes.orientation,)):
        found = ", ".join(dataset.orientations)
        print(
            f"warning: {dataset.root / volumes.folder}: slices that an earlier version cut as they are stored "
            f"({found}; now all are cut as {volumes.orientation})",
            file=sys.stderr,
            flush=True,
        )


def build_network(
    config: ExperimentConfig, dataset: SegmentationDataset, dist: Dist, checkpoint: Checkpoint | None, weights: str
) -> Segmentor:
    """The network on this process's device, with a checkpoint's weights ('raw' or 'ema'), or with random ones by the
    seed, the same on every rank, under pretrained ones or those of model.init_from."""
    seed_everything(config.seed, 0, 0)
    classes, origin = list(dataset.classes), config.model.init_from
    fetches = checkpoint is None and origin is None
    if checkpoint is None and dist.is_main:
        print(describe_origin(config.model), flush=True)
    model = build_model(config.model, len(classes), dataset.channels, pretrained=fetches)
    if checkpoint is not None:
        load_weights(model, checkpoint, config.to_dict()["model"], classes, weights)
    elif origin is not None:
        load_network_weights(model, origin, classes)
    layout = torch.channels_last if config.schedule.channels_last else torch.contiguous_format
    return model.to(dist.device, memory_format=layout)


def _trained(
    config: ExperimentConfig, evaluator: Evaluator, model: nn.Module, iteration: int, trained_under: dict[str, Any]
) -> Trained:
    """trained_under: the config of the iterations done."""
    groups = {name: trained_under[name] for name in (*TRAINING_GROUPS, "seed")}
    return Trained(config, evaluator, model, {"iteration": iteration, "weights": config.test.weights, **groups})


def fit_temperature(
    trained: Trained, folder: Path, part: str, data_dir: str | None, check_owner: Callable[[], None]
) -> None:
    """Fit on the "train" images, or on "val-part", and write results/temperature.json; rank 0 prints a line."""
    config, evaluator, dist = trained.config, trained.evaluator, trained.evaluator.dist
    fit_on, check_on = evaluator.dataset, evaluator.dataset
    if part == "train":
        data = config.data
        plain = replace(data, val_split=data.train_split, val_samples=data.train_samples)  # not augmented
        fit_on = build_dataset(plain, data_dir, "val")
        fit_indices, check_indices = spread(range(len(fit_on))), spread(range(len(check_on)))
    else:
        fit_indices, check_indices = split_half(check_on)
    fitted, held_out = (
        draw_pixels(trained.model, dataset, indices, evaluator.inference, evaluator.normalize, config.seed, dist)
        for dataset, indices in ((fit_on, fit_indices), (check_on, check_indices))
    )
    content = describe_fit(fit(fitted), fitted, held_out)
    if dist.is_main:
        plain = config.to_dict()
        content |= {"part": part, "weights_checksum": weights_checksum(trained.model), "training": trained.training}
        content |= {"config": {"data": plain["data"], "test": plain["test"]}, **describe_code()}
        check_owner()
        (folder / TEMPERATURE).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / TEMPERATURE, json.dumps(content, indent=2) + "\n")
        before, after = (content["held_out"][when]["ECED"] for when in ("before", "after"))
        print(
            f"temperature {content['temperature']:.4f} fitted on {part}; ECED of other images {before:.2f} -> "
            f"{after:.2f} ({folder / TEMPERATURE}); from now on test.temperature=fitted uses it"
        )
    dist.gather(None)  # the file is there before another process reads it


def with_fitted_temperature(trained: Trained, folder: Path) -> Trained:
    """Under the temperature that was fitted for these weights, if the test YAML asks for that."""
    if trained.config.test.temperature != "fitted":
        return trained
    temperature = load_temperature(folder / TEMPERATURE, weights_checksum(trained.model))
    config = replace(trained.config, test=replace(trained.config.test, temperature=temperature))
    inference = replace(trained.evaluator.inference, temperature=temperature)
    return replace(trained, config=config, evaluator=replace(trained.evaluator, inference=inference))


def evaluate(trained: Trained, folder: Path, save_masks: bool) -> Evaluation:
    """A trained model -> its evaluation, which also writes <run>/masks/<rule>/ if asked to."""
    return trained.evaluator(trained.model, mask_writer(trained, folder) if save_masks else None)


def mask_writer(trained: Trained, folder: Path) -> MaskWriter:
    config, checksum = trained.config.to_dict(), weights_checksum(trained.model)
    origins = {
        rule["name"]: {
            "training": trained.training,
            "weights_checksum": checksum,
            "config": {"data": config["data"], "test": config["test"], "predict": rule},
        }
        for rule in config["predict"]
    }
    return MaskWriter(folder / "masks", trained.evaluator.dataset, origins, trained.evaluator.dist)


def train_run(
    config: ExperimentConfig,
    folder: Path,
    data_dir: str | None,
    dist: Dist,
    save_masks: bool,
    check_owner: Callable[[], None],
    given: Path | None = None,
) -> tuple[Trained, Evaluation]:
    """Train to the end of the schedule, and evaluate what came out.

    From the newest checkpoint, if there is one, or from the `given` one of the same training, if that is further.
    check_owner: called on rank 0 before it writes to the folder; InputError where that is another program's by then.
    """
    if config.test.temperature == "fitted":
        raise InputError("test.temperature: got fitted, expected a number in training: it is for --test-only")
    if config.test.weights == "ema" and config.optim.ema_decay is None:
        raise InputError("test.weights: got ema, expected raw where optim.ema_decay keeps no moving average")
    evaluator = build_evaluator(config, data_dir, dist)
    tell_old_slices(evaluator.dataset, dist)
    dataset = build_dataset(config.data, data_dir, "train", config.seed)
    if dist.is_main:
        place = "" if data_dir is None else f" from {data_dir}"
        print(
            f"{config.data.name}{place}: {len(dataset)} training and {len(evaluator.dataset)} validation images",
            flush=True,
        )
    return TrainingSession(config, folder, evaluator, dataset, dist, save_masks, check_owner, given).run()


@dataclass(frozen=True)
class TrainingSession:
    """The training of a run from where it stands to the end of its schedule, on every rank alike."""

    config: ExperimentConfig
    folder: Path
    evaluator: Evaluator
    dataset: SegmentationDataset
    dist: Dist
    save_masks: bool
    check_owner: Callable[[], None]
    given: Path | None = None  # a checkpoint to resume from; never written to

    def run(self) -> tuple[Trained, Evaluation]:
        """What was trained, and its evaluation."""
        config, dist = self.config, self.dist
        end = count_iterations(config.schedule, len(self.dataset))
        checkpoint, history = self._resume()
        start = checkpoint.iteration if checkpoint else 0
        self._check_start(start)
        readable = SkipDamaged(self.dataset, config.data.crop_size) if config.data.damaged == "skip" else self.dataset
        batches = build_train_loader(readable, config.schedule, start, end, config.seed, dist)
        if checkpoint and (history.stopped or end in checkpoint.training["validations"]["scores"]):
            if dist.is_main:
                print(f"{checkpoint.path}: training is complete ({start} iterations); evaluating")
            model = build_network(config, self.evaluator.dataset, dist, checkpoint, config.test.weights)
            trained = _trained(config, self.evaluator, model, start, checkpoint.config)
            return trained, evaluate(trained, self.folder, self.save_masks)
        if checkpoint and dist.is_main:
            print(f"resuming from {checkpoint.path}, after iteration {start}", flush=True)
        raw_model = build_network(config, self.evaluator.dataset, dist, checkpoint, "raw")
        if start == 0:
            self.evaluator.read_all()  # a damaged image should not wait for the end of the training
        step = build_step(config, raw_model, self.evaluator.normalize, end, dist)
        if checkpoint:
            restore(step, checkpoint, dist)
            checkpoint = None  # a training's whole state: its memory is wanted
        if dist.is_main:
            remove_leftovers(self.folder / CHECKPOINTS)
            record_start(self.folder, config.to_dict(), dump_config(config), start, dist.world_size)
        with build_logger(self.folder, start, end, dist.is_main, self.check_owner) as logger:
            logger.message(self._describe(raw_model, start, end))
            return self._run_loop(step, batches, history, start, end, logger)

    def _run_loop(
        self, step: TrainStep, batches: Loader, history: ScoreHistory, start: int, end: int, logger: Logger
    ) -> tuple[Trained, Evaluation]:
        """Iterations start to end and their validations, then the evaluation of what came out."""
        config = self.config
        saving = Saving(config, self.folder / CHECKPOINTS, step, history, self.dataset, self.check_owner)
        validation = Validation(
            model=step.ema.module if config.test.weights == "ema" else step.raw_model,
            evaluator=self.evaluator,
            metric=config.test.metric,
            history=history,
            save_best=saving.save_best if config.schedule.val_iters else None,
            logger=logger,
            dist=self.dist,
            sink=lambda at: mask_writer(trained_until(at), self.folder) if self.save_masks and at == end else None,
        )
        schedule, scores = config.schedule, history.scores

        def trained_until(iteration: int) -> Trained:
            return _trained(config, self.evaluator, validation.model, iteration, config.to_dict())

        def due(iteration: int) -> bool:
            regular = schedule.val_iters is not None and iteration % schedule.val_iters == 0
            return iteration not in scores and iteration > 0 and (regular or iteration == end)

        # A checkpoint is written before its validation; a run that was interrupted in between makes up for that.
        stop, done = due(start) and validation(start), start
        if not stop:
            done = train(
                step,
                batches,
                schedule,
                start=start,
                end=end,
                seed=config.seed,
                save_iters=saving.intervals,
                names=[sample.name for sample in self.dataset.samples],
                save=saving,
                validate=validation,
                logger=logger,
            )
        if due(done):
            validation(done)
        saving.export_last(done)
        saving(done)  # again: the checkpoint says that its weights are evaluated, and that nothing is left to do
        if faults := step.faults.describe():
            logger.message(faults)
        trained = trained_until(done)
        if self.save_masks and done < end:  # that it is the last one showed only after the validation
            return trained, evaluate(trained, self.folder, save_masks=True)
        return trained, validation.evaluate(done)

    def _resume(self) -> tuple[Checkpoint | None, ScoreHistory]:
        """The checkpoint to resume from, if any, and the validations so far; InputError if it is not this run's."""
        config, folder = self.config, self.folder / CHECKPOINTS
        rule, metric, weights = config.predict[0].name, config.test.metric, config.test.weights
        images = f"{len(self.evaluator.dataset)} images of {config.data.val_split}"
        history = ScoreHistory(f"{metric} of {rule}, {weights} weights, {images}", config.schedule.early_stop)
        path = self.dist.on_main(lambda: find_checkpoint(folder))
        checkpoint = None if path is None else load_checkpoint(path)
        if checkpoint is not None:
            check_name(checkpoint)
        if self.given is not None:
            checkpoint = self._further(checkpoint)
        if checkpoint is None:
            if len(self.dataset.orientations) > 1:
                raise InputError(
                    f"{self.dataset.root}: got slices that an earlier version cut as they are stored, in "
                    f"{', '.join(self.dataset.orientations)}, expected one orientation: prepare them again (DATA.md)"
                )
            return None, history
        check_orientation(checkpoint, self.dataset.orientations)
        check_resumable(checkpoint, config.to_dict(), describe_images(self.dataset))
        schedule, at = config.schedule, checkpoint.iteration
        place = describe_position(self.dataset, schedule.batch_size, at)
        if checkpoint.training["sampler"] != place or not 0 < at <= count_iterations(schedule, len(self.dataset)):
            raise unlike(checkpoint, f"iteration {at}, sampler {checkpoint.training['sampler']}")
        if self.dist.is_main:
            if checkpoint.path != self.given:
                set_aside_damaged(folder, checkpoint.path)
            before, now = checkpoint.training["world_size"], self.dist.world_size
            if before != now:
                print(
                    f"{checkpoint.path}: resumed by {now} process(es) after {before}: the same images in the "
                    "same order; sums are rounded otherwise"
                )
        history.load_state_dict(checkpoint.training["validations"])
        return checkpoint, history

    def _further(self, own: Checkpoint | None) -> Checkpoint:
        """The run's newest checkpoint or the given one: which is further, and of two as far the run's."""
        if self.given.resolve().parent == (self.folder / CHECKPOINTS).resolve():
            raise InputError(
                f"--model_checkpoint: {self.given}: got a checkpoint of the run itself, which removes the older ones; "
                "expected a copy elsewhere, or no such flag: the run resumes from its newest"
            )
        given = load_checkpoint(self.given)
        if own is None or given.iteration > own.iteration:
            return given
        if self.dist.is_main:
            print(f"{own.path}: resumed in place of {self.given}: it is as far or further")
        return own

    def _check_start(self, start: int) -> None:
        """InputError if the processes see different checkpoints, or are given batches that batch norm cannot take."""
        starts = self.dist.gather(start)
        if len(set(starts)) > 1:
            raise InputError(
                f"{self.folder / CHECKPOINTS}: got checkpoints of iterations {starts} on the processes, expected one "
                "folder that all of them share"
            )
        schedule, model = self.config.schedule, self.config.model
        share, rest = divmod(self.dist.split_batch(schedule.batch_size), schedule.accumulation)
        if rest or not share:
            raise InputError(
                f"schedule.accumulation: got {schedule.accumulation} for batches of {schedule.batch_size} on "
                f"{self.dist.world_size} process(es), expected a divisor of each process's share"
            )
        synchronised = self.dist.world_size > 1 and self.dist.device.type != "cpu"
        if share == 1 and not synchronised and model.variant in DECODER_TABLE[model.decoder].pools:
            raise InputError(
                f"schedule.batch_size: got 1 image per process (and micro-batch), expected 2 or more: {model.decoder} "
                "normalises over the batch what it has pooled to one pixel"
            )

    def _describe(self, raw_model: nn.Module, start: int, end: int) -> str:
        millions = sum(p.numel() for p in raw_model.parameters()) / 1e6
        text = (
            f"{self.folder}: {millions:.1f} M parameters, {len(self.dataset)} training images, "
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
