"""The data sets by name: a data YAML -> the data set, its augmentation, its normalisation."""

from pkgutil import resolve_name
from typing import Any

from exp.config.data import DataConfig
from exp.config.families import DATASET_TABLE
from exp.data.base import SegmentationDataset
from exp.data.transforms import CenterCrop, Normalize, RandomCrop

DATASETS: dict[str, type[SegmentationDataset]] = {
    name: resolve_name(f"exp.data.sets.{row.code}") for name, row in DATASET_TABLE.items()
}


def build_dataset(config: DataConfig, data_dir: str | None, split: str, seed: int = 0) -> SegmentationDataset:
    """The 'train' or 'val' part of a data set; the training part augments. InputError if its files are not there."""
    training, cls = split == "train", DATASETS[config.dataset]
    return cls(
        data_dir,
        config.train_split if training else config.val_split,
        max_samples=config.train_samples if training else config.val_samples,
        transform=build_transform(config, training, seed),
        facts=dataset_facts(config),
    )


def dataset_facts(config: DataConfig) -> dict[str, Any]:
    """The facts of the data set that the YAML gives."""
    return {key: value for key in DATASET_TABLE[config.dataset].keys if (value := getattr(config, key)) is not None}


def build_transform(config: DataConfig, training: bool, seed: int) -> RandomCrop | CenterCrop | None:
    """Augmentation of training images; of the others the middle, if the YAML says so."""
    if training:
        kind, window = config.augmentation, _window(config)
        limits = None if window is None else (round(window[0]), round(window[1]))
        fill = tuple(round(mean) for mean in build_normalize(config).mean)
        if limits is not None and kind != "corner":
            fill = limits[:1]
        return RandomCrop(config.crop_size, config.scale_range, config.flip_prob, fill, seed, kind, limits)
    return CenterCrop(config.test_crop) if config.test_crop else None


def build_normalize(config: DataConfig) -> Normalize:
    """Colours by the YAML's mean and std; one channel so that its window becomes [-1, 1]."""
    if (window := _window(config)) is not None:
        low, high = window
        return Normalize(mean=((low + high) / 2,), std=((high - low) / 2,))
    return Normalize(tuple(255 * m for m in config.mean), tuple(255 * s for s in config.std))


def _window(config: DataConfig) -> tuple[float, float] | None:
    """The values that become -1 and 1 where images have one channel; None for colours."""
    cls = DATASETS[config.dataset]
    return (config.window or cls.window) if (config.channels or cls.channels) == 1 else None
