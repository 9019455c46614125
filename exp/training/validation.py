"""Validations during training: what they scored, which weights were best, when to stop."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from exp.evaluation.evaluator import Evaluation, Evaluator
from exp.evaluation.masks import MaskWriter
from exp.evaluation.pictures import predict_panel
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.training.logger import Logger

LOGGED_PICTURES = 3


@dataclass
class ScoreHistory:
    """The validation score by iteration, in percent, higher is better.

    name: what the score is of; scores of another name are not compared with. patience: training stops after so many
    validations in a row that bring no new best; None: never.
    """

    name: str
    patience: int | None
    scores: dict[int, float] = field(default_factory=dict)

    def add(self, iteration: int, score: float) -> bool:
        """Note a score -> whether it is above all before. NaN is below all others."""
        self.scores[iteration] = -math.inf if math.isnan(score) else score
        return self.best == iteration

    @property
    def best(self) -> int | None:
        """The iteration of the highest score, the first of equals."""
        return max(sorted(self.scores), key=self.scores.get, default=None)

    @property
    def stopped(self) -> bool:
        """Whether the patience is at its end."""
        return self.patience is not None and sum(i > self.best for i in self.scores) >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "scores": dict(self.scores)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint's scores; those of another name are left aside, or refused where they decide."""
        if state["name"] == self.name:
            self.scores = dict(state["scores"])
        elif self.patience is not None and state["scores"]:
            raise InputError(
                f"schedule.early_stop: got validations by {self.name}, expected them by {state['name']}, as before "
                "the interruption"
            )

    def describe(self) -> str:
        return f"best {self.name}: {self.scores[self.best]:.2f} after {self.best} iterations"


@dataclass
class Validation:
    """Evaluates the weights in training on every rank alike; keeps the last evaluation, and the best weights.

    model: what is evaluated, raw or averaged weights. save_best: called with the iteration of a new best; None: never.
    sink: the iteration -> what takes the decisions of that validation.
    """

    model: nn.Module
    evaluator: Evaluator
    metric: str
    history: ScoreHistory
    save_best: Callable[[int], None] | None
    logger: Logger
    dist: Dist
    sink: Callable[[int], MaskWriter | None] = lambda iteration: None
    last: tuple[int, Evaluation] | None = None

    def __call__(self, iteration: int) -> bool:
        """Evaluate the weights after `iteration` iterations -> whether to stop."""
        evaluation = self.evaluate(iteration)
        score = evaluation.results[0].scores()[self.metric]
        if self.history.add(iteration, score) and self.save_best is not None:
            self.save_best(iteration)
        if self.history.stopped:
            self.logger.message(f"stopped early after {iteration} iterations; {self.history.describe()}")
        return self.history.stopped

    def evaluate(self, iteration: int) -> Evaluation:
        """The rules' evaluation of the weights after `iteration` iterations, logged; not computed twice."""
        if self.last is not None and self.last[0] == iteration:
            return self.last[1]
        self.dist.share_buffers(self.model)
        evaluation = self.evaluator(self.model, self.sink(iteration))
        scores = {result.rule: result.scores() for result in evaluation.results}
        values = {f"val/{rule}/{name}": value for rule, row in scores.items() for name, value in row.items()}
        self.logger.scalars(iteration, values)
        for index in range(min(LOGGED_PICTURES, len(self.evaluator.dataset)) if self.dist.is_main else 0):
            panel = predict_panel(self.evaluator, self.model, evaluation.thresholds, index)
            self.logger.image(iteration, f"val/{index}", panel)
        self.last = iteration, evaluation
        return evaluation
