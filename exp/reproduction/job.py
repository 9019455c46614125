"""A training and the rules that evaluate it: its config, its folder and its command."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from exp.config.experiment import ExperimentConfig, load_experiment, training_digest

GROUPS = ("model", "data", "loss", "schedule", "optim", "test")
PANELS = 2  # of each kind: the pictures of the report
PICTURED_RULE = "rankseg_rma"
DATASET_RULE = "rankseg_rma_dataset"  # whose thresholds rankseg_rma_fixed takes


@dataclass(frozen=True)
class Reevaluation:
    """A further evaluation of trained weights, in a folder of its own beside the run.

    settings: --set of this evaluation alone. fit: a temperature is fitted on the training images, which is what it is
    for. thresholds: the folder of the evaluation whose thresholds rankseg_rma_fixed takes. true: not the network's
    probabilities are evaluated, but those from which the labels of the same images were drawn.
    """

    folder: str
    settings: tuple[str, ...] = ()
    fit: bool = False
    thresholds: str | None = None
    true: bool = False


@dataclass(frozen=True)
class Job:
    """YAML names of one training, the test YAML and the rules (predict YAMLs) that evaluate it.

    overrides: group.key=value of --set; those of the fold are added by `fold`.
    """

    model: str
    data: str
    schedule: str
    optim: str
    rules: tuple[str, ...]
    loss: str = "ce"
    test: str = "test_iou"
    fold: int | None = None
    seed: int = 0
    overrides: tuple[str, ...] = ()
    reevaluation: Reevaluation | None = None

    @property
    def settings(self) -> tuple[str, ...]:
        """Everything behind --set, but for paths below OUTPUT."""
        fold = () if self.fold is None else (f"data.fold={self.fold}",)
        return (*self.overrides, *fold, *(self.reevaluation.settings if self.reevaluation else ()))

    @cached_property
    def config(self) -> ExperimentConfig:
        """The resolved config; InputError if the YAMLs and overrides do not fit together."""
        return _load_config(tuple(getattr(self, group) for group in GROUPS), self.rules, self.settings, self.seed)

    @cached_property
    def digest(self) -> str:
        """What tells the weights of this training from those of any other."""
        return training_digest(self.config.to_dict())

    @property
    def is_published(self) -> bool:
        """Whether others trained the network: there is an evaluation alone."""
        return self.config.is_published

    @property
    def name(self) -> str:
        """The folder below OUTPUT that is --output_dir of this training alone: readable, and unlike any other's."""
        seed = f".seed{self.seed}" if self.seed else ""
        again = f"/{self.reevaluation.folder}" if self.reevaluation else ""
        return f"{self.config.run_name}{seed}.{self.digest[:8]}{again}"

    def flags(self, data_dir: Path, output: Path, rules: Sequence[str] | None = None) -> list[str]:
        """The flags of exp/main.py that train this job, unless others did, and evaluate it by `rules` (None: by all).

        Of a reevaluation: without --test-only and the checkpoint, or those of scripts/evaluate_probabilities.py.
        """
        rules, again = self.rules if rules is None else rules, self.reevaluation
        folder = ["--predict_yaml", *rules, "--output_dir", str(output / self.name)]
        settings = [*self.settings]
        if again and again.true:
            flags = ["--true_of", self.data, *folder, "--metric", self.config.test.metric]
            settings = [text for text in settings if text.startswith(("data.", "predict."))]
            return [*flags, "--set", *settings] if settings else flags
        flags = ["--data_dir", str(data_dir), *(["--test-only"] if self.is_published else [])]
        for group in ("model", "data", "test") if self.is_published else GROUPS:
            flags += [f"--{group}_yaml", getattr(self, group)]
        flags += [*folder, *(["--seed", str(self.seed)] if self.seed else [])]
        if again is None:
            flags += ["--save_pred", str(PANELS)]
        elif again.fit:
            flags += ["--fit_temperature", "train"]
        elif again.thresholds:
            beside = output / replace(self, reevaluation=replace(again, folder=again.thresholds)).name
            file = f"{DATASET_RULE}.{self.config.data.train_split}.thresholds.json"
            settings.append(f"predict.thresholds={beside / self.config.run_name / 'results' / file}")
        return [*flags, "--set", *settings] if settings else flags

    def rule_config(self, rule: str) -> dict[str, Any]:
        return next(r for r in self.config.to_dict()["predict"] if r["name"] == rule)


@lru_cache(maxsize=1024)
def _load_config(
    names: tuple[str, ...], rules: tuple[str, ...], settings: tuple[str, ...], seed: int
) -> ExperimentConfig:
    """YAML names of GROUPS and what else a config follows from; a table's values ask for few of them, many times."""
    yamls = {group: [name] for group, name in zip(GROUPS, names)} | {"predict": list(rules)}
    return load_experiment(yamls, settings, seed)


def join_jobs(jobs: Iterable[Job]) -> list[Job]:
    """Jobs of several tables -> each training once, with the rules of all: argmax first, and last the one whose gains
    over it choose the pictures."""
    joined: dict[tuple, Job] = {}
    for job in dict.fromkeys(jobs):  # equal ones are many, and a config takes some milliseconds
        key = (job.digest, job.test, job.reevaluation)
        known = joined.get(key)
        rules = dict.fromkeys((*(known.rules if known else ()), *job.rules))
        joined[key] = replace(known or job, rules=tuple(sorted(rules, key=_place)))
    return list(joined.values())


def _place(rule: str) -> int:
    return {"argmax": 0, PICTURED_RULE: 2}.get(rule, 1)
