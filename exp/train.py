"""One training loop, explicit arguments."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from exp.config import ExperimentConfig
from exp.data.loader import Batch
from exp.distributed import Dist
from exp.errors import InputError
from exp.logger import Meter, NullLogger
from exp.losses import build_criterion
from exp.models import Segmentor
from exp.optim import build_ema, build_optimizer, build_scheduler
from exp.precision import autocast, build_scaler


@dataclass(frozen=True)
class Intervals:
    """Iterations between logging, saving and validating; val None: never."""

    log: int
    save: int
    val: int | None


@dataclass
class TrainStep:
    """One step of the optimiser on this process's share of a global batch: forward, backward, clip, update, average.

    model: the wrapped one, so that DDP averages the gradients; raw_model: the same weights, without a wrapper.
    accumulation: the share is cut into so many micro-batches, one forward and backward each; the loss is divided by
    what counts in the whole global batch, so the gradients are those of the uncut one.
    """

    model: nn.Module
    raw_model: nn.Module
    criterion: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    normalize: Callable[[Tensor], Tensor]
    dist: Dist
    amp: str = "off"
    accumulation: int = 1
    clip_norm: float | None = None
    ema: AveragedModel | None = None

    def __post_init__(self) -> None:
        self.scaler = build_scaler(self.amp, self.dist.device)
        self.grad_norm: Tensor | None = None  # of the last step, where gradients are clipped

    def __call__(self, batch: Batch) -> Tensor:
        """(B, channels, H, W) images and (B, H, W) labels -> this process's loss, (), detached; no wait."""
        self.optimizer.zero_grad(set_to_none=True)
        counted = self.dist.mean(self.criterion.count(batch.label))
        parts = list(zip(batch.image.chunk(self.accumulation), batch.label.chunk(self.accumulation), strict=True))
        losses = []
        for part, (image, label) in enumerate(parts, start=1):
            with self.dist.gradient_sync(self.model, enabled=part == len(parts)):
                losses.append(self._backward(image, label, counted))
        self._update()
        return torch.stack(losses).sum()

    def _backward(self, image: Tensor, label: Tensor, counted: Tensor) -> Tensor:
        with autocast(self.amp, self.dist.device):
            outputs = self.model(self.normalize(image))
        loss = self.criterion(outputs, label, counted)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _update(self) -> None:
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            self.grad_norm = nn.utils.clip_grad_norm_(self.raw_model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)  # leaves out a step whose fp16 gradients overflowed
        self.scaler.update()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.raw_model)

    def rates(self) -> dict[str, float]:
        """The learning rate of every parameter group in the step that comes next."""
        return {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}

    def state_dict(self) -> dict[str, Any]:
        """All that decides the steps to come, but for the weights and their average."""
        return {name: getattr(self, name).state_dict() for name in ("optimizer", "scheduler", "scaler")}

    def load_state_dict(self, state: dict[str, Any], ema: dict[str, Any] | None) -> None:
        """Go on from what state_dict returned and, where an average is kept, from its state dict."""
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        if self.ema is not None:
            self.ema.load_state_dict(ema)


def build_step(
    config: ExperimentConfig,
    raw_model: Segmentor,
    normalize: Callable[[Tensor], Tensor],
    total_iters: int,
    dist: Dist,
) -> TrainStep:
    """A raw model on its device -> the step that trains it."""
    optimizer = build_optimizer(config.optim, raw_model)
    model = dist.wrap(raw_model)
    return TrainStep(
        model=torch.compile(model) if config.schedule.compile else model,
        raw_model=raw_model,
        criterion=build_criterion(config.loss, dist.sum),
        optimizer=optimizer,
        scheduler=build_scheduler(config.optim, optimizer, total_iters),
        normalize=normalize,
        dist=dist,
        amp=config.schedule.amp,
        accumulation=config.schedule.accumulation,
        clip_norm=config.optim.clip_norm,
        ema=build_ema(config.optim, raw_model),
    )


def seed_everything(seed: int, iteration: int, rank: int) -> None:
    """Make dropout a function of (seed, iteration, rank): a resumed run draws what the uninterrupted one drew.

    Not by torch.manual_seed, which, without CUDA, queues every call with its stack for the day that CUDA comes: 0.2 ms
    and some memory a step.
    """
    value = (seed * 1_000_003 + iteration) * 4_099 + rank
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


def train(
    step: TrainStep,
    batches: Iterable[Batch],
    *,
    start: int,
    end: int,
    batch_size: int,
    seed: int,
    intervals: Intervals,
    save: Callable[[int], None],
    validate: Callable[[int], bool],
    logger: NullLogger,
    dist: Dist,
) -> int:
    """Train from iteration `start` to `end` on this process's batches -> the iterations done (fewer if stopped).

    save, validate: called with the number of iterations done, on every rank; after the last iteration save is always
    called, validate never (the run's evaluation follows). validate: -> whether to stop.
    Raises InputError if the logged loss is not finite.
    """
    step.model.train()
    loss_sum = torch.zeros((), device=dist.device)
    meter = Meter(batch_size, dist.device)
    for iteration, batch in enumerate(meter.timed(batches), start):
        seed_everything(seed, iteration, dist.rank)
        done = iteration + 1
        logs = done % intervals.log == 0 or done == end
        rates = step.rates() if logs else {}
        loss_sum += step(batch.to(dist.device))
        logger.step(done)
        if logs:
            extra = {} if step.grad_norm is None else {"train/grad_norm": step.grad_norm.item()}
            loss = {"train/loss": _mean_loss(loss_sum, meter.steps, done, dist)}
            logger.scalars(done, {**loss, **rates, **extra, **meter.report(end - done)})
            loss_sum.zero_()
        if done % intervals.save == 0 or done == end:
            save(done)
        if intervals.val and done % intervals.val == 0 and done < end:
            with meter.paused():
                stop = validate(done)
            step.model.train()
            if stop:
                return done
    return end


def _mean_loss(loss_sum: Tensor, steps: int, iteration: int, dist: Dist) -> float:
    """Each process's sum of losses -> the mean over processes and steps; InputError if it is not finite."""
    mean_loss = (dist.mean(loss_sum) / steps).item()
    if not math.isfinite(mean_loss):
        raise InputError(
            f"optim.lr: got a loss of {mean_loss} at iteration {iteration}, expected a number; try a lower rate"
        )
    return mean_loss
