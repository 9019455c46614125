"""Damaged copies of the shipped YAMLs: what a mistyping, a merge gone wrong or a stranger may make of them."""

import dataclasses
import random
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from exp.config.experiment import CONFIG_DIR, GROUPS
from exp.config.strict_yaml import load_mapping

NEGATABLE = (
    *("crop_size", "stride", "batch_size", "train_iters", "train_epochs", "log_iters", "save_iters", "val_iters"),
    *("num_workers", "keep_checkpoints", "decoder_channels", "aux_channels", "low_level_channels", "atrous_rates"),
    *("lr", "weight_decay", "ce_weight", "image_weight", "class_weight", "dataset_weight", "smooth", "gamma", "fold"),
    *("pruning_prob", "threshold", "warmup_fraction", "power", "clip_norm", "temperature", "std", "mean"),
)
ABSURD = {  # far out of range
    "crop_size": [[10**7, 64], [0, 64]],
    "stride": [[10**7, 1]],
    "batch_size": [0, 10**9],
    "train_iters": [0, 10**12],
    "train_epochs": [0, 10**12],
    "log_iters": [0],
    "save_iters": [0],
    "val_iters": [0],
    "num_workers": [10**6],
    "keep_checkpoints": [0],
    "decoder_channels": [0, 10**6],
    "aux_channels": [0, 10**6],
    "low_level_channels": [0],
    "output_stride": [7],
    "encoder": ["", "../resnet50", "a b"],
    "pretrained": [""],
    "lr": [0, 1e9],
    "momentum": [1, 2.5],
    "warmup_fraction": [1],
    "pruning_prob": [1, 1.5],
    "threshold": [1.5],
    "ce_weight": [1.5],
    "dropout": [1],
    "fold": [5, 99],
    "flip_prob": [1.5],
    "window": [[200, -200], [0, 10**6]],
    "dataset": ["imagenet", "../camvid"],
    "train_split": ["../train", "/etc", ""],
    "val_split": ["..", "C:\\val"],
    "images": ["../images", "/images"],
    "labels": ["a/../../b"],
    "classes": [["one"], ["a", "a"], ["a", "b\n"]],
    "palette": [[[0, 0, 256], [1, 2, 3]], [[0, 0, 0]]],
    "label_map": [{0: 7}, {300: 0}],
    "channels": [2],
}


@dataclass(frozen=True)
class Mutation:
    """A damaged YAML of a group; `key` must be in the message (empty: there is none to name)."""

    group: str
    name: str
    kind: str
    key: str
    text: str


def dump_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def _hint(group: str, key: str) -> Any:
    return typing.get_type_hints(GROUPS[group])[key]


def _required(group: str) -> set[str]:
    fields = dataclasses.fields(GROUPS[group])
    return {f.name for f in fields if f.default is dataclasses.MISSING and f.name != "name"}


def unknown_key(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    key = rng.choice(list(values)) + rng.choice(("s", "_", "x"))
    yield key, dump_yaml({**values, key: 1})


def wrong_type(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    key = rng.choice(list(values))
    wrong = [{"a": {"b": 1}}, [["x"]], [1, [2]], [None]]
    if "str" not in str(_hint(group, key)):
        wrong.append("many")
    yield key, dump_yaml({**values, key: rng.choice(wrong)})


def missing_key(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    for key in sorted(_required(group) & values.keys()):
        yield key, dump_yaml({k: v for k, v in values.items() if k != key})


def negative(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    for key in values.keys() & set(NEGATABLE):
        value = values[key]
        if isinstance(value, list):
            yield key, dump_yaml({**values, key: [-1 - abs(v) for v in value]})
        elif value is not None and not isinstance(value, (str, bool)):
            yield key, dump_yaml({**values, key: -1 - abs(value)})


def out_of_range(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    for key in values.keys() & ABSURD.keys():
        for absurd in ABSURD[key]:
            yield key, dump_yaml({**values, key: absurd})


def not_finite(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    for key in values:
        if "float" in str(_hint(group, key)) and isinstance(values[key], (int, float)):
            yield key, dump_yaml({**values, key: rng.choice((float("nan"), float("inf"), 10**400))})


def wrong_length(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, list) and key not in ("scales",):
            yield key, dump_yaml({**values, key: rng.choice((value + value, value[:-1], []))})


def duplicate_key(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    key = rng.choice(list(values))
    yield key, dump_yaml(values) + dump_yaml({key: values[key]})


def other_choice(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, str) and "Literal" in str(_hint(group, key)):
            yield key, dump_yaml({**values, key: value + "2"})


def escaping_name(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    yield "name", dump_yaml({**values, "name": rng.choice(("../out", "/tmp/out", "a\nb", ".hidden", "x" * 300, ""))})


def python_object(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    yield "", dump_yaml(values) + "extra: !!python/object/apply:os.mkdir [MARKER]\n"


def broken(group: str, values: dict, rng: random.Random) -> Iterator[tuple[str, str]]:
    text = dump_yaml(values)
    yield (
        "",
        rng.choice(
            (
                text + "]",
                "",
                "- 1",
                "[" * 5000,
                text + "\tx: 1",
                "%",
                text + "a: &a [1]\nb: *a\n",
                "\x00",
                "a: !!bool x",
            )
        ),
    )


KINDS: tuple[Callable, ...] = (
    unknown_key,
    wrong_type,
    missing_key,
    negative,
    out_of_range,
    not_finite,
    wrong_length,
    duplicate_key,
    other_choice,
    escaping_name,
    python_object,
    broken,
)


def all_mutations(seed: int) -> list[Mutation]:
    """Every kind on every shipped YAML, the random choices by the seed."""
    rng, found = random.Random(seed), []
    for path in sorted(CONFIG_DIR.glob("*/*.yaml")):
        group, values = path.parent.name, load_mapping(path)
        for kind in KINDS:
            mutations = sorted(kind(group, values, rng))
            found += [Mutation(group, path.stem, kind.__name__, key, text) for key, text in mutations]
    return found


def draw_mutations(count: int, seed: int) -> list[Mutation]:
    """`count` of them, of each kind as many as of the others as far as there are."""
    rng, every = random.Random(seed), all_mutations(seed)
    by_kind = {kind.__name__: [m for m in every if m.kind == kind.__name__] for kind in KINDS}
    for mutations in by_kind.values():
        rng.shuffle(mutations)
    drawn = []
    while len(drawn) < count:
        drawn += [mutations.pop() for mutations in by_kind.values() if mutations]
    return drawn[:count]
