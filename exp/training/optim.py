"""Optimiser with the paper's parameter groups, the learning rate's course, and the average of the weights."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from exp.config.training import OptimConfig
from exp.models import Segmentor


def parameter_groups(model: Segmentor, lr: float, head_lr_factor: float, weight_decay: float) -> list[dict]:
    """The model's parameters by rate (encoder: lr; all else: lr x head_lr_factor) and decay (1-D parameters: none)."""
    groups = []
    for part, own_lr in (("encoder", lr), ("head", lr * head_lr_factor)):
        named = [p for name, p in model.named_parameters() if name.startswith("encoder.") == (part == "encoder")]
        for kind, decay in (("decay", weight_decay), ("no_decay", 0.0)):
            params = [p for p in named if (p.ndim > 1) == (kind == "decay")]
            groups.append({"name": f"{part}_{kind}", "params": params, "lr": own_lr, "weight_decay": decay})
    return groups


def build_optimizer(config: OptimConfig, model: Segmentor) -> Optimizer:
    """A YAML and the raw (unwrapped) model -> the optimiser.

    Fused: these kernels take a mark on the device, `found_inf`, under which a step changes nothing.
    """
    groups = parameter_groups(model, config.lr, config.head_lr_factor, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    sgd = torch.optim.SGD(groups, momentum=config.momentum, fused=True)
    if config.momentum:  # the fused kernel would leave it unset if the first step of all is left out
        for group in sgd.param_groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def whole_state(optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    """An optimiser of build_optimizer -> what it keeps of each parameter, by number, once that has had a gradient.

    Tensors of the right shapes and dtypes; what stands in them means nothing.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, torch.optim.AdamW):
        step = torch.zeros(())
        return {i: {"step": step, "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}
    kept = optimizer.defaults["momentum"]
    return {i: {"momentum_buffer": p} for i, p in enumerate(parameters)} if kept else {}


@dataclass(frozen=True)
class WarmupPoly:
    """Iteration (from 0) -> factor of the base rate: linear over the warm-up, then (1 - progress) ** power.

    The line rises from 0, and the factor is at least start_factor; with from_start it rises from start_factor.
    """

    start_factor: float
    warmup_iters: float
    total_iters: int
    power: float
    from_start: bool = False

    def __call__(self, iteration: int) -> float:
        if iteration < self.warmup_iters:
            progress = iteration / self.warmup_iters
            if self.from_start:
                return self.start_factor + (1 - self.start_factor) * progress
            return max(self.start_factor, progress)
        span = max(1, self.total_iters - self.warmup_iters)
        return max(0.0, 1 - (iteration - self.warmup_iters) / span) ** self.power


def build_scheduler(config: OptimConfig, optimizer: Optimizer, total_iters: int) -> LambdaLR:
    """The learning rate per iteration; every group keeps its ratio to the encoder's rate."""
    warmup, from_start = config.warmup_fraction * total_iters, config.warmup == "from_start"
    if from_start:
        warmup = round(warmup)
    course = WarmupPoly(config.start_lr / config.lr, warmup, total_iters, config.power, from_start)
    scheduler = LambdaLR(optimizer, course)
    optimizer.step()  # a no-op, without gradients; where fp16 leaves out the first step, the scheduler would warn
    return scheduler


class MovingAverage(AveragedModel):
    """An exponential moving average of a model: a copy; statistics of norm layers are averaged too."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, counts: Tensor) -> None:
        """Move towards the model's weights where `counts`, (), is 1; where it is 0, stay. No wait for the device.

        The base class's own update copies its counter to the device in every step, and waits for that.
        """
        pairs, started = list(zip(_tensors(self.module), _tensors(model), strict=True)), self.n_averaged > 0
        moving = [pair for pair in pairs if started and pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not (started and pair[0].is_floating_point())]
        if copied:
            torch._foreach_copy_(*map(list, zip(*copied)))
        if moving:
            averages, values = map(list, zip(*moving))
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, (1 - self.decay) * counts)
            torch._foreach_add_(averages, steps)
        self.n_averaged += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, then buffers."""
    return [*model.parameters(), *model.buffers()]


def build_ema(config: OptimConfig, model: nn.Module) -> MovingAverage | None:
    """A YAML and the raw model -> the average of its weights, or None."""
    return None if config.ema_decay is None else MovingAverage(model, config.ema_decay)
