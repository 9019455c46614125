"""The decision rules by name: (B, C, H, W) probabilities -> (B, H, W) int64 labels."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from exp.config import PredictConfig
from rankseg_rma import rankseg_rma

Rule = Callable[[Tensor], Tensor]


def argmax(prob: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W): the most probable class of each pixel."""
    return prob.argmax(dim=1)


RULES: dict[str, Callable[..., Tensor]] = {"argmax": argmax, "rankseg_rma": rankseg_rma}


def build_rule(config: PredictConfig) -> Rule:
    """A YAML -> the rule with its options."""
    return partial(RULES[config.rule], **config.options())
