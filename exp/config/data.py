"""The data set, its split and augmentation: configs/data."""

from dataclasses import dataclass
from typing import Literal

from exp.config.checks import MAX_CROP, MAX_SCALE, require, require_area, require_entry, require_positive
from exp.config.families import DATASET_TABLE
from exp.files.paths import leads_out

NUM_FOLDS = 5
IGNORE_INDEX = 255  # from file to metric: pixels of this label never count


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
    augmentation: Literal["centred", "letter", "corner"] = "centred"  # how crops are padded and resampled
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the RGB values in 0..1, ImageNet
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    damaged: Literal["stop", "skip"] = "stop"  # what a training image that cannot be read does; in evaluation: stop
    test_crop: tuple[int, int] | None = None  # null: whole images; else the middle of each alone
    fold: int | None = None  # of data sets in folds: validated on; the other four are trained on
    window: tuple[float, float] | None = None  # of volumes: the values that become -1 and 1
    images: str | None = None  # of the data set folder, as the keys below: where they are, below data_dir
    labels: str | None = None
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None  # one colour per class
    label_map: dict[int, int] | None = None  # value in a file -> class or 255
    channels: Literal[1, 3] | None = None  # of an image
    label_noise: float | None = None  # of noisy shapes: the share of pixels labelled at random, any class as likely
    label_spread: float | None = None  # of noisy shapes, in pixels: how far away a pixel's label is taken from

    def __post_init__(self) -> None:
        require_positive(self, "train_samples", "val_samples", "std")
        require_positive(self, "crop_size", "test_crop", most=MAX_CROP)
        require_area(self, "crop_size", "test_crop")
        require_positive(self, "scale_range", most=MAX_SCALE)
        for key in ("train_split", "val_split", "images", "labels"):
            value = getattr(self, key)
            require(value is None or not leads_out(value), key, value, "a name that stays below data_dir")
        require_entry(self, "dataset", DATASET_TABLE)
        require(self.fold is None or 0 <= self.fold < NUM_FOLDS, "fold", self.fold, f"0..{NUM_FOLDS - 1} or null")
        if self.window:
            fits = -(2**15) <= self.window[0] < self.window[1] < 2**15
            require(fits, "window", self.window, "[low, high] of 16-bit values")
        for key, high in (("label_noise", 1), ("label_spread", 32)):
            value = getattr(self, key)
            require(value is None or 0 <= value <= high, key, value, f"a value in [0, {high}]")
        self._check_classes()

    def _check_classes(self) -> None:
        """A folder's classes, colours and label map fit together."""
        num_classes = len(self.classes or ())
        if self.classes:
            fits = 2 <= num_classes == len(set(self.classes)) <= IGNORE_INDEX
            require(fits, "classes", self.classes, f"2 to {IGNORE_INDEX} different names")
            fits = all(name.strip() and name.isprintable() for name in self.classes)
            require(fits, "classes", self.classes, "names of printable characters")
        if self.palette:
            fits = len(self.palette) == num_classes and all(0 <= v <= 255 for colour in self.palette for v in colour)
            require(fits, "palette", self.palette, "a colour of 0..255 for each class")
        if self.label_map:
            labels = {*range(num_classes), IGNORE_INDEX}
            fits = all(0 <= value <= 255 and label in labels for value, label in self.label_map.items())
            require(fits, "label_map", self.label_map, f"values 0..255 -> 0..{num_classes - 1} or {IGNORE_INDEX}")
        require(self.scale_range[0] <= self.scale_range[1], "scale_range", self.scale_range, "[low, high]")
        require(0 <= self.flip_prob <= 1, "flip_prob", self.flip_prob, "a value in [0, 1]")
        require(all(0 <= m <= 1 for m in self.mean), "mean", self.mean, "values in [0, 1]")
