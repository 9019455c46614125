"""Data sets by name, and what turns them into batches."""

from typing import Any

from exp.config.data import DATA_FACTS, DataConfig
from exp.config.strict_yaml import closest
from exp.data.base import SegmentationDataset
from exp.data.sets.ade20k import ADE20K
from exp.data.sets.camvid import CamVid
from exp.data.sets.cityscapes import Cityscapes
from exp.data.sets.folder import Folder
from exp.data.sets.pascal_voc import PascalVOC
from exp.data.sets.shapes import Shapes, ShapesBinary, ShapesNoisy, ShapesNoisyBinary
from exp.data.sets.slices import Hippocampus, KiTS, LiTS
from exp.data.transforms import CenterCrop, Normalize, RandomCrop
from exp.runtime.errors import InputError

__all__ = ["DATASETS", "SegmentationDataset", "build_dataset", "build_normalize", "find_dataset"]

DATASETS: dict[str, type[SegmentationDataset]] = {
    "ade20k": ADE20K,
    "camvid": CamVid,
    "cityscapes": Cityscapes,
    "folder": Folder,
    "hippocampus": Hippocampus,
    "kits": KiTS,
    "lits": LiTS,
    "pascal_voc": PascalVOC,
    "shapes": Shapes,
    "shapes_binary": ShapesBinary,
    "shapes_noisy": ShapesNoisy,
    "shapes_noisy_binary": ShapesNoisyBinary,
}


def find_dataset(name: str) -> type[SegmentationDataset]:
    """A data set's class by its name in `data.dataset`."""
    if name not in DATASETS:
        raise InputError(f"data.dataset: unknown name '{name}'{closest(name, DATASETS)}")
    return DATASETS[name]


def build_dataset(config: DataConfig, data_dir: str | None, split: str, seed: int = 0) -> SegmentationDataset:
    """The 'train' or 'val' part of a data set; the training part augments. InputError if its files are not there."""
    training, cls = split == "train", find_dataset(config.dataset)
    return cls(
        data_dir,
        config.train_split if training else config.val_split,
        max_samples=config.train_samples if training else config.val_samples,
        transform=build_transform(config, training, seed),
        facts=dataset_facts(config),
    )


def dataset_facts(config: DataConfig) -> dict[str, Any]:
    """The facts of the data set that the YAML gives."""
    return {key: value for key in DATA_FACTS[config.dataset] if (value := getattr(config, key)) is not None}


def build_transform(config: DataConfig, training: bool, seed: int) -> RandomCrop | CenterCrop | None:
    """Augmentation of training images; of the others the middle, if the YAML says so."""
    if training:
        fill = tuple(round(mean) for mean in build_normalize(config).mean)
        return RandomCrop(config.crop_size, config.scale_range, config.flip_prob, fill, seed)
    return CenterCrop(config.test_crop) if config.test_crop else None


def build_normalize(config: DataConfig) -> Normalize:
    """Colours by the YAML's mean and std; one channel so that its window becomes [-1, 1]."""
    cls = find_dataset(config.dataset)
    if (config.channels or cls.channels) == 1:
        low, high = config.window or cls.window
        return Normalize(mean=((low + high) / 2,), std=((high - low) / 2,))
    return Normalize(tuple(255 * m for m in config.mean), tuple(255 * s for s in config.std))
