"""A training and the rules that judge it: its command, its folder, and what of it exists."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from exp.config.experiment import TRAINING_GROUPS, ExperimentConfig, load_experiment, training_digest
from exp.files.text import read_json
from exp.runtime.errors import InputError

JUDGED = ("data", "test")  # of the config of an evaluation, beside its rule
GROUPS = ("model", "data", "loss", "schedule", "optim", "test")
# States of a cell, from nothing to everything.
WAITING = "waits for its training"
MISSING, INTERRUPTED, TRAINED, DONE = "to be trained", "interrupted", "to be judged", "done"
UNTRAINED = "to be judged without a network"
PANELS = 2  # of each kind: the pictures of the report
PICTURED_RULE = "rankseg_rma"
DATASET_RULE = "rankseg_rma_dataset"  # whose thresholds rankseg_rma_fixed takes


@dataclass(frozen=True)
class Again:
    """A further evaluation of trained weights, in a folder of its own beside the run.

    settings: --set of this evaluation alone. fit: a temperature is fitted on the training images, which is what it is
    for. thresholds: the folder of the evaluation whose thresholds rankseg_rma_fixed takes. true: not the network's
    probabilities are judged, but those from which the labels of the same images were drawn.
    """

    folder: str
    settings: tuple[str, ...] = ()
    fit: bool = False
    thresholds: str | None = None
    true: bool = False


@dataclass(frozen=True)
class Cell:
    """YAML names of one training, the test YAML and the rules (predict YAMLs) that judge it.

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
    again: Again | None = None

    @property
    def settings(self) -> tuple[str, ...]:
        """Everything behind --set, but for paths below OUTPUT."""
        fold = () if self.fold is None else (f"data.fold={self.fold}",)
        return (*self.overrides, *fold, *(self.again.settings if self.again else ()))

    @cached_property
    def config(self) -> ExperimentConfig:
        """The resolved config; InputError if the YAMLs and overrides do not fit together."""
        return _load_config(tuple(getattr(self, group) for group in GROUPS), self.rules, self.settings, self.seed)

    @cached_property
    def digest(self) -> str:
        """What tells the weights of this training from those of any other."""
        return training_digest(self.config.to_dict())

    @property
    def name(self) -> str:
        """The folder below OUTPUT that is --output_dir of this training alone: readable, and unlike any other's."""
        seed = f".seed{self.seed}" if self.seed else ""
        again = f"/{self.again.folder}" if self.again else ""
        return f"{self.config.run_name}{seed}.{self.digest[:8]}{again}"

    def flags(self, data_dir: Path, output: Path, rules: Sequence[str] | None = None) -> list[str]:
        """The flags of exp/main.py that train this cell and judge it by `rules` (None: by all); of a further
        evaluation without --test-only and the checkpoint, or those of scripts/evaluate_bayes.py."""
        rules = self.rules if rules is None else rules
        if self.again and self.again.true:
            flags = ["--data_yaml", self.data, "--predict_yaml", *rules, "--output_dir", str(output / self.name)]
            settings = [text for text in self.settings if text.startswith(("data.", "predict."))]
            return [*flags, "--metric", self.config.test.metric, *(["--set", *settings] if settings else [])]
        flags = ["--data_dir", str(data_dir), "--output_dir", str(output / self.name)]
        for group in GROUPS:
            flags += [f"--{group}_yaml", getattr(self, group)]
        flags += ["--predict_yaml", *rules]
        flags += ["--save_pred", str(PANELS)] if self.again is None else []
        flags += ["--seed", str(self.seed)] if self.seed else []
        flags += ["--fit_temperature", "train"] if self.again and self.again.fit else []
        settings = [*self.settings]
        if self.again and self.again.thresholds:
            beside = output / replace(self, again=replace(self.again, folder=self.again.thresholds)).name
            file = f"{DATASET_RULE}.{self.config.data.train_split}.thresholds.json"
            settings.append(f"predict.thresholds={beside / self.config.run_name / 'results' / file}")
        return [*flags, "--set", *settings] if settings else flags

    def rule_config(self, rule: str) -> dict[str, Any]:
        return next(r for r in self.config.to_dict()["predict"] if r["name"] == rule)


@lru_cache(maxsize=1024)
def _load_config(
    names: tuple[str, ...], rules: tuple[str, ...], settings: tuple[str, ...], seed: int
) -> ExperimentConfig:
    """YAML names of GROUPS and what else a config follows from; a table's figures ask for few of them, many times."""
    yamls = {group: [name] for group, name in zip(GROUPS, names)} | {"predict": list(rules)}
    config = load_experiment(yamls, settings, seed)
    return config.with_window(config.data.crop_size)


def join_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Cells of several tables -> each training once, with the rules of all: argmax first, and last the one whose gains
    over it choose the pictures."""
    joined: dict[tuple, Cell] = {}
    for cell in dict.fromkeys(cells):  # equal ones are many, and a config takes some milliseconds
        key = (cell.digest, cell.test, cell.again)
        known = joined.get(key)
        rules = dict.fromkeys((*(known.rules if known else ()), *cell.rules))
        joined[key] = replace(known or cell, rules=tuple(sorted(rules, key=_place)))
    return list(joined.values())


def _place(rule: str) -> int:
    return {"argmax": 0, PICTURED_RULE: 2}.get(rule, 1)


@dataclass(frozen=True)
class State:
    """What of a cell exists, the rules that have no results yet, and the trained weights that these can judge."""

    kind: str
    rules: tuple[str, ...] = ()
    weights: Path | None = None


class Existing:
    """Trainings and results below a folder, found by what they say of their config, not by their names."""

    def __init__(self, output: Path) -> None:
        self.results: dict[str, list[tuple[Path, dict]]] = {}
        self.true: list[tuple[Path, dict]] = []
        for path in sorted(output.glob("**/results/*.json")):
            content = _read_result(path)
            if content is not None and content.get("probabilities") == "true":
                self.true.append((path, content))
            elif content is not None:
                config = {group: content["training"][group] for group in (*TRAINING_GROUPS, "seed")}
                self.results.setdefault(training_digest(config), []).append((path, content))
        self._begun = {_read_facts(path)[0] for path in output.glob("**/checkpoints/iter_*.pt.json")}
        self._trained, self._ends = {}, {}
        for path in sorted(output.glob("**/checkpoints/last.safetensors.json")):
            digest, iteration = _read_facts(path)
            self._trained[digest], self._ends[digest] = path.with_suffix(""), iteration
        self.temperatures = {}
        for path in sorted(output.glob("**/results/temperature.json")):
            digest, iteration, temperature = _read_temperature(path)
            if digest is not None and self._is_finished(digest, iteration):
                self.temperatures[digest] = temperature

    def find(self, cell: Cell, rule: str) -> Path | None:
        """The JSON of a rule on the finished training of a cell, judged under the cell's test and rule YAMLs."""
        config = cell.config.to_dict()
        if cell.again is not None and cell.again.true:
            return self.find_true(config["data"], cell.rule_config(rule))
        test = config["test"]
        if test["temperature"] == "fitted":
            test["temperature"] = self.temperatures.get(cell.digest)
        expected = {"test": test, "predict": cell.rule_config(rule)}
        for path, content in self.results.get(cell.digest, []):
            judged = content["config"]
            same = all(same_settings(judged.get(group, {}), values) for group, values in expected.items())
            finished = self._is_finished(cell.digest, content["training"]["iteration"])
            if same and finished and same_images(judged.get("data", {}), config["data"]):
                return path
        return None

    def find_true(self, data: Mapping[str, Any], predict: Mapping[str, Any]) -> Path | None:
        """The JSON of a rule on the true probabilities of a data config's validation images."""
        left_out = {"name", "crop_size", "train_samples", "train_split"}  # what these images do not depend on
        for path, content in self.true:
            judged = content["config"]
            same = all(judged["data"].get(key) == value for key, value in data.items() if key not in left_out)
            if same and same_settings(judged["predict"], predict):
                return path
        return None

    def _is_finished(self, digest: str, iteration: int) -> bool:
        """Whether weights of so many iterations are those that the training ended with, as last.safetensors says."""
        return self._ends.get(digest) == iteration

    def state(self, cell: Cell) -> State:
        """How far the cell has come; a rule counts if its results are of the whole training.

        Where one is missing all are judged again: by the same probabilities, and timed and compared together.
        """
        fitted = cell.again is not None and cell.again.fit and cell.digest in self.temperatures
        if fitted or all(self.find(cell, rule) is not None for rule in cell.rules):
            return State(DONE)
        if cell.again is not None and cell.again.true:
            return State(UNTRAINED, cell.rules)
        if cell.digest in self._trained:
            return State(TRAINED, cell.rules, self._trained[cell.digest])
        if cell.again is not None:
            return State(WAITING, cell.rules)
        return State(INTERRUPTED if cell.digest in self._begun else MISSING, cell.rules)


def _read_result(path: Path) -> dict | None:
    """The JSON of a rule with its table beside it, or None if the file is of another kind."""
    if not path.with_suffix(".csv").is_file() or path.stem.endswith(".cases"):
        return None
    content = read_json(path, "the results of a rule")
    training, config = content.get("training"), content.get("config")
    if "rule" not in content or not isinstance(config, dict):
        return None
    if content.get("probabilities") == "true":
        return content if _are_groups(config, ("data", "predict")) else None
    if not (isinstance(training, dict) and _are_groups(training, TRAINING_GROUPS) and _are_groups(config, JUDGED)):
        return None
    return content if all(type(training.get(key)) is int for key in ("seed", "iteration")) else None


def _are_groups(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a file's config has these groups, each with its YAML's name."""
    return all(isinstance(config.get(g), dict) and isinstance(config[g].get("name"), str) for g in names)


def _read_temperature(path: Path) -> tuple[str | None, int, float]:
    """temperature.json -> the digest of the training that it was fitted for, its iterations, and the temperature."""
    try:
        content = read_json(path, "a fitted temperature")
        training = content["training"]
        config = {group: training[group] for group in (*TRAINING_GROUPS, "seed")}
        return training_digest(config), training["iteration"], content["temperature"]
    except (InputError, KeyError, TypeError):  # damaged: as if it were not there
        return None, 0, 1.0


def _read_facts(path: Path) -> tuple[str | None, int | None]:
    """The JSON beside a checkpoint -> the digest of the config that it belongs to, and its iterations."""
    try:
        facts = read_json(path, "the checksum of the file beside it")
    except InputError:  # damaged: as if it were not there
        return None, None
    return facts.get("config_digest"), facts.get("iteration")


def same_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two groups of a config are alike but for their YAMLs' names and where a thresholds file lay."""
    left_out = ("name", "thresholds")
    return {k: v for k, v in one.items() if k not in left_out} == {k: v for k, v in other.items() if k not in left_out}


def same_images(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two data configs evaluate the same images."""
    keys = ("dataset", "val_split", "val_samples", "fold", "test_crop")
    return all(one.get(key) == other.get(key) for key in keys)
