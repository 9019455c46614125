"""YAML files and --set overrides -> one frozen ExperimentConfig. Nothing heavy is imported here."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from exp.config.data import NUM_FOLDS, DataConfig
from exp.config.evaluation import PredictConfig, TestConfig
from exp.config.loss import LossConfig
from exp.config.model import ModelConfig
from exp.config.published import PublishedConfig, choose_variant, is_published, split_variant
from exp.config.strict_yaml import build_dataclass, closest, load_mapping, parse_value, show
from exp.config.training import OptimConfig, ScheduleConfig
from exp.runtime.errors import InputError

MAX_NAME = 100  # characters of a YAML's name: five of them make the run folder's, which has 255 at most
NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
TRAINING_GROUPS = ("model", "data", "loss", "schedule", "optim")  # with the seed: what decides the weights
# What may differ between a run and its resumption without changing what is learnt or read from a checkpoint.
# init_from: that of a file from before, which loading does not ask for; resuming compares it.
FREE_KEYS = {
    "model": ("pretrained", "init_from"),
    "schedule": (
        "num_workers",
        "log_iters",
        "save_iters",
        "save_epochs",
        "val_iters",
        "keep_checkpoints",
        "nonfinite_limit",
        "cudnn_benchmark",
    ),
    "data": ("val_split", "val_samples", "damaged"),
}
# Keys that came after the first checkpoints, with what those were trained under: absent, they mean that.
LATER_KEYS: dict[str, dict[str, Any]] = {
    "data": {"augmentation": "corner"},
    "loss": {"both_classes": None},
    "model": {"variant": "library"},
    "optim": {"warmup": "from_start"},
    "schedule": {"tf32": "conv"},
}
LATER_TEST_KEYS: dict[str, Any] = {
    "metrics": [],
    "images_per_forward": 1,
    "padding": "corner",
    "whole": False,
    "short_side": None,
}
LATER_PREDICT_KEYS: dict[str, Any] = {"sees_padding": None, "theta": None, "assignment": None}
EXCLUSIVE = {("schedule", "train_iters"): "train_epochs", ("schedule", "train_epochs"): "train_iters"}
VARIANT = re.compile(r"(?P<name>[^=:/]+)=(?P<yaml>[^:]+):(?P<settings>.+)")  # of a rule: NAME=YAML:KEY=VALUE,...
RESERVED_NAMES = ("comparison", "calibration", "images", "timing", "temperature", "older")  # in a run's folders
RESERVED_ENDS = (".cases", ".thresholds")  # of names of files beside a rule's own
GROUPS = {
    "model": ModelConfig,
    "data": DataConfig,
    "loss": LossConfig,
    "schedule": ScheduleConfig,
    "optim": OptimConfig,
    "test": TestConfig,
    "predict": PredictConfig,
}


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment: a YAML of each group (several of predict) and the seed."""

    model: ModelConfig | PublishedConfig
    data: DataConfig
    loss: LossConfig
    schedule: ScheduleConfig
    optim: OptimConfig
    test: TestConfig
    predict: tuple[PredictConfig, ...]
    seed: int
    given_test: TestConfig  # as the YAML has it; `test` has the window filled in

    @property
    def is_published(self) -> bool:
        """Whether the network is one that others trained: there is nothing to train."""
        return isinstance(self.model, PublishedConfig)

    @property
    def run_name(self) -> str:
        """The run folder's name: what was trained, not how it is evaluated."""
        data = self.data.name if self.data.fold is None else f"{self.data.name}_fold{self.data.fold}"
        if self.is_published:
            return f"{self.model.name}.{data}.published"
        return ".".join((self.model.name, data, self.loss.name, self.schedule.name, self.optim.name))

    def with_window(self, train_crop: tuple[int, int]) -> "ExperimentConfig":
        """Where the test YAML names no window, it is the crop that the network was trained on."""
        try:
            return dataclasses.replace(self, test=self.given_test.resolved(train_crop))
        except InputError as error:
            raise InputError(f"test and data YAMLs: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, for YAML, JSON and checkpoints."""
        plain = _plain(dataclasses.asdict(self))
        del plain["given_test"]
        groups = [(plain["test"], LATER_TEST_KEYS), *((rule, LATER_PREDICT_KEYS) for rule in plain["predict"])]
        for values, later in groups:  # results that never asked for it stay comparable with older ones
            for key, default in later.items():
                if values[key] == default:
                    del values[key]
        if not self.is_published and plain["model"]["init_from"] is None:
            del plain["model"]["init_from"]
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def dump_config(config: ExperimentConfig) -> str:
    return yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None)


def with_number_keys(value: Any) -> Any:
    """A config that was read from JSON, where every key is text -> the same with whole numbers for keys as in YAML."""
    if isinstance(value, Mapping):
        numbers = value and all(isinstance(key, str) and NUMBER.fullmatch(key) for key in value)
        return {int(key) if numbers else key: with_number_keys(v) for key, v in value.items()}
    return [with_number_keys(v) for v in value] if isinstance(value, (list, tuple)) else value


def training_digest(config: Mapping[str, Any]) -> str:
    """A config's plain dict -> 64 hexadecimal digits (SHA-256) that tell which weights come out of it.

    YAML names and the keys of FREE_KEYS do not count; of model.pretrained only whether there are pretrained weights,
    not where they were read from, unless it names a published network; and of LATER_KEYS only other values than theirs.
    """
    kept, config = {}, with_number_keys(config)
    for group in TRAINING_GROUPS:
        left_out, later = ("name", *FREE_KEYS.get(group, ())), LATER_KEYS.get(group, {}).items()
        kept[group] = {k: v for k, v in config[group].items() if k not in left_out and (k, v) not in later}
    pretrained = config["model"].get("pretrained")
    kept["model"]["pretrained"] = pretrained if names_network(pretrained) else bool(pretrained)
    if config["model"].get("init_from"):
        kept["model"] |= {"pretrained": False, "init_from": config["model"]["init_from"]}
    text = json.dumps({**kept, "seed": config["seed"]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load_experiment(yamls: Mapping[str, Sequence[str]], overrides: Iterable[str], seed: int) -> ExperimentConfig:
    """YAML names (or paths) by group and group.key=value overrides -> the config, its window that of its own crop.

    InputError names the file or the override, the key, what was got and what was expected.
    """
    groups = load_groups(yamls, overrides)
    model = groups["model"]
    if isinstance(model, PublishedConfig):
        groups["data"] = dataclasses.replace(groups["data"], mean=model.mean, std=model.std)
        groups["test"] = model.test(groups["test"])
    config = ExperimentConfig(**groups, seed=seed, given_test=groups["test"])
    return config.with_window(config.data.crop_size)


def load_groups(yamls: Mapping[str, Sequence[str]], overrides: Iterable[str]) -> dict[str, Any]:
    """As load_experiment, for some of the groups: group -> its config, for predict a tuple of them.

    A name of predict may be NAME=YAML:KEY=VALUE,KEY=VALUE: that YAML under another name, with other values.
    """
    variants = [VARIANT.fullmatch(name) for name in yamls.get("predict", ())]

    values = {group: [_read_yaml(group, name) for name in names] for group, names in yamls.items()}
    origins = {}
    for text in overrides:
        _apply_override(text, values, origins)
    for variant, (_, mapping) in zip(variants, values.get("predict", ())):
        if variant:
            _apply_variant(variant, mapping)
    configs = {}
    for group, files in values.items():
        built = []
        for path, mapping in files:
            values_of, origin = {"name": path.stem, **mapping}, origins.get(group, {})
            config = build_dataclass(_class_of(group, mapping), values_of, path, origin)
            _check_name(group, config.name, path)
            built.append(config)
        configs[group] = tuple(built) if group == "predict" else built[0]
    names = [c.name for c in configs.get("predict", ())]
    if len(set(names)) < len(names):
        raise InputError(f"--predict_yaml: got {' '.join(names)}, expected each rule once")
    return configs


def _read_yaml(group: str, name: str) -> tuple[Path, dict[str, Any]]:
    """A YAML's name -> its path and what it says. Of a data set in folds, lits_fold2 is lits with `fold: 2`."""
    if group == "predict" and (variant := VARIANT.fullmatch(name)):
        name = variant["yaml"]
    fold = re.fullmatch(rf"(\w+)_fold([0-{NUM_FOLDS - 1}])", name)
    if group == "data" and fold and not (CONFIG_DIR / group / f"{name}.yaml").is_file():
        path = CONFIG_DIR / group / f"{fold[1]}.yaml"
        mapping = load_mapping(path) if path.is_file() else {}
        if "fold" in mapping:
            return path, {**mapping, "fold": int(fold[2])}
    if group == "model" and is_published(name):
        name, variant = split_variant(name)
        path = find_yaml(group, name)
        return path, choose_variant(load_mapping(path), variant, path)
    path = find_yaml(group, name)
    return path, load_mapping(path)


def load_published(name: str) -> PublishedConfig:
    """published/NAME, published/NAME:VARIANT or a path that ends in .yaml -> that network's config."""
    return require_published(load_groups({"model": [name]}, ())["model"], name)


def require_published(config: ModelConfig | PublishedConfig, name: str) -> PublishedConfig:
    """A model YAML's config; InputError unless it is that of a network that others trained."""
    if not isinstance(config, PublishedConfig):
        raise InputError(f"{name}: got a network to be trained, expected a published one (with the key 'source')")
    return config


def names_network(value: Any) -> bool:
    """Whether a value of model.pretrained or model.init_from names a published network, not a file of weights."""
    return isinstance(value, str) and is_published(value)


def _class_of(group: str, mapping: Mapping[str, Any]) -> type:
    """The dataclass that a YAML's mapping becomes."""
    return PublishedConfig if group == "model" and "source" in mapping else GROUPS[group]


def _apply_variant(variant: re.Match, mapping: dict) -> None:
    """Give a rule's mapping the name and the values of NAME=YAML:KEY=VALUE,KEY=VALUE."""
    known = [f.name for f in dataclasses.fields(PredictConfig) if f.name != "name"]
    for setting in variant["settings"].split(","):
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise InputError(f"--predict_yaml {variant[0]}: got '{setting}', expected KEY=VALUE{closest(key, known)}")
        mapping[key] = parse_value(value, f"--predict_yaml {variant[0]}")
    mapping["name"] = variant["name"]


def _check_name(group: str, name: str, path: Path) -> None:
    """InputError for a name that could not stand in the names of a run's folders and files."""
    fits = name.isprintable() and 0 < len(name) <= MAX_NAME and not name.startswith(".") and not set(name) & set("/\\:")
    if not fits:
        expected = f"1 to {MAX_NAME} printable characters without / \\ : and no dot in front"
        raise InputError(f"{path}: key 'name': got {show(name)}, expected {expected}")
    if group == "predict" and (name in RESERVED_NAMES or name.endswith(RESERVED_ENDS)):
        raise InputError(f"{path}: got a rule named '{name}', expected another name: results/ has files of it")


def check_files(config: ExperimentConfig, *, from_scratch: bool) -> None:
    """InputError for a file that a YAML names and that is not there; from_scratch: no checkpoint has the weights."""
    files = [("predict.thresholds", rule.thresholds) for rule in config.predict]
    if from_scratch and not config.is_published:
        origin = "pretrained" if config.model.init_from is None else "init_from"
        name = getattr(config.model, origin)
        if names_network(name):
            load_published(name)
        elif isinstance(name, str):
            files.append((f"model.{origin}", name))
    for key, name in files:
        if name is not None and ("\0" in name or not Path(name).is_file()):
            raise InputError(f"key '{key}': got {show(name)}, which is no file, expected one")


def find_yaml(group: str, name: str) -> Path:
    """A name under configs/<group>/, or a path that ends in .yaml -> the file's path."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"--{group}_yaml {name}: no such file")
        return Path(name)
    path = CONFIG_DIR / group / f"{name}.yaml"
    if not path.is_file():
        choices = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise InputError(f"--{group}_yaml {name}: no such YAML in {path.parent}{closest(name, choices)}")
    return path


def _apply_override(text: str, values: dict, origins: dict) -> None:
    """Set one group.key=value in the raw mappings; predict keys go to every rule whose YAML names the key."""
    target, equals, value = text.partition("=")
    group, dot, key = target.partition(".")
    if not (equals and dot and key):
        raise InputError(f"--set {text}: expected group.key=value")
    if group not in values:
        raise InputError(f"--set {text}: unknown group '{group}'{closest(group, values)}")
    mappings = [mapping for _, mapping in values[group]]
    known = [f.name for f in dataclasses.fields(_class_of(group, mappings[0])) if f.name != "name"]
    if key not in known:
        raise InputError(f"--set {text}: unknown key '{key}'{closest(key, known)}")
    if group == "predict":
        mappings = [mapping for mapping in mappings if key in mapping]
        if not mappings:
            raise InputError(f"--set {text}: none of the rules asked for reads the key '{key}'")
    parsed = parse_value(value, f"--set {text}")
    for mapping in mappings:
        mapping[key] = parsed
        other = EXCLUSIVE.get((group, key))
        if other and parsed is not None and other not in origins.get(group, {}):
            mapping[other] = None  # schedule.train_epochs=20 means: not in iterations
    origins.setdefault(group, {})[key] = f"--set {text}"
