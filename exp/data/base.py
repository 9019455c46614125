"""Sample and the base of the data sets: files -> checked uint8 arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from exp.errors import InputError

IGNORE_INDEX = 255  # from file to metric: pixels of this label never count


@dataclass(frozen=True)
class Sample:
    """An image and its label; `case` groups the slices of a volume."""

    name: str
    image: Path
    label: Path
    case: str | None = None


@dataclass(frozen=True)
class Item:
    """What a data set hands out: (3, H, W) uint8 RGB, (H, W) uint8 label in 0..C-1 or 255, and the sample's index."""

    image: Tensor
    label: Tensor
    index: int


Transform = Callable[[Image.Image, Image.Image, int], tuple[Image.Image, Image.Image]]


class SegmentationDataset(Dataset):
    """A split of a data set. A subclass states facts and lists its samples.

    data_dir: the folder that holds the data set's own folder; None where nothing is on disk.
    transform: (image, label, draw) -> the same, augmented; `draw` numbers the random choices (see loader.py).
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    label_map: dict[int, int] = {}  # file value -> label; values not named stay as they are
    on_disk = True  # False: made on the fly, no data_dir

    def __init__(
        self,
        data_dir: str | Path | None,
        split: str,
        *,
        max_samples: int | None = None,
        transform: Transform | None = None,
    ) -> None:
        if self.on_disk and data_dir is None:
            raise InputError(f"--data_dir: got none, expected the folder that holds {type(self).__name__}")
        self.root = require_folder(Path(data_dir)) if self.on_disk else None
        self.split = split
        self.transform = transform
        self.samples = self.list_samples()[:max_samples]
        if not self.samples:
            raise InputError(f"{self.root}: got no samples of {type(self).__name__} in split '{split}', expected some")
        self._label_table = label_table(len(self.classes), self.label_map)

    def list_samples(self) -> list[Sample]:
        """The samples of self.split in a fixed order; InputError for a missing folder, list or file."""
        raise NotImplementedError

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Index -> RGB image and label image (mode L, values 0..C-1 or 255) of the same size."""
        sample = self.samples[index]
        image = read_image(sample.image).convert("RGB")
        values = np.asarray(read_image(sample.label))
        if values.ndim != 2:
            raise InputError(
                f"{sample.label}: got an image of {values.shape[-1]} channels, expected one channel of class indices"
            )
        if values.shape != image.size[::-1]:
            raise InputError(
                f"{sample.label}: got {values.shape[1]}x{values.shape[0]} pixels, expected "
                f"{image.size[0]}x{image.size[1]} as in {sample.image}"
            )
        return image, Image.fromarray(self.decode_label(values, sample.label))

    def decode_label(self, values: np.ndarray, path: Path) -> np.ndarray:
        """(H, W) values of a file -> (H, W) uint8 labels; InputError for a value that is no class."""
        if values.dtype != np.uint8:
            raise InputError(f"{path}: got {values.dtype} values, expected 8-bit class indices")
        present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
        wrong = present[self._label_table[present] < 0]
        if wrong.size:
            raise InputError(
                f"{path}: got label value {wrong[0]}, expected 0..{len(self.classes) - 1} or "
                f"{IGNORE_INDEX}" + "".join(f", or {v}" for v in self.label_map)
            )
        return self._label_table[values].astype(np.uint8) if self.label_map else values

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        """An index, or (index, draw) where the transform makes random choices -> Item."""
        index, draw = key if isinstance(key, tuple) else (key, 0)
        image, label = self.read(index)
        if self.transform is not None:
            image, label = self.transform(image, label, draw)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return Item(image, torch.from_numpy(np.array(label)), index)


def label_table(num_classes: int, label_map: dict[int, int]) -> np.ndarray:
    """(256,) int16: file value -> label, -1 where the value is neither a class, nor mapped, nor 255."""
    table = np.full(256, -1, np.int16)
    table[:num_classes] = np.arange(num_classes)
    table[IGNORE_INDEX] = IGNORE_INDEX
    for value, label in label_map.items():
        table[value] = label
    return table


def read_image(path: Path) -> Image.Image:
    """A path -> the decoded image; InputError if it cannot be read to the end."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of these on damaged files
        raise InputError(f"{path}: got a file that cannot be read ({error}), expected a PNG or JPEG image") from None


def require_folder(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder (DATA.md shows the expected tree)")
    return path


def pair_samples(names: list[str], image: Callable[[str], Path], label: Callable[[str], Path]) -> list[Sample]:
    """Names -> samples, each with an image and a label on disk; InputError for the first that lacks one."""
    samples = [Sample(name, image(name), label(name)) for name in names]
    present: dict[Path, set[str]] = {}
    for sample in samples:
        for path, other in ((sample.image, sample.label), (sample.label, sample.image)):
            if path.parent not in present:
                present[path.parent] = {p.name for p in require_folder(path.parent).iterdir()}
            if path.name not in present[path.parent]:
                raise InputError(f"{path}: no such file, expected the partner of {other}")
    return samples
