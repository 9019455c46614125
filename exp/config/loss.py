"""The training criterion: configs/loss."""

import math
from dataclasses import dataclass

from exp.config.checks import require, require_entry, require_positive
from exp.config.families import LOSS_TABLE


@dataclass(frozen=True)
class LossConfig:
    """The training criterion: (1 - aux_weight) x loss of the head + aux_weight x loss of the auxiliary head.

    jaccard, dice and tversky: ce_weight x cross-entropy + (1 - ce_weight) x the weighted mean of 1 - index, taken over
    the global batch (dataset_weight), per image and per class. A key that the loss does not read is refused.
    both_classes: of two classes the background counts as any other, as in the paper's code; else the foreground alone.
    """

    name: str
    loss: str  # a name of LOSS_TABLE
    aux_weight: float = 0.5
    gamma: float | None = None  # focal's exponent
    ce_weight: float | None = None
    dataset_weight: float | None = None  # of the version for mIoUD; the three weights sum to 1
    image_weight: float | None = None  # mIoUI
    class_weight: float | None = None  # mIoUC
    smooth: float | None = None  # in pixels, added to numerator and denominator of the index
    alpha: float | None = None  # tversky's weight of false positives
    beta: float | None = None  # tversky's weight of false negatives
    both_classes: bool | None = None  # of jaccard, dice and tversky; read with two classes

    def __post_init__(self) -> None:
        require(0 <= self.aux_weight < 1, "aux_weight", self.aux_weight, "a value in [0, 1)")
        require_entry(self, "loss", LOSS_TABLE)
        for key in LOSS_TABLE[self.loss].needs:
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        require_positive(self, "smooth")
        if self.ce_weight is not None:
            require(self.ce_weight < 1, "ce_weight", self.ce_weight, "a value in [0, 1)")
            total = self.dataset_weight + self.image_weight + self.class_weight
            require(math.isclose(total, 1), "dataset_weight", total, "1 with image_weight and class_weight added")

    def options(self) -> dict[str, float]:
        """The keywords of this loss's builder."""
        return {key: getattr(self, key) for key in LOSS_TABLE[self.loss].keys}
