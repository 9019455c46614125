"""One step of the optimiser over a global batch: forward, backward, clip, update, average."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from exp.checkpoints.states import find_difference
from exp.config.experiment import ExperimentConfig
from exp.data.loader import Batch
from exp.evaluation.inference import autocast
from exp.models import Segmentor
from exp.runtime.distributed import Dist
from exp.runtime.errors import sizes_named
from exp.training.losses import build_criterion
from exp.training.optim import MovingAverage, build_ema, build_optimizer, build_scheduler, whole_state

SCALER_TRIES = 25  # fp16's scaler halves its factor, 2^16 at first, at every overflow: after so many it is 2^-9


@dataclass
class Faults:
    """Steps that were left out for a non-finite loss or gradient: in a row, and in all; damaged images skipped."""

    in_row: int = 0
    steps: int = 0
    images: int = 0

    def describe(self) -> str | None:
        """What a run says of its faults; None if it had none."""
        if not (self.steps or self.images):
            return None
        return f"{self.steps} steps left out (loss or gradient non-finite), {self.images} damaged images skipped"


@dataclass(frozen=True)
class Outcome:
    """What a step came to, still on the device.

    loss: (), this process's share, detached. marks: (3,) of 0 and 1: nothing was updated, for the loss or the gradient
    of some process was non-finite; some process's loss was none; this one's was none.
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
        # bf16 has the exponents of float32 and needs none: a no-op then.
        self.scaler = torch.amp.GradScaler(self.dist.device.type, enabled=self.amp == "fp16")
        self.grad_norm: Tensor | None = None  # of the last step, over all parameters, before clipping
        self._buffers = [buffer.clone() for buffer in self.raw_model.buffers()]

    def __call__(self, batch: Batch) -> Outcome:
        """(B, channels, H, W) images and (B, H, W) labels -> what came of them; no wait.

        Where loss or gradient is non-finite, weights, optimiser, average and statistics of norm layers stay as they
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
        with sizes_named(image), autocast(self.amp, self.dist.device):
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

    def find_difference(self, state: dict[str, Any], ema: dict[str, Any] | None) -> str | None:
        """Where a state is of another kind than what state_dict returns, or its average than the one kept here."""
        own = self.state_dict()
        own["optimizer"]["state"] = whole_state(self.optimizer)
        average, kept = (None if x is None else dict(x) for x in (ema, self.ema and self.ema.state_dict()))
        try:
            found, expected = _that_moves(state), _that_moves(own)
            # A parameter that never had a gradient has no state.
            numbers = found["optimizer"]["state"].keys() & expected["optimizer"]["state"].keys()
            expected["optimizer"]["state"] = {i: expected["optimizer"]["state"][i] for i in numbers}
        except (AttributeError, LookupError, TypeError):
            return "training: other content"
        return find_difference(found, expected, "training") or find_difference(average, kept, "ema")

    def load_state_dict(self, state: dict[str, Any], ema: dict[str, Any] | None) -> None:
        """Resume from what state_dict returned and, where an average is kept, from its state dict.

        What the config decides, such as the optimiser's options, stays as it is here, and so does the place of the
        optimiser's tensors in memory, by which its kernels go.
        """
        own, places = self.state_dict(), whole_state(self.optimizer)
        groups = zip(own["optimizer"]["param_groups"], state["optimizer"]["param_groups"])
        kept = {
            number: {name: torch.empty_like(places[number][name], device="cpu").copy_(values[name]) for name in values}
            for number, values in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({"state": kept, "param_groups": [o | {"lr": g["lr"]} for o, g in groups]})
        self.scheduler.load_state_dict(own["scheduler"] | _that_moves(state)["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.faults = Faults(**state["faults"])
        if self.ema is not None:
            self.ema.load_state_dict(ema)


def _that_moves(state: dict[str, Any]) -> dict[str, Any]:
    """What TrainStep.state_dict returns -> what changes during training: neither the config nor PyTorch decides it."""
    optimizer, scheduler = state["optimizer"], state["scheduler"]
    return {
        "optimizer": {
            "state": dict(optimizer["state"]),
            "lr": [group["lr"] for group in optimizer["param_groups"]],
        },
        "scheduler": {name: scheduler[name] for name in ("last_epoch", "_step_count", "_last_lr")},
        "scaler": state["scaler"],
        "faults": state["faults"],
    }


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
