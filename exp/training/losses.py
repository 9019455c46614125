"""The training criterion.

A loss over a global batch is a sum over its images divided by something that is counted in the labels alone: pixels,
images, or images per class. What is counted in the whole batch, over all processes and micro-batches, must be known
before the first backward, so a loss has two parts:

count(label): labels -> a tensor of any shape, additive over images;
forward(logits, label, counted): this micro-batch's share of the loss. counted: the sum of count over the global batch,
divided by the number of processes, so that DDP's average of gradients is the gradient over the global batch.

Labels are (B, H, W) classes in 0..C-1, or 255 where a pixel is ignored.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exp.config.data import IGNORE_INDEX
from exp.config.loss import LossConfig


def count_pixels(label: Tensor) -> Tensor:
    """Labels -> the number of pixels that are not ignored, () float32."""
    return (label != IGNORE_INDEX).sum().float()


def divide(value: Tensor, counted: Tensor) -> Tensor:
    """value / counted; where nothing was counted, value (which is 0 there). `counted` may be a fraction below 1."""
    return value / torch.where(counted > 0, counted, 1)


class CrossEntropy(nn.Module):
    """(B, C, H, W) logits, labels -> the cross-entropy's mean over the pixels of the global batch, see above."""

    def count(self, label: Tensor) -> Tensor:
        return count_pixels(label)

    def forward(self, logits: Tensor, label: Tensor, counted: Tensor) -> Tensor:
        total = F.cross_entropy(logits, label.long(), ignore_index=IGNORE_INDEX, reduction="sum")
        return divide(total, counted)


class Focal(nn.Module):
    """(B, C, H, W) logits, labels -> the mean over the pixels of (1 - p)^gamma (-log p), p of the true class.

    Lin et al., ICCV 2017, eq. 4, with the softmax's probabilities.
    """

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def count(self, label: Tensor) -> Tensor:
        return count_pixels(label)

    def forward(self, logits: Tensor, label: Tensor, counted: Tensor) -> Tensor:
        surprise = F.cross_entropy(logits, label.long(), ignore_index=IGNORE_INDEX, reduction="none")  # 0 if ignored
        miss = -torch.expm1(-surprise)  # 1 - p
        return divide((miss.clamp(min=0) ** self.gamma * surprise).sum(), counted)


class Overlap(nn.Module):
    """(B, C, H, W) logits, labels -> 1 - (TP + smooth) / (TP + alpha FP + beta FN + smooth), reduced as metrics are.

    Tversky's index of the softmax's probabilities x and the labels y; Jaccard is alpha = beta = 1, Dice 1/2. TP, FP and
    FN in their L1 form: TP = (|x| + |y| - |x - y|) / 2, FP = |x| - TP, FN = |y| - TP (Wang et al., arXiv 2302.05666 and
    2303.16296).

    The loss is a weighted mean of three versions, for mIoUD, mIoUI and mIoUC (arXiv 2310.19252):
      data set: TP, FP, FN summed over the global batch; then the mean over the classes present in it;
      image:    per image the mean over its classes; then the mean over the images;
      class:    per class the mean over the images where it is present; then the mean over the classes.
    A class is present where the label has it; of two classes the foreground alone counts, as in the metrics, unless
    both_classes, as in the paper's code.

    sum_over_ranks: a tensor -> its sum over the processes, whose gradient suits DDP's average (Dist.sum). The data
    set version alone needs it: its sums over a micro-batch span the processes. Over several micro-batches it is their
    mean, which is not the version of the whole; no loss that is computed before the last forward could be.
    """

    BINS = IGNORE_INDEX  # classes that a label of 8 bits can name

    def __init__(
        self,
        *,
        alpha: float,
        beta: float,
        smooth: float,
        dataset_weight: float,
        image_weight: float,
        class_weight: float,
        sum_over_ranks: Callable[[Tensor], Tensor],
        both_classes: bool | None = None,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.smooth = alpha, beta, smooth
        self.dataset_weight, self.image_weight, self.class_weight = dataset_weight, image_weight, class_weight
        self.sum_over_ranks, self.both_classes = sum_over_ranks, both_classes

    def count(self, label: Tensor) -> Tensor:
        """The images, those with any label, and those with each class, (2 + BINS,) float32."""
        present = torch.zeros(len(label), self.BINS + 1, dtype=torch.bool, device=label.device)
        present = present.scatter_(1, label.flatten(1).long(), True)[:, : self.BINS]
        images = torch.stack([torch.ones_like(present[:, 0]), present.any(1)])
        return torch.cat([images.sum(1), present.sum(0)]).float()

    def forward(self, logits: Tensor, label: Tensor, counted: Tensor) -> Tensor:
        sums = sum_overlap(logits.softmax(1), label)
        images, labelled, by_class = counted[0], counted[1], counted[2 : 2 + logits.shape[1]]
        if logits.shape[1] == 2 and not self.both_classes:
            sums, labelled, by_class = sums[..., 1:], by_class[1], by_class[1:]
        loss = logits.new_zeros(())
        if self.dataset_weight:
            both = self.sum_over_ranks(sums.sum(1))  # (3, C)
            present = (both[2] > 0).to(loss.dtype)
            version = divide((self._index_loss(both) * present).sum(), present.sum())
            loss = loss + self.dataset_weight * version * len(logits) / images
        if self.image_weight or self.class_weight:
            present = (sums[2] > 0).to(loss.dtype)  # (B, C)
            each = self._index_loss(sums) * present
            image = divide(divide(each.sum(1), present.sum(1)).sum(), labelled)
            class_ = divide(divide(each.sum(0), by_class).sum(), (by_class > 0).sum())
            loss = loss + self.image_weight * image + self.class_weight * class_
        return loss

    def _index_loss(self, sums: Tensor) -> Tensor:
        """(3, ..., C) TP, |x|, |y| -> (..., C) 1 - Tversky's index."""
        tp, predicted, true = sums
        wrong = self.alpha * (predicted - tp) + self.beta * (true - tp)
        return 1 - (tp + self.smooth) / (tp + wrong + self.smooth)


def sum_overlap(prob: Tensor, label: Tensor) -> Tensor:
    """(B, C, H, W) probabilities, labels -> (3, B, C) TP, |x| and |y|, the sums over the pixels that count.

    Labels are never spread to (B, C, H, W): TP is the sum of the true class's probabilities.
    """
    num_classes, prob, label = prob.shape[1], prob.flatten(2), label.flatten(1).long()
    kept = (label != IGNORE_INDEX).to(prob.dtype)
    label = torch.where(label != IGNORE_INDEX, label, 0)
    hit = prob.gather(1, label[:, None])[:, 0] * kept
    predicted = (prob * kept[:, None]).sum(2)
    nothing = torch.zeros(len(prob), num_classes, dtype=torch.float64, device=prob.device)  # adds up one by one
    tp, true = (nothing.scatter_add(1, label, values.double()).to(prob.dtype) for values in (hit, kept))
    return torch.stack([tp, predicted, true])


class WithCrossEntropy(nn.Module):
    """weight x cross-entropy + (1 - weight) x another loss, of the same logits and labels."""

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.cross_entropy, self.loss, self.weight = CrossEntropy(), loss, weight

    def count(self, label: Tensor) -> Tensor:
        return torch.cat([self.cross_entropy.count(label)[None], self.loss.count(label)])

    def forward(self, logits: Tensor, label: Tensor, counted: Tensor) -> Tensor:
        cross_entropy = self.cross_entropy(logits, label, counted[0])
        return self.weight * cross_entropy + (1 - self.weight) * self.loss(logits, label, counted[1:])


class WithAuxiliary(nn.Module):
    """(main logits, auxiliary logits), labels -> (1 - weight) x main loss + weight x auxiliary loss.

    Without auxiliary logits (a 1-tuple) it is the first summand alone, as in the paper's code. Computed in float32
    (logits of float64: in float64), whatever the precision around it.
    """

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss, self.weight = loss, weight

    def count(self, label: Tensor) -> Tensor:
        return self.loss.count(label)

    def forward(self, outputs: tuple[Tensor, ...], label: Tensor, counted: Tensor) -> Tensor:
        with torch.autocast(label.device.type, enabled=False):
            outputs = [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in outputs]
            main, *auxiliary = (self.loss(logits, label, counted) for logits in outputs)
            total = (1 - self.weight) * main
            return total + self.weight * auxiliary[0] if auxiliary else total


def overlap_loss(
    sum_over_ranks: Callable[[Tensor], Tensor], *, ce_weight: float, alpha: float, beta: float, **options: float
) -> nn.Module:
    """The options of a YAML -> cross-entropy with the Tversky loss."""
    return WithCrossEntropy(Overlap(alpha=alpha, beta=beta, **options, sum_over_ranks=sum_over_ranks), ce_weight)


# The names of exp/config/families.py -> what makes the loss of Dist.sum and its options.
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "ce": lambda sum_over_ranks: CrossEntropy(),
    "focal": lambda sum_over_ranks, gamma: Focal(gamma),
    "jaccard": partial(overlap_loss, alpha=1.0, beta=1.0),
    "dice": partial(overlap_loss, alpha=0.5, beta=0.5),
    "tversky": overlap_loss,
}


def build_criterion(config: LossConfig, sum_over_ranks: Callable[[Tensor], Tensor]) -> nn.Module:
    """A YAML -> the criterion on the training model's two outputs; sum_over_ranks: Dist.sum."""
    return WithAuxiliary(LOSSES[config.loss](sum_over_ranks, **config.options()), config.aux_weight)
