"""One training loop, explicit arguments."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from exp.config.experiment import ExperimentConfig
from exp.data.loader import Batch
from exp.models import Segmentor
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.runtime.interrupt import Interrupted
from exp.training.logger import Meter, NullLogger, say
from exp.training.losses import build_criterion
from exp.training.optim import MovingAverage, build_ema, build_optimizer, build_scheduler
from exp.training.precision import autocast, build_scaler

SCALER_TRIES = 25  # fp16's scaler halves its factor, 2^16 at first, at every overflow: after so many it is 2^-9


@dataclass(frozen=True)
class Intervals:
    """Iterations between logging, saving (each of several counts) and validating; val None: never."""

    log: int
    save: tuple[int, ...]
    val: int | None


@dataclass
class Faults:
    """Steps that were left out because loss or gradient was no number: in a row, and in all; damaged images skipped."""

    in_row: int = 0
    steps: int = 0
    images: int = 0

    def describe(self) -> str | None:
        """What a run says of its faults; None if it had none."""
        if not (self.steps or self.images):
            return None
        return f"{self.steps} steps left out (loss or gradient no number), {self.images} damaged images skipped"


@dataclass(frozen=True)
class Outcome:
    """What a step came to, still on the device.

    loss: (), this process's share, detached. marks: (3,) of 0 and 1: nothing was updated, for the loss or the gradient
    of some process was no number; some process's loss was none; this one's was none.
    """

    loss: Tensor
    marks: Tensor


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
    ema: MovingAverage | None = None
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        self.scaler = build_scaler(self.amp, self.dist.device)
        self.grad_norm: Tensor | None = None  # of the last step, over all parameters, before clipping
        self._buffers = [buffer.clone() for buffer in self.raw_model.buffers()]

    def __call__(self, batch: Batch) -> Outcome:
        """(B, channels, H, W) images and (B, H, W) labels -> what came of them; no wait.

        Where loss or gradient is no number, weights, optimiser, average and statistics of norm layers stay as they
        were, which the device decides by itself; the learning rate goes on. So on every rank.
        """
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_copy_(self._buffers, list(self.raw_model.buffers()))
        counted = self.dist.mean(self.criterion.count(batch.label))
        parts = list(zip(batch.image.chunk(self.accumulation), batch.label.chunk(self.accumulation), strict=True))
        losses = []
        for part, (image, label) in enumerate(parts, start=1):
            with self.dist.gradient_sync(self.model, enabled=part == len(parts)):
                losses.append(self._backward(image, label, counted))
        loss = torch.stack(losses).sum()
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.raw_model.parameters())
        self.grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        all_finite, finite = self.dist.mean(loss).isfinite(), loss.isfinite()
        left_out = ~(all_finite & self.grad_norm.isfinite())
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, self.grad_norm)
        self._update(left_out)
        return Outcome(loss, torch.stack([left_out, ~all_finite, ~finite]))

    def _backward(self, image: Tensor, label: Tensor, counted: Tensor) -> Tensor:
        with autocast(self.amp, self.dist.device):
            outputs = self.model(self.normalize(image))
        loss = self.criterion(outputs, label, counted)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _update(self, left_out: Tensor) -> None:
        """The optimiser's step and what follows it, unless it is left out."""
        self.optimizer.grad_scale, self.optimizer.found_inf = None, left_out.float()
        self.optimizer.step()
        del self.optimizer.grad_scale, self.optimizer.found_inf
        self.scaler.update()
        self.scheduler.step()
        for buffer, before in zip(self.raw_model.buffers(), self._buffers):
            torch.where(left_out, before, buffer, out=buffer)
        if self.ema is not None:
            self.ema.update(self.raw_model, 1 - left_out.float())

    def rates(self) -> dict[str, float]:
        """The learning rate of every parameter group in the step that comes next."""
        return {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}

    def state_dict(self) -> dict[str, Any]:
        """All that decides the steps to come, but for the weights and their average."""
        parts = {name: getattr(self, name).state_dict() for name in ("optimizer", "scheduler", "scaler")}
        return {**parts, "faults": asdict(self.faults)}

    def load_state_dict(self, state: dict[str, Any], ema: dict[str, Any] | None) -> None:
        """Go on from what state_dict returned and, where an average is kept, from its state dict."""
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.faults = Faults(**state["faults"])
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
    nonfinite_limit: int,
    names: Sequence[str],
    save: Callable[[int], None],
    validate: Callable[[int], bool],
    logger: NullLogger,
    dist: Dist,
) -> int:
    """Train from iteration `start` to `end` on this process's batches -> the iterations done (fewer if stopped).

    names: of the training images by index. save, validate: called with the number of iterations done, on every rank;
    after the last iteration save is always called, validate never (the run's evaluation follows). validate: -> whether
    to stop. Raises Interrupted, after saving, where a process was asked to stop; InputError after nonfinite_limit
    steps in a row whose loss or gradient was no number.
    """
    step.model.train()
    meter, watch = Meter(batch_size, dist.device), Watch(step, names, nonfinite_limit, dist)
    for iteration, batch in enumerate(meter.timed(batches), start):
        seed_everything(seed, iteration, dist.rank)
        done = iteration + 1
        logs = done % intervals.log == 0 or done == end
        rates = step.rates() if logs else {}
        with dist.named_step(done):
            outcome = step(batch.to(dist.device))
            stop_asked = dist.any(dist.stop)
        watch.add(done, outcome, batch)
        logger.step(done)
        saves = stop_asked or done == end or any(done % every == 0 for every in intervals.save)
        validates = bool(intervals.val) and done % intervals.val == 0 and done < end
        if logs or saves or validates:
            watch.look()
        if logs:
            norm = {"train/grad_norm": step.grad_norm.item()}
            logger.scalars(done, {**watch.report(), **norm, **rates, **meter.report(end - done)})
        if saves:
            save(done)
        if stop_asked:
            raise Interrupted(f"{dist.stop.by or 'a signal to another process'}: iteration {done} of {end} is saved")
        if validates:
            try:
                with meter.paused():
                    stop = validate(done)
            except Interrupted:
                if not saves:
                    save(done)
                raise
            step.model.train()
            if stop:
                return done
    return end


class Watch:
    """What became of the steps: their mean loss, and the faults among them by name.

    A step's marks are looked at while the device works on the next one, so that it never waits; all of them before
    anything is saved or logged.
    """

    def __init__(self, step: TrainStep, names: Sequence[str], limit: int, dist: Dist) -> None:
        self.step, self.names, self.limit, self.dist = step, names, limit, dist
        self._last: tuple[int, Callable[[], list], Batch] | None = None
        self._restart()

    def add(self, done: int, outcome: Outcome, batch: Batch) -> None:
        """After step number `done`."""
        self._sum += torch.where(outcome.marks[0], 0.0, outcome.loss)
        self._steps += 1
        if batch.damaged:
            self.step.faults.images += len(batch.damaged)
            say(f"warning: iteration {done}: skipped: {'; '.join(batch.damaged)}")
        fetch = self.dist.fetch(outcome.marks)
        self.look()
        self._last = done, fetch, batch

    def look(self) -> None:
        """Take note of the last step; every rank. InputError after too many in a row that were left out."""
        if self._last is None:
            return
        (done, fetch, batch), self._last = self._last, None
        left_out, some_loss, own_loss = fetch()
        faults = self.step.faults
        faults.in_row = faults.in_row + 1 if left_out else 0
        if not left_out:
            return
        faults.steps += 1
        self._left_out += 1
        searching = self.step.scaler.is_enabled() and not some_loss  # fp16's scaler looks for a factor that fits
        if searching and faults.in_row <= SCALER_TRIES:
            return
        parts = self.dist.gather((own_loss, [self.names[i] for i in batch.indices]))
        suspects = [name for own, names in parts if own or not some_loss for name in names]
        what = "loss" if some_loss else "gradient"
        text = f"iteration {done}: got a {what} that is no number, nothing updated; its images: {', '.join(suspects)}"
        if self.dist.is_main:
            say(f"warning: {text}")
        if faults.in_row >= self.limit + (SCALER_TRIES if searching else 0):
            raise InputError(
                f"optim.lr: {text}. {faults.in_row} such steps in a row (schedule.nonfinite_limit): look at "
                "these images, or try a lower rate in another --output_dir; the newest checkpoint has good weights"
            )

    def report(self) -> dict[str, float]:
        """Named figures since the last report, on every rank; of faults only where there were any, from the start.

        The loss is the mean over the processes and the steps that updated something, NaN where there was none.
        """
        faults = self.step.faults
        sums = torch.stack([self._sum, torch.tensor(float(faults.images), device=self.dist.device)])
        loss, images = self.dist.mean(sums).tolist()
        steps = self._steps - self._left_out
        row = {"train/loss": loss / steps if steps else math.nan}
        if faults.steps:
            row["train/steps_left_out"] = faults.steps
        if images:
            row["train/images_skipped"] = images * self.dist.world_size
        self._restart()
        return row

    def _restart(self) -> None:
        self._sum, self._steps, self._left_out = torch.zeros((), device=self.dist.device), 0, 0
