"""The training criterion: configs/loss."""

import math
from dataclasses import dataclass
from typing import Literal

from exp.config.checks import require, require_positive


@dataclass(frozen=True)
class LossConfig:
    """The training criterion: (1 - aux_weight) x loss of the head + aux_weight x loss of the auxiliary head.

    jaccard, dice and tversky: ce_weight x cross-entropy + (1 - ce_weight) x the weighted mean of 1 - index, taken over
    the global batch (dataset_weight), per image and per class. A key that the loss does not read is refused.
    """

    name: str
    loss: Literal["ce", "focal", "jaccard", "dice", "tversky"]
    aux_weight: float = 0.5
    gamma: float | None = None  # focal's exponent
    ce_weight: float | None = None
    dataset_weight: float | None = None  # of the version for mIoUD; the three weights sum to 1
    image_weight: float | None = None  # mIoUI
    class_weight: float | None = None  # mIoUC
    smooth: float | None = None  # in pixels, added to numerator and denominator of the index
    alpha: float | None = None  # tversky's weight of false positives
    beta: float | None = None  # tversky's weight of false negatives

    def __post_init__(self) -> None:
        require(0 <= self.aux_weight < 1, "aux_weight", self.aux_weight, "a value in [0, 1)")
        known = LOSS_OPTIONS[self.loss]
        for key in sorted({key for keys in LOSS_OPTIONS.values() for key in keys}):
            value = getattr(self, key)
            if key not in known:
                require(value is None, key, value, f"no such key: the loss {self.loss} does not read it")
                continue
            require(value is not None, key, value, f"a value: the loss {self.loss} reads it")
            require(value >= 0, key, value, "0 or more")
        require_positive(self, "smooth")
        if "ce_weight" in known:
            require(self.ce_weight < 1, "ce_weight", self.ce_weight, "a value in [0, 1)")
            total = self.dataset_weight + self.image_weight + self.class_weight
            require(math.isclose(total, 1), "dataset_weight", total, "1 with image_weight and class_weight added")


OVERLAP_OPTIONS = ("ce_weight", "dataset_weight", "image_weight", "class_weight", "smooth")
LOSS_OPTIONS = {
    "ce": (),
    "focal": ("gamma",),
    "jaccard": OVERLAP_OPTIONS,
    "dice": OVERLAP_OPTIONS,
    "tversky": (*OVERLAP_OPTIONS, "alpha", "beta"),
}
