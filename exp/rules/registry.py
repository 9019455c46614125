"""The decision rules by name. All have one signature: (B, C, H, W) probabilities -> (B, H, W) int64 labels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from exp.config.evaluation import PredictConfig
from exp.config.families import RULE_TABLE
from exp.rules.dep import rankseg_dep
from exp.rules.dep_levels import rankseg_dep_levels
from exp.rules.exact import rankseg_exact
from exp.rules.pooled import PooledRule, Thresholds, load_thresholds
from exp.runtime.errors import InputError
from rankseg_rma import rankseg_levelset, rankseg_rma

Rule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SeesPadding:
    """A rule that decides on an image with the padding of the window around it, where there is some."""

    rule: Rule

    def __call__(self, prob: Tensor) -> Tensor:
        return self.rule(prob)


def argmax(prob: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W): the most probable class of each pixel."""
    return prob.max(dim=1).indices  # the first of equals, as argmax; on a CPU in a third of its time


def threshold(prob: Tensor, *, threshold: float) -> Tensor:
    """(B, 2, H, W) -> (B, H, W): 1 where the foreground's probability is above the threshold."""
    return (prob[:, 1] > threshold).long()


def rankseg_package(prob: Tensor, *, opt_metric: str, pruning_prob: float, solver: str) -> Tensor:
    """(B, 2, H, W) -> (B, H, W): the foreground by the authors' package `rankseg`, the paper's baselines.

    solver: BA or TRNA (Dai & Li, JMLR 2023), the approximations that Table 2 and Table 3 compare with.
    """
    from rankseg import RankSEG  # here, because only these baselines need it

    package = RankSEG(metric=opt_metric, solver=solver, output_mode="multilabel", pruning_prob=pruning_prob)
    return package.predict(prob[:, 1:])[:, 0].to(torch.int64)


RULES: dict[str, Callable[..., Tensor | PooledRule]] = {  # the names and options of exp/config/families.py
    "argmax": argmax,
    "threshold": threshold,
    "rankseg_rma": rankseg_rma,
    "rankseg_rma_pooled": PooledRule,
    "rankseg_rma_fixed": lambda prob, *, thresholds: thresholds.decide(prob),  # which come from other images
    "rankseg_levelset": rankseg_levelset,
    "rankseg_dep": rankseg_dep,
    "rankseg_dep_levels": rankseg_dep_levels,
    "rankseg_package": rankseg_package,
    "rankseg_exact": rankseg_exact,
}


def build_rule(config: PredictConfig, num_classes: int, classes: Sequence[str] | None = None) -> Rule | PooledRule:
    """A YAML -> the rule with its options; InputError for a rule of two classes on a data set of more.

    classes: their names, None where they have none of their own; thresholds from a file must be of the same.
    """
    if RULE_TABLE[config.rule].two_classes and num_classes != 2:
        raise InputError(
            f"--predict_yaml {config.name}: got {num_classes} classes, expected 2 (background, foreground)"
        )
    if isinstance(config.unassigned, int) and not 0 <= config.unassigned < num_classes:
        raise InputError(f"predict.unassigned: got {config.unassigned}, expected a label in 0..{num_classes - 1}")
    rule, options = RULES[config.rule], config.options()
    sees_padding = options.pop("sees_padding", None)
    if "thresholds" in options:
        if config.thresholds is None:
            raise InputError(
                f"--predict_yaml {config.name}: got no thresholds, expected --set predict.thresholds=FILE, which an "
                "evaluation under rankseg_rma_dataset writes (results/<rule>.<split>.thresholds.json)"
            )
        options["thresholds"] = load_thresholds(Path(config.thresholds), num_classes, classes)
    if rule is PooledRule:
        return rule(**options)
    decide = partial(rule, **options)
    return SeesPadding(decide) if sees_padding else decide


def bind_rules(
    rules: Mapping[str, Rule | PooledRule], thresholds: Mapping[str, Mapping[str | None, Thresholds]], case: str | None
) -> dict[str, Rule]:
    """The rules for an image of `case`, the pooled ones under their thresholds (by rule, then by case)."""
    return {
        name: thresholds[name][rule.key(case)[1]].decide if isinstance(rule, PooledRule) else rule
        for name, rule in rules.items()
    }


def see_padding(rules: Iterable[Rule | PooledRule]) -> bool:
    """Whether any of the rules wants the padding of the window."""
    return any(isinstance(rule, SeesPadding) for rule in rules)


def decide(rule: Rule, whole: Tensor, image: Tensor, place: tuple[slice, slice]) -> Tensor:
    """The (1, C, H', W') map with its padding, the image's own (1, C, H, W) and its place -> (H, W) int64 labels."""
    return rule(whole)[0][place] if isinstance(rule, SeesPadding) else rule(image)[0]
