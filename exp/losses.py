"""The training criterion."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from exp.config import LossConfig
from exp.data.base import IGNORE_INDEX


class CrossEntropy(nn.Module):
    """(B, C, H, W) logits and (B, H, W) labels in 0..C-1 or 255 -> the mean over the pixels that are not ignored.

    mean_over_ranks: a tensor -> its mean over the processes. The sum is divided by the pixels that count in the
    *global* batch over the number of processes, so that DDP's average of gradients is the gradient of the mean over
    the global batch, however unevenly the ignored pixels lie. No pixel that counts: 0.
    """

    def __init__(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mean_over_ranks = mean_over_ranks

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        label = label.long()
        counted = self.mean_over_ranks((label != IGNORE_INDEX).sum().to(logits.dtype))
        return F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX, reduction="sum") / counted.clamp(min=1)


class WithAuxiliary(nn.Module):
    """(main logits, auxiliary logits), labels -> (1 - weight) x main loss + weight x auxiliary loss."""

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, outputs: tuple[Tensor, Tensor], label: Tensor) -> Tensor:
        main, auxiliary = outputs
        return (1 - self.weight) * self.loss(main, label) + self.weight * self.loss(auxiliary, label)


LOSSES = {"ce": CrossEntropy}


def build_criterion(config: LossConfig, mean_over_ranks: Callable[[Tensor], Tensor]) -> nn.Module:
    """A YAML -> the criterion on the training model's two outputs."""
    return WithAuxiliary(LOSSES[config.loss](mean_over_ranks), config.aux_weight)
