"""What of trainings and results is there already, found by what the files say of their config."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exp.config.experiment import TRAINING_GROUPS, training_digest
from exp.files.text import read_json
from exp.reproduction.job import Cell
from exp.runtime.errors import InputError

JUDGED = ("data", "test")  # of the config of an evaluation, beside its rule
# States of a cell, from nothing to everything.
WAITING = "waits for its training"
MISSING, INTERRUPTED, TRAINED, DONE = "to be trained", "interrupted", "to be judged", "done"
UNTRAINED = "to be judged without a network"


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
