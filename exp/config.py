"""YAML files and --set overrides -> one frozen ExperimentConfig. Nothing heavy is imported here."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from exp.errors import InputError
from exp.paths import leads_out
from exp.strict_yaml import build_dataclass, closest, load_mapping, parse_value, show

NUM_FOLDS = 5
MAX_CROP = 16384  # pixels along a side; the largest images that are read have 9459 x 9459 (exp/image_files.py)
MAX_SCALE = 100
MAX_WIDTH = 2**14  # channels; the widest layer of the encoders has some 4,000
MAX_BATCH = 2**16  # images, or windows
MAX_WORKERS = 1024  # processes
MAX_COUNT = 10**9  # iterations, epochs
MAX_NAME = 100  # characters of a YAML's name: five of them make the run folder's, which has 255 at most
IGNORE_INDEX = 255  # from file to metric: pixels of this label never count
CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"


def _require(condition: bool, key: str, got: object, expected: str) -> None:
    if not condition:
        raise InputError(f"key '{key}': got {show(got)}, expected {expected}")


def _require_positive(config: object, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        numbers = value if isinstance(value, tuple) else (value,)
        _require(value is None or all(v > 0 for v in numbers), key, value, "a value above 0")


def _require_at_most(config: object, most: int, *keys: str) -> None:
    """InputError for numbers that no experiment has, and that would take the machine's memory or processes."""
    for key in keys:
        value = getattr(config, key)
        numbers = value if isinstance(value, tuple) else (value,)
        _require(value is None or all(v <= most for v in numbers), key, value, f"{most} at most")


def _require_inside(config: object, *keys: str) -> None:
    """InputError for a folder or file whose name leads out of data_dir."""
    for key in keys:
        value = getattr(config, key)
        if value is not None:
            _require(not leads_out(value), key, value, "a name that stays below data_dir")


@dataclass(frozen=True)
class ModelConfig:
    """Encoder -> decoder -> head; the names are those of timm and segmentation_models_pytorch.

    A key that the decoder does not read is refused.
    """

    name: str
    decoder: Literal[
        "deeplabv3",
        "deeplabv3plus",
        "dpt",
        "fpn",
        "linknet",
        "manet",
        "pan",
        "pspnet",
        "segformer",
        "unet",
        "unetplusplus",
        "upernet",
    ]
    encoder: str  # any of timm, and segmentation_models_pytorch's own (mit_b0 ... mit_b5)
    decoder_channels: int | tuple[int, ...] | None = None  # the width, or one a block; null with linknet alone
    output_stride: Literal[8, 16, 32] = 32  # of the encoder's last feature map
    atrous_rates: tuple[int, int, int] | None = None  # deeplabv3, deeplabv3plus
    low_level_channels: int | None = None  # deeplabv3plus: the branch at stride 4
    pretrained: bool | str = True  # true: by name from the hub; false: random; text: a local file
    dropout: float = 0.1  # before the classifier of either head
    aux_channels: int = 256  # of the auxiliary head, on the encoder's last feature map but one

    def __post_init__(self) -> None:
        _require_positive(self, "decoder_channels", "atrous_rates", "low_level_channels", "aux_channels")
        _require_at_most(self, MAX_WIDTH, "decoder_channels", "atrous_rates", "low_level_channels", "aux_channels")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "a value in [0, 1)")
        fits = re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.encoder, re.ASCII)
        _require(bool(fits), "encoder", self.encoder, "a name of timm or segmentation_models_pytorch")
        _require(self.pretrained != "", "pretrained", self.pretrained, "true, false or a file")
        reads = DECODERS[self.decoder]
        kind = {0: "no such key", 1: "one whole number"}.get(reads.widths, f"a list of {reads.widths} whole numbers")
        given = self.decoder_channels
        widths = len(given) if isinstance(given, tuple) else int(given is not None)
        fits = widths == reads.widths and isinstance(given, tuple) == (reads.widths > 1)
        _require(fits, "decoder_channels", given, f"{kind} with decoder {self.decoder}")
        strides = " or ".join(map(str, reads.strides))
        _require(
            self.output_stride in reads.strides,
            "output_stride",
            self.output_stride,
            f"{strides} with decoder {self.decoder}",
        )
        for key in ("atrous_rates", "low_level_channels"):
            value = getattr(self, key)
            expected = "a value" if key in reads.keys else "no such key"
            _require((value is not None) == (key in reads.keys), key, value, f"{expected} with decoder {self.decoder}")


@dataclass(frozen=True)
class DecoderKeys:
    """What a decoder reads: how many widths, which output strides it takes, and keys that not all have."""

    widths: int = 1
    strides: tuple[int, ...] = (32,)
    keys: tuple[str, ...] = ()


DECODERS = {
    "deeplabv3": DecoderKeys(strides=(8, 16), keys=("atrous_rates",)),
    "deeplabv3plus": DecoderKeys(strides=(8, 16), keys=("atrous_rates", "low_level_channels")),
    "dpt": DecoderKeys(strides=(8, 16, 32)),  # that of the ViT's patches
    "fpn": DecoderKeys(),
    "linknet": DecoderKeys(widths=0),
    "manet": DecoderKeys(widths=5),
    "pan": DecoderKeys(strides=(16, 32)),
    "pspnet": DecoderKeys(strides=(8, 16, 32)),
    "segformer": DecoderKeys(),
    "unet": DecoderKeys(widths=5),
    "unetplusplus": DecoderKeys(widths=5),
    "upernet": DecoderKeys(),
}


@dataclass(frozen=True)
class DataConfig:
    """Which data set, how it is split, and the augmentation of its training images."""

    name: str
    dataset: str
    train_split: str
    val_split: str
    crop_size: tuple[int, int]  # height, width in pixels
    train_samples: int | None = None  # the first n alone; null: all of them
    val_samples: int | None = None
    scale_range: tuple[float, float] = (0.5, 2.0)
    flip_prob: float = 0.5
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the RGB values in 0..1, ImageNet
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    damaged: Literal["stop", "skip"] = "stop"  # what a training image that cannot be read does; in evaluation: stop
    test_crop: tuple[int, int] | None = None  # null: whole images; else the middle of each alone
    fold: int | None = None  # of data sets in folds: validated on; the other four are trained on
    window: tuple[float, float] | None = None  # of volumes: the values that become -1 and 1
    images: str | None = None  # of the data set folder, as the keys below: where they are, below data_dir
    labels: str | None = None
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None  # a colour a class
    label_map: dict[int, int] | None = None  # value in a file -> class or 255
    channels: Literal[1, 3] | None = None  # of an image
    label_noise: float | None = None  # of noisy shapes: the share of pixels labelled at random, any class as likely
    label_spread: float | None = None  # of noisy shapes, in pixels: how far away a pixel's label is taken from

    def __post_init__(self) -> None:
        _require_positive(self, "crop_size", "train_samples", "val_samples", "scale_range", "std", "test_crop")
        _require_at_most(self, MAX_CROP, "crop_size", "test_crop")
        _require_at_most(self, MAX_SCALE, "scale_range")
        _require_inside(self, "train_split", "val_split", "images", "labels")
        self._check_dataset()
        _require(self.fold is None or 0 <= self.fold < NUM_FOLDS, "fold", self.fold, f"0..{NUM_FOLDS - 1} or null")
        if self.window:
            fits = -(2**15) <= self.window[0] < self.window[1] < 2**15
            _require(fits, "window", self.window, "[low, high] of 16-bit values")
        for key, high in (("label_noise", 1), ("label_spread", 32)):
            value = getattr(self, key)
            _require(value is None or 0 <= value <= high, key, value, f"a value in [0, {high}]")
        self._check_classes()

    def _check_dataset(self) -> None:
        """The data set is a known one, and has the facts that it reads and no others."""
        _require(
            self.dataset in DATA_FACTS, "dataset", self.dataset, f"a known data set{closest(self.dataset, DATA_FACTS)}"
        )
        facts = DATA_FACTS[self.dataset]
        for key in sorted({key for known in DATA_FACTS.values() for key in known}):
            value = getattr(self, key)
            if key not in facts:
                _require(value is None, key, value, f"no such key with the data set {self.dataset}")
            elif facts[key]:
                _require(value is not None, key, value, f"a value: the data set {self.dataset} needs it")

    def _check_classes(self) -> None:
        """A folder's classes, colours and label map fit together."""
        num_classes = len(self.classes or ())
        if self.classes:
            fits = 2 <= num_classes == len(set(self.classes)) <= IGNORE_INDEX
            _require(fits, "classes", self.classes, f"2 to {IGNORE_INDEX} different names")
            fits = all(name.strip() and name.isprintable() for name in self.classes)
            _require(fits, "classes", self.classes, "names of printable characters")
        if self.palette:
            fits = len(self.palette) == num_classes and all(0 <= v <= 255 for colour in self.palette for v in colour)
            _require(fits, "palette", self.palette, "a colour of 0..255 for each class")
        if self.label_map:
            labels = {*range(num_classes), IGNORE_INDEX}
            fits = all(0 <= value <= 255 and label in labels for value, label in self.label_map.items())
            _require(fits, "label_map", self.label_map, f"values 0..255 -> 0..{num_classes - 1} or {IGNORE_INDEX}")
        _require(self.scale_range[0] <= self.scale_range[1], "scale_range", self.scale_range, "[low, high]")
        _require(0 <= self.flip_prob <= 1, "flip_prob", self.flip_prob, "a value in [0, 1]")
        _require(all(0 <= m <= 1 for m in self.mean), "mean", self.mean, "values in [0, 1]")


# By data set: the keys that state facts of it; true: it cannot do without.
DATA_FACTS = {
    "ade20k": {},
    "camvid": {},
    "cityscapes": {},
    "folder": {"images": True, "labels": True, "classes": True, "palette": True, "label_map": False, "channels": False},
    "hippocampus": {"fold": True, "window": True},
    "kits": {"fold": True, "window": True},
    "lits": {"fold": True, "window": True},
    "pascal_voc": {},
    "shapes": {},
    "shapes_binary": {},
    "shapes_noisy": {"label_noise": True, "label_spread": True},
    "shapes_noisy_binary": {"label_noise": True, "label_spread": True},
}


@dataclass(frozen=True)
class LossConfig:
    """The training criterion: (1 - aux_weight) x loss of the head + aux_weight x loss of the auxiliary head.

    jaccard, dice and tversky: ce_weight x cross-entropy + (1 - ce_weight) x the weighted mean of 1 - index, taken over
    the global batch (dataset_weight), per image and per class. A key that the loss does not read is refused.
    """

    name: str
    loss: Literal["ce", "focal", "jaccard", "dice", "tversky"]
    aux_weight: float = 0.5
    gamma: float | None = None  # focal's exponent
    ce_weight: float | None = None
    dataset_weight: float | None = None  # of the version for mIoUD; the three weights sum to 1
    image_weight: float | None = None  # mIoUI
    class_weight: float | None = None  # mIoUC
    smooth: float | None = None  # in pixels, added to numerator and denominator of the index
    alpha: float | None = None  # tversky's weight of false positives
    beta: float | None = None  # tversky's weight of false negatives

    def __post_init__(self) -> None:
        _require(0 <= self.aux_weight < 1, "aux_weight", self.aux_weight, "a value in [0, 1)")
        known = LOSS_OPTIONS[self.loss]
        for key in sorted({key for keys in LOSS_OPTIONS.values() for key in keys}):
            value = getattr(self, key)
            if key not in known:
                _require(value is None, key, value, f"no such key: the loss {self.loss} does not read it")
                continue
            _require(value is not None, key, value, f"a value: the loss {self.loss} reads it")
            _require(value >= 0, key, value, "0 or more")
        _require_positive(self, "smooth")
        if "ce_weight" in known:
            _require(self.ce_weight < 1, "ce_weight", self.ce_weight, "a value in [0, 1)")
            total = self.dataset_weight + self.image_weight + self.class_weight
            _require(math.isclose(total, 1), "dataset_weight", total, "1 with image_weight and class_weight added")


OVERLAP_OPTIONS = ("ce_weight", "dataset_weight", "image_weight", "class_weight", "smooth")
LOSS_OPTIONS = {
    "ce": (),
    "focal": ("gamma",),
    "jaccard": OVERLAP_OPTIONS,
    "dice": OVERLAP_OPTIONS,
    "tversky": (*OVERLAP_OPTIONS, "alpha", "beta"),
}


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, in iterations or epochs, and how often to log, save and validate."""

    name: str
    batch_size: int  # over all processes together
    train_iters: int | None = None
    train_epochs: int | None = None
    num_workers: int = 4  # per process
    log_iters: int = 50
    save_iters: int = 2000
    save_epochs: int | None = None  # a checkpoint also at the end of every so many epochs; null: not for that
    val_iters: int | None = None  # null: only at the end
    keep_checkpoints: int = 2  # the newest, at least two: one may be damaged; and the best of the validations
    early_stop: int | None = None  # stop after so many validations without a better score; null: never
    accumulation: int = 1  # micro-batches into which each process cuts its share of the batch
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision of the forward and backward pass
    channels_last: bool = True  # memory format; on a CPU a step of DeepLabV3+ takes 0.6 of the time
    compile: bool = False  # torch.compile
    nonfinite_limit: int = 10  # stop after so many steps in a row whose loss or gradient is no number

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "batch_size",
            "train_iters",
            "train_epochs",
            "log_iters",
            "save_iters",
            "save_epochs",
            "val_iters",
            "nonfinite_limit",
            "early_stop",
            "accumulation",
        )
        _require(
            self.early_stop is None or self.val_iters is not None,
            "early_stop",
            self.early_stop,
            "null where val_iters is null: the score comes from validations",
        )
        _require(self.keep_checkpoints >= 2, "keep_checkpoints", self.keep_checkpoints, "2 or more")
        _require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")
        _require_at_most(self, MAX_BATCH, "batch_size")
        _require_at_most(self, MAX_WORKERS, "num_workers")
        _require_at_most(self, MAX_COUNT, "train_iters", "train_epochs", "log_iters", "save_iters", "val_iters")
        _require_at_most(self, self.batch_size, "accumulation")
        _require(
            (self.train_iters is None) != (self.train_epochs is None),
            "train_iters",
            f"train_iters {self.train_iters}, train_epochs {self.train_epochs}",
            "one of the two, the other null",
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and the learning rate's course: linear warm-up from start_lr, then polynomial decay to 0."""

    name: str
    optimizer: Literal["adamw", "sgd"]
    lr: float  # of the encoder
    weight_decay: float
    head_lr_factor: float = 10.0  # decoder and heads, relative to the encoder
    momentum: float | None = None  # sgd alone
    start_lr: float = 1e-6
    warmup_fraction: float = 0.01
    power: float = 0.9
    clip_norm: float | None = None  # gradients are scaled down to this norm over all parameters
    ema_decay: float | None = None  # keeps an exponential moving average of the weights, e.g. 0.999

    def __post_init__(self) -> None:
        _require_positive(self, "lr", "head_lr_factor", "power", "clip_norm")
        _require_at_most(self, 1000, "lr", "weight_decay", "head_lr_factor", "power")
        decay = self.ema_decay
        _require(decay is None or 0 < decay < 1, "ema_decay", decay, "a value in (0, 1)")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.start_lr <= self.lr, "start_lr", self.start_lr, f"a value in [0, lr = {self.lr}]")
        _require(0 <= self.warmup_fraction < 1, "warmup_fraction", self.warmup_fraction, "a value in [0, 1)")
        sgd = self.optimizer == "sgd"
        _require(
            (self.momentum is not None) == sgd,
            "momentum",
            self.momentum,
            "a value in [0, 1)" if sgd else f"no such key with {self.optimizer}",
        )
        _require(not sgd or 0 <= self.momentum < 1, "momentum", self.momentum, "a value in [0, 1)")


@dataclass(frozen=True)
class TestConfig:
    """How an image becomes probabilities, and the per-image score by which rules are compared."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    name: str
    metric: Literal["mIoUI", "mDiceI", "mAccI"]
    crop_size: tuple[int, int] | None = None  # null: the training crop
    stride: tuple[int, int] | None = None  # null: ceil(2/3 crop)
    window_batch: int = 4  # windows that go through the network together
    weights: Literal["raw", "ema"] = "raw"  # ema: the moving average of optim.ema_decay
    amp: Literal["off", "bf16", "fp16"] = "off"  # of the forward pass; the softmax is computed in float32 always
    scales: tuple[float, ...] = (1.0,)  # of the image; the probabilities of all views are averaged
    flip: bool = False  # every scale also mirrored
    temperature: float | Literal["fitted"] = 1.0  # divides the logits; fitted: that of --fit_temperature
    calibration: bool = True  # count the calibration errors
    prob_cache_gb: float = 1.0  # a process keeps that many probabilities for the rules that need a second pass

    def __post_init__(self) -> None:
        _require_positive(self, "crop_size", "stride", "window_batch", "scales")
        _require_at_most(self, MAX_CROP, "crop_size", "stride")
        _require_at_most(self, MAX_BATCH, "window_batch")
        _require_at_most(self, MAX_SCALE, "scales")
        _require(len(set(self.scales)) == len(self.scales), "scales", self.scales, "each scale once")
        _require(self.prob_cache_gb >= 0, "prob_cache_gb", self.prob_cache_gb, "0 or more")
        if self.temperature != "fitted":
            _require_positive(self, "temperature")
        if self.crop_size and self.stride:
            fits = all(step <= side for step, side in zip(self.stride, self.crop_size))
            _require(fits, "stride", self.stride, f"at most the window, {self.crop_size}")

    def resolved(self, train_crop: tuple[int, int]) -> "TestConfig":
        """With the window and its stride filled in: the training crop, and ceil(2/3 crop) as in the paper."""
        crop = self.crop_size or train_crop
        stride = self.stride or tuple(math.ceil(2 * side / 3) for side in crop)
        return dataclasses.replace(self, crop_size=crop, stride=stride)


@dataclass(frozen=True)
class PredictConfig:
    """A decision rule by name and its options; an option that the rule does not read is refused."""

    name: str
    rule: Literal[
        "argmax",
        "threshold",
        "rankseg_rma",
        "rankseg_rma_pooled",
        "rankseg_rma_fixed",
        "rankseg_package",
        "rankseg_exact",
    ]
    threshold: float | None = None
    opt_metric: Literal["dice", "iou"] | None = None
    pruning_prob: float | None = None
    unassigned: Literal["max_score", "first"] | int | None = None
    to_nonoverlap_method: Literal["rma_score", "weight_prob", "prob"] | None = None
    contested: Literal["holders", "all"] | None = None
    solver: Literal["BA", "TRNA"] | None = None
    scope: Literal["case", "dataset"] | None = None  # the pixels that share their thresholds
    thresholds: str | None = None  # a file that a rule of scope: dataset wrote; with --set, for it is nobody's default

    def __post_init__(self) -> None:
        known = RULE_OPTIONS[self.rule]
        for key, value in self.all_options().items():
            if key == "thresholds" and key in known:
                continue  # build_rule asks for it
            if key in known:
                _require(value is not None, key, value, f"a value: the rule {self.rule} reads it")
            else:
                _require(value is None, key, value, f"no such key: the rule {self.rule} does not read it")
        if isinstance(self.unassigned, int):
            _require(0 <= self.unassigned < IGNORE_INDEX, "unassigned", self.unassigned, "a class")
        _require(self.thresholds != "", "thresholds", self.thresholds, "a file or null")
        for key in ("threshold", "pruning_prob"):
            value = getattr(self, key)
            _require(value is None or 0 <= value < 1, key, value, "a value in [0, 1)")

    def all_options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("name", "rule")}

    def options(self) -> dict[str, Any]:
        """The keywords of this rule's function."""
        return {key: value for key, value in self.all_options().items() if key in RULE_OPTIONS[self.rule]}


RULE_OPTIONS = {
    "argmax": (),
    "threshold": ("threshold",),
    "rankseg_rma": ("opt_metric", "pruning_prob", "unassigned", "to_nonoverlap_method", "contested"),
    "rankseg_rma_pooled": ("opt_metric", "pruning_prob", "scope"),
    "rankseg_rma_fixed": ("thresholds",),
    "rankseg_package": ("opt_metric", "pruning_prob", "solver"),
    "rankseg_exact": ("opt_metric",),
}
TRAINING_GROUPS = ("model", "data", "loss", "schedule", "optim")  # with the seed: what decides the weights
# What may differ between a run and its resumption without changing what is learnt or read from a checkpoint.
FREE_KEYS = {
    "model": ("pretrained",),
    "schedule": (
        "num_workers",
        "log_iters",
        "save_iters",
        "save_epochs",
        "val_iters",
        "keep_checkpoints",
        "nonfinite_limit",
    ),
    "data": ("val_split", "val_samples", "damaged"),
}
EXCLUSIVE = {("schedule", "train_iters"): "train_epochs", ("schedule", "train_epochs"): "train_iters"}
RESERVED_NAMES = ("comparison", "calibration", "timing", "temperature", "older")  # in a run's folders, no rule's
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

    model: ModelConfig
    data: DataConfig
    loss: LossConfig
    schedule: ScheduleConfig
    optim: OptimConfig
    test: TestConfig
    predict: tuple[PredictConfig, ...]
    seed: int

    @property
    def run_name(self) -> str:
        """The run folder's name: what was trained, not how it is judged."""
        data = self.data.name if self.data.fold is None else f"{self.data.name}_fold{self.data.fold}"
        return ".".join((self.model.name, data, self.loss.name, self.schedule.name, self.optim.name))

    def with_window(self, train_crop: tuple[int, int]) -> "ExperimentConfig":
        """The resolved config: where the test YAML names no window, it is the crop that the network was trained on."""
        try:
            return dataclasses.replace(self, test=self.test.resolved(train_crop))
        except InputError as error:
            raise InputError(f"test and data YAMLs: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, for YAML, JSON and checkpoints."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def dump_config(config: ExperimentConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None)


def training_digest(config: Mapping[str, Any]) -> str:
    """A config's plain dict -> 64 hexadecimal digits (SHA-256) that tell which weights come out of it.

    YAML names and the keys of FREE_KEYS do not count; of model.pretrained only whether there are pretrained weights,
    not where they were read from.
    """
    kept = {
        group: {k: v for k, v in config[group].items() if k not in ("name", *FREE_KEYS.get(group, ()))}
        for group in TRAINING_GROUPS
    }
    kept["model"]["pretrained"] = bool(config["model"]["pretrained"])
    text = json.dumps({**kept, "seed": config["seed"]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load_experiment(yamls: Mapping[str, Sequence[str]], overrides: Iterable[str], seed: int) -> ExperimentConfig:
    """YAML names (or paths) by group and group.key=value overrides -> the config, but for the window (with_window).

    Raises InputError naming the file or the override, the key, what was got and what was expected.
    """
    return ExperimentConfig(**load_groups(yamls, overrides), seed=seed)


def load_groups(yamls: Mapping[str, Sequence[str]], overrides: Iterable[str]) -> dict[str, Any]:
    """As load_experiment, for some of the groups: group -> its config, for predict a tuple of them."""
    values = {
        group: [(path, load_mapping(path)) for path in (find_yaml(group, name) for name in names)]
        for group, names in yamls.items()
    }
    origins = {}
    for text in overrides:
        _apply_override(text, values, origins)
    configs = {}
    for group, files in values.items():
        built = [
            build_dataclass(GROUPS[group], {"name": path.stem, **mapping}, path, origins.get(group, {}))
            for path, mapping in files
        ]
        for config, (path, _) in zip(built, files):
            _check_name(config.name, path)
        configs[group] = tuple(built) if group == "predict" else built[0]
    names = [c.name for c in configs.get("predict", ())]
    if len(set(names)) < len(names):
        raise InputError(f"--predict_yaml: got {' '.join(names)}, expected each rule once")
    for name in names:
        if name in RESERVED_NAMES or name.endswith(".cases"):
            raise InputError(
                f"--predict_yaml: got a rule named '{name}', expected another name: results/ has files of it"
            )
    return configs


def _check_name(name: str, path: Path) -> None:
    """InputError for a name that could not stand in the names of a run's folders and files."""
    fits = name.isprintable() and 0 < len(name) <= MAX_NAME and not name.startswith(".") and not set(name) & set("/\\:")
    if not fits:
        raise InputError(
            f"{path}: key 'name': got {show(name)}, expected 1 to {MAX_NAME} printable characters without / \\ : and "
            "no dot in front"
        )


def check_files(config: ExperimentConfig, *, from_scratch: bool) -> None:
    """InputError for a file that a YAML names and that is not there; from_scratch: no checkpoint has the weights."""
    if from_scratch and isinstance(config.model.pretrained, str):
        _require_file("model.pretrained", config.model.pretrained, "a state dict (.pt, .pth, .safetensors)")
    for rule in config.predict:
        if rule.thresholds is not None:
            _require_file("predict.thresholds", rule.thresholds, "a thresholds file of a rule of scope: dataset")


def _require_file(key: str, name: str, expected: str) -> None:
    if "\0" in name or not Path(name).is_file():
        raise InputError(f"key '{key}': got {show(name)}, which is no file, expected {expected}")


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
    known = [f.name for f in dataclasses.fields(GROUPS[group]) if f.name != "name"]
    if key not in known:
        raise InputError(f"--set {text}: unknown key '{key}'{closest(key, known)}")
    mappings = [mapping for _, mapping in values[group]]
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
