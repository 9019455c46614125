"""The training criterion.

A loss over a global batch is a sum over its images divided by something that is counted in the labels alone: pixels,
images, or images per class. What is counted in the whole batch, over all processes and micro-batches, must be known
before the first backward, so a loss has two parts:

count(label): (B, H, W) labels -> a tensor of any shape, additive over images;
forward(logits, label, counted): this micro-batch's share of the loss. counted: the sum of count over the global batch,
divided by the number of processes, so that DDP's average of gradients is the gradient over the global batch.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from exp.config import LossConfig
from exp.data.base import IGNORE_INDEX


class CrossEntropy(nn.Module):
    """(B, C, H, W) logits and (B, H, W) labels in 0..C-1 or 255 -> the sum over the pixels that are not ignored,
    divided by `counted`, their number in the global batch over the number of processes. No pixel that counts: 0.
    """

    def count(self, label: Tensor) -> Tensor:
        """The number of pixels that count, () float32."""
        return (label != IGNORE_INDEX).sum().float()

    def forward(self, logits: Tensor, label: Tensor, counted: Tensor) -> Tensor:
        total = F.cross_entropy(logits, label.long(), ignore_index=IGNORE_INDEX, reduction="sum")
        return total / counted.clamp(min=1)


class WithAuxiliary(nn.Module):
    """(main logits, auxiliary logits), labels -> (1 - weight) x main loss + weight x auxiliary loss."""

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss, self.weight = loss, weight

    def count(self, label: Tensor) -> Tensor:
        return self.loss.count(label)

    def forward(self, outputs: tuple[Tensor, Tensor], label: Tensor, counted: Tensor) -> Tensor:
        main, auxiliary = (self.loss(logits, label, counted) for logits in outputs)
        return (1 - self.weight) * main + self.weight * auxiliary


LOSSES = {"ce": CrossEntropy}


def build_criterion(config: LossConfig) -> nn.Module:
    """A YAML -> the criterion on the training model's two outputs."""
    return WithAuxiliary(LOSSES[config.loss](), config.aux_weight)
