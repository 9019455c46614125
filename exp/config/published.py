"""A network that others trained: configs/model/published, told from a network to be trained by its key `source`."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from exp.config.checks import MAX_CROP, require, require_positive
from exp.config.evaluation import TestConfig
from exp.config.strict_yaml import closest
from exp.files.atomic import file_sha256
from exp.runtime.errors import InputError

FOLDER = "published"  # below configs/model
WEIGHTS = ("*.safetensors*", "pytorch_model.bin")  # of a folder or at the hub, the first that is there
IN_FOLDERS = ("smp", "transformers")  # sources whose networks are a folder with config.json and weights
SHA256 = "sha256"  # what results say of the files, beside `identity`
# What the YAML tells of a network, and what says nothing of its outputs.
FACTS = ("name", "data", "like", "megabytes", "licence", "miou", "miou_on", "page")


@dataclass(frozen=True)
class PublishedConfig:
    """Where a trained network comes from, what its outputs are, and how its owner evaluates it.

    classes: the names of its outputs in their order; a data set's name stands for all of that data set's classes.
    names: its name of a class -> the data set's, where these differ.
    """

    name: str
    source: Literal["smp", "torchvision", "transformers", "mmseg", "onnx"]
    weights: str  # a name at the hub, an address, or a local file or folder; torchvision: also a weight name
    classes: tuple[str, ...]
    revision: str | None = None  # of a hub name: a commit, tag or branch; null: the newest
    architecture: str | None = None  # torchvision: the builder's name; mmseg: <head>_<backbone> as its configs have it
    names: dict[str, str] | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the RGB values in 0..1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    window: tuple[int, int] | None = None  # null: the whole image at once
    stride: tuple[int, int] | None = None  # null: ceil(2/3 window)
    short_side: int | None = None  # to which images are resized before; null: as they are
    size: tuple[int, int] | None = None  # to which every window is resized, of a network with a fixed input
    output: str | None = None  # onnx: the output's name; null: the first one
    outputs: Literal["logits", "probabilities"] = "logits"  # onnx; one channel: of the second class of two
    data: str | None = None  # the data YAML that it is evaluated on
    like: str | None = None  # the model YAML here of the same architecture, the row of the paper's tables
    megabytes: float | None = None  # of the file; null: not stated
    licence: str | None = None
    miou: float | None = None  # mIoUD under argmax in percent, one scale, as the owner states it
    miou_on: str | None = None  # of which images that is, where not of `data`'s validation set
    page: str | None = None  # where the owner says so

    def __post_init__(self) -> None:
        require_positive(self, "std", "megabytes")
        require_positive(self, "window", "stride", "short_side", "size", most=MAX_CROP)
        fits = all(0 <= mean <= 1 for mean in self.mean)
        require(fits, "mean", self.mean, "values in [0, 1]")
        require(bool(self.weights.strip()), "weights", self.weights, "a name, an address, a file or a folder")
        expected = "a name with torchvision and mmseg, none with others"
        fits = (self.architecture is not None) == (self.source in ("torchvision", "mmseg"))
        require(fits, "architecture", self.architecture, expected)
        fits = self.revision is None or self.source in IN_FOLDERS
        require(fits, "revision", self.revision, f"no such key but with {' and '.join(IN_FOLDERS)}")
        for key, default in (("output", None), ("outputs", "logits")):
            value = getattr(self, key)
            require(self.source == "onnx" or value == default, key, value, "no such key but with onnx")
        fits = self.window is not None or self.stride is None
        require(fits, "stride", self.stride, "null where the window is the whole image")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its outputs, as plain values; results of before `revision` was a key have none."""
        plain = asdict(self)
        return {k: v for k, v in plain.items() if k not in FACTS and (k, v) != ("revision", None)}

    def test(self, given: TestConfig) -> TestConfig:
        """A test YAML -> the same with the owner's windows and size, where it has none of its own."""
        short = given.short_side or self.short_side
        if given.crop_size or given.whole:
            return replace(given, short_side=short)
        whole = self.window is None
        return replace(given, crop_size=self.window, stride=given.stride or self.stride, short_side=short, whole=whole)


def is_published(name: str) -> bool:
    """Whether a name, of --model_yaml or model.pretrained, is published/NAME, or a path that ends in .yaml."""
    file, _ = split_variant(name)
    return file.endswith((".yaml", ".yml")) or (file.startswith(f"{FOLDER}/") and not Path(name).is_file())


def split_variant(name: str) -> tuple[str, str | None]:
    """NAME:VARIANT -> both; None for a name without, or the path of a file."""
    file, colon, variant = name.rpartition(":")
    return (file, variant) if colon and not Path(name).is_file() else (name, None)


def choose_variant(mapping: dict[str, Any], variant: str | None, path: Path) -> dict[str, Any]:
    """A YAML with `variants` -> the mapping of one of them (the first if None) under the name <YAML>_<variant>."""
    if "variants" not in mapping:
        if variant is not None:
            raise InputError(f"--model_yaml {path.stem}:{variant}: got a variant, expected none: {path} has none")
        return mapping
    variants, common = mapping["variants"], {key: value for key, value in mapping.items() if key != "variants"}
    kinds = variants.values() if isinstance(variants, dict) else ()
    if (
        not variants
        or not all(isinstance(name, str) for name in variants)
        or not all(isinstance(v, dict) for v in kinds)
    ):
        raise InputError(f"{path}: key 'variants': got {variants!r:.100}, expected keys and values by name")
    variant = next(iter(variants)) if variant is None else variant
    if variant not in variants:
        raise InputError(f"--model_yaml {path.stem}:{variant}: no such variant{closest(variant, variants)}")
    return {**common, "name": f"{path.stem}_{variant}", **variants[variant]}


def weights_sha256(path: Path) -> str:
    """A network's file, or the folder with its config.json and weights -> 64 hexadecimal digits of their content."""
    if path.is_file():
        return file_sha256(path)
    weights = next((found for pattern in WEIGHTS if (found := sorted(path.glob(pattern)))), [])
    lines = (f"{file.name} {file_sha256(file)}\n" for file in (path / "config.json", *weights))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def comparable_networks(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What two results say of their networks, without what is left out of a comparison.

    Where the files lie and their revision, if both tell the files' content; else, of an older one, the content.
    """
    left_out = ("weights", "revision") if SHA256 in one and SHA256 in other else (SHA256,)
    return [{key: value for key, value in network.items() if key not in left_out} for network in (one, other)]
