"""How an image becomes probabilities and labels: configs/test and configs/predict."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from exp.config.checks import MAX_CROP, MAX_SCALE, require, require_area, require_entry, require_positive
from exp.config.data import IGNORE_INDEX
from exp.config.families import METRIC_TABLE, RULE_TABLE


@dataclass(frozen=True)
class TestConfig:
    """How an image becomes probabilities, and the per-image score by which rules are compared."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    name: str
    metric: Literal["mIoUI", "mDiceI", "mAccI"]
    crop_size: tuple[int, int] | None = None  # null: the training crop
    stride: tuple[int, int] | None = None  # null: ceil(2/3 crop)
    window_batch: int = 4  # windows that go through the network together
    images_per_forward: int = 1  # whose windows share these: more than 1 keeps a GPU busy where an image is one window
    weights: Literal["raw", "ema"] = "raw"  # ema: the moving average of optim.ema_decay
    amp: Literal["off", "bf16", "fp16"] = "off"  # of the forward pass; the softmax is computed in float32 always
    padding: Literal["corner", "centred"] = "corner"  # of images smaller than the window: where, in zeros
    whole: bool = False  # no windows: every image goes through the network at once
    short_side: int | None = None  # pixels to which images are resized before, keeping their shape; null: as they are
    scales: tuple[float, ...] = (1.0,)  # of the image; the probabilities of all views are averaged
    flip: bool = False  # every scale also mirrored
    temperature: float | Literal["fitted"] = 1.0  # divides the logits; fitted: that of --fit_temperature
    calibration: bool = True  # count the calibration errors
    metrics: tuple[str, ...] = ()  # of METRIC_TABLE, besides Acc, IoU and Dice
    prob_cache_gb: float = 1.0  # a process keeps that many probabilities for the rules that need a second pass

    def __post_init__(self) -> None:
        require_positive(self, "crop_size", "stride", "short_side", most=MAX_CROP)
        require_area(self, "crop_size")
        require_positive(self, "scales", most=MAX_SCALE)
        require_positive(self, "window_batch", "images_per_forward")
        require(len(set(self.scales)) == len(self.scales), "scales", self.scales, "each scale once")
        require(self.prob_cache_gb >= 0, "prob_cache_gb", self.prob_cache_gb, "0 or more")
        unknown = [name for name in self.metrics if name not in METRIC_TABLE]
        require(not unknown, "metrics", self.metrics, f"some of {', '.join(METRIC_TABLE)}")
        require(len(set(self.metrics)) == len(self.metrics), "metrics", self.metrics, "each metric once")
        if self.temperature != "fitted":
            require_positive(self, "temperature")
        if self.crop_size and self.stride:
            fits = all(step <= side for step, side in zip(self.stride, self.crop_size))
            require(fits, "stride", self.stride, f"at most the window, {self.crop_size}")

        fits = not self.whole or (self.crop_size is None and self.stride is None)
        require(fits, "whole", self.whole, "false together with crop_size or stride")

    def resolved(self, train_crop: tuple[int, int]) -> "TestConfig":
        """With the window and its stride filled in: the training crop, and ceil(2/3 crop) as in the paper."""
        if self.whole:
            return self
        crop = self.crop_size or train_crop
        stride = self.stride or tuple(math.ceil(2 * side / 3) for side in crop)
        return dataclasses.replace(self, crop_size=crop, stride=stride)


@dataclass(frozen=True)
class PredictConfig:
    """A decision rule by name and its options; an option that the rule does not read is refused."""

    name: str
    rule: str  # a name of RULE_TABLE
    threshold: float | None = None
    opt_metric: Literal["dice", "iou"] | None = None
    pruning_prob: float | None = None
    unassigned: Literal["max_score", "first"] | int | None = None
    to_nonoverlap_method: Literal["rma_score", "weight_prob", "prob"] | None = None
    contested: Literal["holders", "all"] | None = None
    theta: float | None = None  # pixels over which a class's pixels depend on each other
    assignment: Literal["sets", "first_order"] | None = None
    sees_padding: bool | None = None  # true: decides on the padded map of an image smaller than the window
    solver: Literal["BA", "TRNA"] | None = None
    scope: Literal["case", "dataset"] | None = None  # the pixels that share their thresholds
    thresholds: str | None = None  # a file that a rule of scope: dataset wrote; with --set, for it is nobody's default

    def __post_init__(self) -> None:
        require_entry(self, "rule", RULE_TABLE)
        require_positive(self, "theta")
        if isinstance(self.unassigned, int):
            require(0 <= self.unassigned < IGNORE_INDEX, "unassigned", self.unassigned, "a class")
        for key in ("threshold", "pruning_prob"):
            value = getattr(self, key)
            require(value is None or 0 <= value < 1, key, value, "a value in [0, 1)")

    def options(self) -> dict[str, Any]:
        """The keywords of this rule's function."""
        return {key: getattr(self, key) for key in RULE_TABLE[self.rule].keys}
