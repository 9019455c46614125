"""Data sets by name, and what turns them into batches."""

from exp.config import DataConfig
from exp.data.base import SegmentationDataset
from exp.data.camvid import CamVid
from exp.data.pascal_voc import PascalVOC
from exp.data.shapes import Shapes, ShapesBinary
from exp.data.transforms import Normalize, RandomCrop
from exp.errors import InputError
from exp.strict_yaml import closest

__all__ = ["DATASETS", "SegmentationDataset", "build_dataset", "build_normalize", "find_dataset"]

DATASETS: dict[str, type[SegmentationDataset]] = {
    "camvid": CamVid,
    "pascal_voc": PascalVOC,
    "shapes": Shapes,
    "shapes_binary": ShapesBinary,
}


def find_dataset(name: str) -> type[SegmentationDataset]:
    """A data set's class by its name in `data.dataset`."""
    if name not in DATASETS:
        raise InputError(f"data.dataset: unknown name '{name}'{closest(name, DATASETS)}")
    return DATASETS[name]


def build_dataset(config: DataConfig, data_dir: str | None, split: str, seed: int = 0) -> SegmentationDataset:
    """The 'train' or 'val' part of a data set; the training part augments. InputError if its files are not there."""
    training = split == "train"
    transform = RandomCrop(config.crop_size, config.scale_range, config.flip_prob, config.mean, seed)
    return find_dataset(config.dataset)(
        data_dir,
        config.train_split if training else config.val_split,
        max_samples=config.train_samples if training else config.val_samples,
        transform=transform if training else None,
    )


def build_normalize(config: DataConfig) -> Normalize:
    return Normalize(config.mean, config.std)
