"""What of trainings and results is there already, found by what the files say of their config."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exp.config.experiment import TRAINING_GROUPS, training_digest
from exp.config.published import SHA256, PublishedConfig, comparable_networks, weights_sha256
from exp.files.text import read_json
from exp.reproduction.job import Job
from exp.runtime.errors import InputError, passing_over

IMAGE_KEYS = ("dataset", "val_split", "val_samples", "fold", "test_crop")  # of a data config: what is evaluated
# Of a data config: what true maps do not depend on.
TRAIN_KEYS = ("name", "crop_size", "train_samples", "train_split", "augmentation")
NO_MATTER = {  # of the config of an evaluation: what changes neither its images nor the labels decided for them
    "data": (*TRAIN_KEYS, "scale_range", "flip_prob", "damaged"),
    "test": ("name", "metric", "metrics", "calibration", "window_batch", "images_per_forward", "prob_cache_gb"),
}
PUBLISHED = "published"  # the key of `training` in results of a network that others trained
# States of a job, from nothing to everything.
WAITING = "waits for its training"
MISSING, INTERRUPTED, TRAINED, DONE = "to be trained", "interrupted", "to be evaluated", "done"
UNTRAINED = "to be evaluated without a network"


@dataclass(frozen=True)
class State:
    """What of a job exists, the rules that have no results yet, and the trained weights that these can evaluate.

    weights: None too of a network that others trained, which is not found below the output.
    """

    kind: str
    rules: tuple[str, ...] = ()
    weights: Path | None = None


class Existing:
    """Trainings and results below a folder, found by what they say of their config, not by their names."""

    def __init__(self, output: Path) -> None:
        self.results: dict[str, list[tuple[Path, dict]]] = {}
        self.true: list[tuple[Path, dict]] = []
        self.maps: list[tuple[Path, dict]] = []  # of another program
        self.published: list[tuple[Path, dict]] = []
        self._contents: dict[Path, str] = {}  # by the files of networks that others trained
        for path in sorted(output.glob("**/results/*.json")):
            content = _read_result(path)
            if content is not None and content.get("probabilities") == "true":
                self.true.append((path, content))
            elif content is not None and "maps" in content:
                self.maps.append((path, content))
            elif content is not None and PUBLISHED in content["training"]:
                self.published.append((path, content))
            elif content is not None:
                self.results.setdefault(_digest(content["training"]), []).append((path, content))
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

    @property
    def without_training(self) -> list[tuple[Path, dict]]:
        return [*self.true, *self.maps]

    def find(self, job: Job, rule: str) -> Path | None:
        """The JSON of a rule on the finished training of a job, evaluated under the job's test and rule YAMLs."""
        config = job.config.to_dict()
        if job.reevaluation is not None and job.reevaluation.true:
            return self._find_true(config["data"], job.rule_config(rule))
        test = config["test"]
        if test["temperature"] == "fitted":
            test["temperature"] = self.temperatures.get(job.digest)
        for path, content in self._results_of(job):
            found = content["config"]
            same = same_settings(found["test"], test) and same_settings(found.get("predict", {}), job.rule_config(rule))
            if same and all(found["data"].get(key) == config["data"].get(key) for key in IMAGE_KEYS):
                return path
        return None

    def _results_of(self, job: Job) -> list[tuple[Path, dict]]:
        """The results of the finished training of a job, or of the network that others trained."""
        if job.is_published:
            network = self._describe_network(job.config.model)
            pairs = ((pair, comparable_networks(pair[1]["training"][PUBLISHED], network)) for pair in self.published)
            return [pair for pair, (found, wanted) in pairs if found == wanted]
        pairs = self.results.get(job.digest, [])
        return [pair for pair in pairs if self._is_finished(job.digest, pair[1]["training"]["iteration"])]

    def _describe_network(self, model: PublishedConfig) -> dict[str, Any]:
        """What results of a network that others trained say of it; of files that are not here not their content."""
        path = Path(model.weights)
        is_here = path.is_file() or (path / "config.json").is_file()
        if is_here and path not in self._contents:
            self._contents[path] = weights_sha256(path)
        plain = json.loads(json.dumps(model.identity))  # tuples are lists there
        return plain if path not in self._contents else {**plain, SHA256: self._contents[path]}

    def _find_true(self, data: Mapping[str, Any], predict: Mapping[str, Any]) -> Path | None:
        """The JSON of a rule on the true probabilities of a data config's validation images."""
        for path, content in self.true:
            found = content["config"]
            same = all(found["data"].get(key) == value for key, value in data.items() if key not in TRAIN_KEYS)
            if same and same_settings(found["predict"], predict):
                return path
        return None

    def weights(self, job: Job) -> Path | None:
        """The last weights of the job's training; None unless it came to its end."""
        return self._trained.get(job.digest)

    def _is_finished(self, digest: str, iteration: int) -> bool:
        """Whether weights of so many iterations are those that the training ended with, as last.safetensors says."""
        return self._ends.get(digest) == iteration

    def state(self, job: Job) -> State:
        """How far the job has come; a rule counts if its results are of the whole training.

        Where one is missing all are evaluated again: on the same probabilities, timed and compared together.
        """
        fitted = job.reevaluation is not None and job.reevaluation.fit and job.digest in self.temperatures
        if fitted or all(self.find(job, rule) is not None for rule in job.rules):
            return State(DONE)
        if job.reevaluation is not None and job.reevaluation.true:
            return State(UNTRAINED, job.rules)
        if job.is_published:
            return State(TRAINED, job.rules)
        if job.digest in self._trained:
            return State(TRAINED, job.rules, self._trained[job.digest])
        if job.reevaluation is not None:
            return State(WAITING, job.rules)
        return State(INTERRUPTED if job.digest in self._begun else MISSING, job.rules)


def _read_result(path: Path) -> dict | None:
    """The JSON of a rule with its table beside it, or None if the file is damaged or of another kind."""
    if not path.with_suffix(".csv").is_file() or path.stem.endswith(".cases"):
        return None
    content = {}
    with passing_over():
        content = read_json(path, "the results of a rule")
    is_true, is_maps = content.get("probabilities") == "true", "maps" in content
    groups = ("predict",) if is_maps else ("data", "predict") if is_true else ("data", "test")
    try:
        named = [content["config"][group]["name"] for group in groups]
        if is_maps:
            named.append(content["maps"]["prob_dir"])
        elif not is_true and PUBLISHED in content["training"]:
            named += [content["training"][PUBLISHED][key] for key in ("source", "weights")]
        elif not is_true:
            training = content["training"]
            named += [training[group]["name"] for group in TRAINING_GROUPS]
            named += [str(int(training[key])) for key in ("seed", "iteration")]
    except (KeyError, TypeError, ValueError):
        return None
    return content if "rule" in content and all(isinstance(name, str) for name in named) else None


def _digest(training: Mapping[str, Any]) -> str:
    """What a result or temperature says of its training -> what tells that training from any other."""
    return training_digest({group: training[group] for group in (*TRAINING_GROUPS, "seed")})


def _read_temperature(path: Path) -> tuple[str | None, int, float]:
    """temperature.json -> the digest of the training that it was fitted for, its iterations, and the temperature."""
    try:
        content = read_json(path, "a fitted temperature")
        return _digest(content["training"]), content["training"]["iteration"], content["temperature"]
    except (InputError, KeyError, TypeError):  # damaged: as if it were not there
        return None, 0, 1.0


def _read_facts(path: Path) -> tuple[str | None, int | None]:
    """The JSON beside a checkpoint -> the digest of the config that it belongs to, and its iterations."""
    try:
        facts = read_json(path, "the checksum of the file beside it")
    except InputError:  # damaged: as if it were not there
        return None, None
    return facts.get("config_digest"), facts.get("iteration")


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two JSONs of results say of their weights, images and test config -> 'key here -> there' where they differ.

    Empty: they can be compared. What one of them does not tell at all (an older file's weights_checksum) is let pass.
    """
    rows = []
    if "training" in one and "training" in other:
        pair = [one["training"], other["training"]]
        if all(PUBLISHED in training for training in pair):
            pair = [{PUBLISHED: plain} for plain in comparable_networks(*(training[PUBLISHED] for training in pair))]
        rows += _rows(*pair)
    if "maps" in one and "maps" in other:
        rows += _rows({"maps": one["maps"]}, {"maps": other["maps"]})
    configs = [content.get("config", {}) for content in (one, other)]
    for group, left_out in NO_MATTER.items():
        if all(group in config for config in configs):
            pair = [{group: {k: v for k, v in c[group].items() if k not in left_out}} for c in configs]
            rows += _rows(*pair)
    checksums = [content.get("weights_checksum") for content in (one, other)]
    return rows + ([f"weights_checksum {checksums[0]} -> {checksums[1]}"] if len({None, *checksums}) > 2 else [])


def _rows(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """'group.key here -> there' where two mappings of groups differ; null is as good as absent."""
    rows = []
    for name in sorted(one.keys() | other.keys()):
        before, after = one.get(name), other.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            rows += [f"{name}.{row}" for row in _rows(before, after)]
        elif before != after:
            rows.append(f"{name} {before} -> {after}")
    return rows


def same_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two groups of a config are alike but for their YAMLs' names and where a thresholds file lay.

    A key that is null is as good as absent: it may be younger than the other group's file.
    """
    left_out = ("name", "thresholds")
    first, second = ({k: v for k, v in g.items() if k not in left_out and v is not None} for g in (one, other))
    return first == second
