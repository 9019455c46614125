"""Units under decision rules -> results, calibration and times."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from exp.evaluation.calibration import count_calibration
from exp.evaluation.metrics import EvalResult, build_results, count_rules
from exp.evaluation.probability_maps.reader import Unit
from exp.rules.pooled import PooledRule, gather_thresholds
from exp.rules.registry import Rule, bind_rules
from exp.runtime.errors import InputError

REST = "rest"  # the other class of a class that overlaps with others


@dataclass(frozen=True)
class MapEvaluation:
    """A result per rule, and the (N, C + 1, 3, num_bins) counts of the calibration. Volumes are cases."""

    results: tuple[EvalResult, ...]
    calibration: np.ndarray


def evaluate_maps(
    units: Callable[[], Iterator[Unit]], rules: Mapping[str, Rule | PooledRule], classes: Sequence[str]
) -> tuple[MapEvaluation, dict[str, float]]:
    """Every unit under every rule, and the milliseconds per unit that each rule takes to decide.

    Pooled rules have all units read once more before, for their thresholds.
    """
    scopes = {rule.scope for rule in rules.values() if isinstance(rule, PooledRule)}

    def maps() -> Iterator[tuple[Tensor, str | None]]:
        for unit in units():
            if "case" in scopes and unit.case is None:
                raise InputError(f"predict.scope: got case for {unit.name}, which is in no case, expected volumes")
            yield to_tensor(unit, len(classes)), unit.case
            del unit  # before the next map is read: there is room for one

    thresholds, table = gather_thresholds(rules, maps()), _Table(list(rules), classes)
    for unit in units():
        table.add(unit, bind_rules(rules, thresholds, unit.case))
        del unit
    return table.evaluation(), table.milliseconds()


def evaluate_overlapping(
    units: Callable[[], Iterator[Unit]], rules: Mapping[str, Rule], classes: Sequence[str]
) -> tuple[dict[str, MapEvaluation], dict[str, float]]:
    """Units whose classes overlap -> an evaluation per class, each decided and scored as a foreground alone.

    And the milliseconds per unit that each rule takes, for all classes.
    """
    tables = {name: _Table(list(rules), (REST, name)) for name in classes}
    for unit in units():
        if len(unit.prob) != len(classes):
            raise InputError(f"{unit.source}: got {len(unit.prob)} classes, expected {len(classes)}")
        for prob, label, table in zip(unit.prob, unit.label, tables.values()):
            table.add(replace(unit, prob=np.stack([1 - prob, prob]), label=label), rules)
        del unit, prob, label
    times = [table.milliseconds() for table in tables.values()]
    return {name: t.evaluation() for name, t in tables.items()}, {rule: sum(t[rule] for t in times) for rule in rules}


class _Table:
    """The counts of units, one after the other."""

    def __init__(self, rules: Sequence[str], classes: Sequence[str]) -> None:
        self.classes, self.seconds = classes, dict.fromkeys(rules, 0.0)
        self.rows: list[tuple[str, str | None, np.ndarray, np.ndarray]] = []
        self.confusion = torch.zeros(len(rules), len(classes), len(classes), dtype=torch.int64)

    def add(self, unit: Unit, rules: Mapping[str, Rule]) -> None:
        prob = to_tensor(unit, len(self.classes))
        label, preds = torch.from_numpy(unit.label), []
        for name, rule in rules.items():
            start = time.perf_counter()
            preds.append(rule(prob)[0])
            self.seconds[name] += time.perf_counter() - start
        counts = count_rules(preds, label, len(self.classes), confusion=self.confusion).numpy()
        self.rows.append((unit.name, unit.case, counts, count_calibration(prob, label).numpy()))
        if (unit.case is None) != (self.rows[0][1] is None):
            raise InputError(f"{unit.source}: got images and volumes together, expected the one or the other")

    def milliseconds(self) -> dict[str, float]:
        """Per unit, by rule."""
        return {name: round(1000 * seconds / len(self.rows), 4) for name, seconds in self.seconds.items()}

    def evaluation(self) -> MapEvaluation:
        names, cases, counts, calibration = zip(*self.rows)
        confusion = self.confusion.numpy()
        results = build_results(list(self.seconds), names, self.classes, np.stack(counts), cases, confusion=confusion)
        return MapEvaluation(results, np.stack(calibration))


def to_tensor(unit: Unit, num_classes: int) -> Tensor:
    """(C, *spatial) probabilities -> (1, C, *spatial); float64 stays, else float32."""
    if len(unit.prob) != num_classes:
        raise InputError(f"{unit.source}: got {len(unit.prob)} classes, expected {num_classes}")
    dtype = np.float64 if unit.prob.dtype == np.float64 else np.float32
    return torch.from_numpy(np.require(unit.prob, dtype, "W"))[None]
