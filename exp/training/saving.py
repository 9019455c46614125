"""When and what a training saves, and how it is resumed from that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from exp.checkpoints.checkpoint import LAST, Checkpoint, Saver, unlike
from exp.config.experiment import ExperimentConfig, training_digest
from exp.data.base import SegmentationDataset
from exp.data.loader import describe_position, iterations_per_epoch
from exp.provenance import describe_code
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.training.step import TrainStep
from exp.training.validation import ScoreHistory


class Saving:
    """Saves a training in `folder`; to be called on every rank, rank 0 writes.

    intervals: the numbers of iterations after whose multiples a checkpoint is due. check_owner: called before each
    file; InputError where the folder is another program's by then.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        folder: Path,
        step: TrainStep,
        history: ScoreHistory,
        dataset: SegmentationDataset,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self.step, self.history, self.dataset, self.dist = step, history, dataset, step.dist
        self.check_owner = check_owner
        self.schedule, plain = config.schedule, config.to_dict()
        self.intervals = [self.schedule.save_iters]
        if self.schedule.save_epochs is not None:
            epoch = iterations_per_epoch(len(dataset), self.schedule.batch_size)
            self.intervals.append(self.schedule.save_epochs * epoch)
        facts = {"config_digest": training_digest(plain), "processes": self.dist.world_size, **describe_code()}
        orientation = dataset.orientations[0] if len(dataset.orientations) == 1 else None
        self.saver = Saver(folder, step.raw_model, step.ema, plain, list(dataset.classes), facts, orientation)

    def __call__(self, iteration: int) -> None:
        """Write the checkpoint after so many iterations: all that decides the steps to come."""
        self._check_weights(iteration)
        dist, step = self.dist, self.step
        images = dist.gather(step.faults.images)
        training = {
            **step.state_dict(),
            "validations": self.history.state_dict(),
            "sampler": self._position(iteration),
            "world_size": dist.world_size,
        }
        training["faults"]["images"] = sum(images)
        epoch = training["sampler"]["epoch"]
        self._write(lambda: self.saver.save(iteration, epoch, training, self.schedule.keep_checkpoints))

    def save_best(self, iteration: int) -> None:
        """Write best.pt and best.safetensors."""
        self._check_weights(iteration)
        self._write(lambda: self.saver.save_best(iteration, self._position(iteration)["epoch"]))

    def export_last(self, iteration: int) -> None:
        """Write last.safetensors; after a save of the same weights."""
        self._write(lambda: self.saver.export(LAST, iteration, self._position(iteration)["epoch"]))

    def _write(self, write: Callable[[], object]) -> None:
        def checked() -> None:
            self.check_owner()
            write()

        self.dist.on_main(checked)

    def _position(self, iteration: int) -> dict[str, Any]:
        return describe_position(self.dataset, self.schedule.batch_size, iteration)

    def _check_weights(self, iteration: int) -> None:
        """Every rank: the buffers of rank 0, which are saved; InputError for non-finite weights."""
        step = self.step
        if not all(parameter.isfinite().all() for parameter in step.raw_model.parameters()):  # the same on every rank
            raise InputError(
                f"optim.lr: got non-finite weights at iteration {iteration}, which are not saved; try a lower rate"
            )
        for model in (step.raw_model, step.ema):
            if model is not None:
                self.dist.share_buffers(model)


def restore(step: TrainStep, checkpoint: Checkpoint, dist: Dist) -> None:
    """Resume from the checkpoint's state; the damaged images before it are counted on rank 0.

    InputError, before anything of it is loaded, where it is not what this run would have saved.
    """
    if difference := step.find_difference(checkpoint.training, checkpoint.ema):
        raise unlike(checkpoint, difference)
    if (at := checkpoint.training["scheduler"]["last_epoch"]) != checkpoint.iteration:
        raise unlike(checkpoint, f"a learning rate of iteration {at} after {checkpoint.iteration}")
    step.load_state_dict(checkpoint.training, checkpoint.ema)
    if not dist.is_main:
        step.faults.images = 0
