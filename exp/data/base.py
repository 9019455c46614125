"""Sample and the base of the data sets: files -> checked arrays."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from exp.config.data import IGNORE_INDEX
from exp.data.decode import read_image, read_label
from exp.files.paths import NOT_UTF8, Fence, files_and_links, is_utf8, require_utf8
from exp.runtime.errors import InputError, describe_numbers


@dataclass(frozen=True)
class Sample:
    """An image and its label; `case` groups the slices of a volume."""

    name: str
    image: Path
    label: Path
    case: str | None = None


@dataclass(frozen=True)
class Item:
    """What a data set hands out: the image, its label and the sample's index.

    image: (channels, H, W) uint8 (RGB or grey) or int16 (CT, MR), contiguous; label: (H, W) uint8 in 0..C-1 or 255.
    damaged: why the sample could not be read, where a training skips it.
    """

    image: Tensor
    label: Tensor
    index: int
    damaged: str | None = None


Transform = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class SegmentationDataset(Dataset):
    """A split of a data set. A subclass states facts and lists its samples.

    data_dir: the folder that holds the data set's own folder; None where nothing is on disk.
    transform: (image, label, draw) -> the same, augmented; `draw` numbers the random choices (see loader.py).
    facts: attributes that the data YAML gives; exp/config/families.py says which.
    lenient: take the pairs that there are, none or twice the same too; what lacks a partner is in `unpaired`, path
        and reason.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    label_map: dict[int, int] = {}  # file value -> label; see label_table for values not named
    channels = 3  # of an image: 3 (RGB) or 1
    image_dtype = torch.uint8
    window: tuple[float, float] | None = None  # of one channel: the values that become -1 and 1
    limits: tuple[int, int] | None = None  # to which an image's values are clipped, after they are resampled
    archives: dict[str, tuple[str, ...]] = {}  # the owner's downloads: name -> the folders below data_dir that it fills
    totals: dict[str, int] = {}  # known number of images by split
    orientations: tuple[str, ...] = ()  # those that slices of volumes are in, one if all is well
    on_disk = True  # False: made on the fly, no data_dir

    def __init__(
        self,
        data_dir: str | Path | None,
        split: str,
        *,
        max_samples: int | None = None,
        transform: Transform | None = None,
        facts: Mapping[str, Any] | None = None,
        lenient: bool = False,
    ) -> None:
        for name, value in (facts or {}).items():
            setattr(self, name, value)
        if self.on_disk and data_dir is None:
            raise InputError(f"--data_dir: got none, expected the folder that holds {type(self).__name__}")
        self.root = require_folder(Path(data_dir)) if self.on_disk else None
        self.split = split
        self.transform = transform
        self.unpaired: list[tuple[Path, str]] = []
        try:
            self.samples = self.list_samples()[:max_samples]
        except UnpairedError as error:
            if not lenient:
                raise
            self.samples, self.unpaired = error.samples, error.unpaired
        if not self.samples and not lenient:
            raise InputError(f"{self.root}: got no samples of {type(self).__name__} in split '{split}', expected some")
        for sample in self.samples:
            if not lenient:
                require_utf8(sample.image, sample.name)
            elif not is_utf8(sample.name):
                self.unpaired.append((sample.image, f"got a name that is {NOT_UTF8}"))
        counts = Counter(sample.name for sample in self.samples)
        twice = next((name for name, count in counts.items() if count > 1), None)
        if twice is not None and not lenient:
            raise InputError(f"{self.root}: got '{twice}' twice in split '{split}', expected each sample once")
        self._label_table = label_table(len(self.classes), self.label_map)

    def list_samples(self) -> list[Sample]:
        """The samples of self.split in a fixed order; InputError for a missing folder, list or file."""
        raise NotImplementedError

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Index -> (H, W, channels) uint8 or int16 image and (H, W) uint8 label in 0..C-1 or 255."""
        sample = self.samples[index]
        image, values = read_image(sample.image, self.channels), read_label(sample.label)
        if values.shape != image.shape[:2]:  # drawn on the pixels as they are stored, without a look at EXIF?
            stored = read_image(sample.image, self.channels, as_stored=True)
            image = stored if values.shape == stored.shape[:2] else image
        if values.shape != image.shape[:2]:
            expected = f"{image.shape[:2]} as in {sample.image}"
            raise InputError(f"{sample.label}: got values of shape {values.shape}, expected {expected}")
        return image, self.decode_label(values, sample.label)

    def display(self, image: np.ndarray) -> np.ndarray:
        """(channels, H, W) image of an Item -> (H, W, 3) uint8 for pictures; one channel as grey, low to high."""
        if self.channels == 3:
            return image.transpose(1, 2, 0)
        return show_values(image[0], self.window)

    def decode_label(self, values: np.ndarray, path: Path) -> np.ndarray:
        """(H, W) values of a file -> (H, W) uint8 labels; InputError for a value that is no class."""
        if values.dtype != np.uint8:
            raise InputError(f"{path}: got {values.dtype} values, expected 8-bit class indices")
        wrong = cv2.LUT(values, (self._label_table < 0).astype(np.uint8))  # ten times as fast as numpy's bincount
        if cv2.countNonZero(wrong):
            known = describe_numbers(np.flatnonzero(self._label_table >= 0))
            found = np.unique(values[wrong > 0]).tolist()
            merged = describe_numbers((v for v in found if v in self.label_map.values()), ", ")
            hint = f" (label_map makes class {merged} of others: name the value {merged}, too; 255 ignores it)"
            said = f"{path}: got label value {describe_numbers(found, ', ')}, expected {known}"
            raise InputError(said + hint if merged else said)
        return cv2.LUT(values, self._label_table.astype(np.uint8)) if self.label_map else values

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        """An index, or (index, draw) where the transform makes random choices -> Item."""
        index, draw = key if isinstance(key, tuple) else (key, 0)
        image, label = self.read(index)
        if self.transform is not None:
            image, label = self.transform(image, label, draw)
        if self.limits is not None:
            image = image.clip(*self.limits)
        planes = np.stack(cv2.split(image))  # (H, W, channels) -> (channels, H, W)
        return Item(torch.from_numpy(planes), torch.from_numpy(np.ascontiguousarray(label)), index)


def class_names(text: str) -> tuple[str, ...]:
    """'road, traffic light' -> the classes' names."""
    return tuple(" ".join(name.split()) for name in text.split(","))


def colours(text: str) -> tuple[tuple[int, int, int], ...]:
    """'804080 f423e8' -> RGB, one colour per class."""
    return tuple(tuple(bytes.fromhex(colour)) for colour in text.split())


def numbered_colours(num: int) -> tuple[tuple[int, int, int], ...]:
    """Different colours for classes that have none of their owner: VOC's scheme, the bits of the number, reversed."""
    bits = [[(index >> (3 * place + channel) & 1) << (7 - place) for place in range(8)]
            for index in range(num) for channel in range(3)]  # fmt: skip
    values = list(map(sum, bits))
    return tuple(zip(values[::3], values[1::3], values[2::3]))


def show_values(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """(H, W) values of one channel -> (H, W, 3) uint8 grey, from the window's low end (black) to its high one."""
    low, high = window
    grey = (values.astype(np.float32) - low).clip(0, high - low) * (255 / (high - low))
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)


def label_table(num_classes: int, label_map: dict[int, int]) -> np.ndarray:
    """(256,) int16: file value -> label, -1 where the value is neither a class, nor mapped, nor 255.

    A value that is not mapped stays as it is, unless others become that class: it would be merged with them unasked.
    """
    table = np.full(256, -1, np.int16)
    table[:num_classes] = np.arange(num_classes)
    table[list(set(label_map.values()))] = -1
    table[IGNORE_INDEX] = IGNORE_INDEX
    for value, label in label_map.items():
        table[value] = label
    return table


def require_folder(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder (DATA.md shows the expected tree)")
    return path


class UnpairedError(InputError):
    """The message names the first file that is missing; `unpaired` has them all, `samples` the whole pairs."""

    def __init__(self, unpaired: list[tuple[Path, str]], samples: list[Sample]) -> None:
        super().__init__("{}: {}".format(*unpaired[0]))
        self.unpaired, self.samples = unpaired, samples


def pair_samples(
    names: list[str],
    image: Callable[[str], Path],
    label: Callable[[str], Path],
    inside: tuple[Path, Path] | None = None,
) -> list[Sample]:
    """Names -> samples, each with an image and a label on disk; UnpairedError if there are any that lack one.

    inside: where the names stand in a list, the folders that its images and labels may not leave, by no link either;
    InputError for one that does. The folders themselves may be links, and so may all above them.
    """
    samples, unpaired = [], []
    folders: dict[Path, dict[str, bool]] = {}
    fences = [Fence(folder) for folder in inside or ()]
    for sample in (Sample(name, image(name), label(name)) for name in names):
        missing = []
        for i, (path, other) in enumerate(((sample.image, sample.label), (sample.label, sample.image))):
            if path.parent not in folders:
                folders[path.parent] = files_and_links(path.parent)
            if path.name not in folders[path.parent]:
                missing.append((path, f"no such file, expected the partner of {other}"))
            elif fences:
                fences[i].check(path, is_link=folders[path.parent][path.name])
        samples += [] if missing else [sample]
        unpaired += missing
    if unpaired:
        raise UnpairedError(unpaired, samples)
    return samples
