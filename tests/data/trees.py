"""Small trees in the owners' layouts and encodings: Cityscapes, ADE20K, CamVid, and a user's own folders."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from exp.data.sets.cityscapes import TRAIN_IDS
from tests.conftest import scene, write_png


def write_jpg(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)


def write_cityscapes(data_dir: Path, splits: dict[str, int], size: tuple[int, int], train_ids: bool = False) -> None:
    """cityscapes/{leftImg8bit,gtFine}/<split>/<city>/..., with *_labelIds.png and, if wanted, *_labelTrainIds.png.

    Beside them lie the owners' colour and instance images. Every one of the 34 label ids is in every label.
    """
    table = np.full(34, 255, np.uint8)
    table[list(TRAIN_IDS)] = np.arange(19)
    for split, count in splits.items():
        for i in range(count):
            rng, city = np.random.default_rng((len(split), i)), ("aachen", "bonn")[i % 2]
            name = f"{split}/{city}/{city}_{i:06d}_000019"
            blocks = np.resize(rng.permutation(34).astype(np.uint8), (5, 7))
            ids = cv2.resize(blocks, size[::-1], interpolation=cv2.INTER_NEAREST)
            image = (np.stack([ids * 7, 255 - ids * 5, ids * 3], axis=-1) + rng.integers(0, 9, (*size, 3))).astype(
                np.uint8
            )
            labels = data_dir / "cityscapes" / "gtFine"
            write_png(data_dir / "cityscapes" / "leftImg8bit" / f"{name}_leftImg8bit.png", image)
            write_png(labels / f"{name}_gtFine_labelIds.png", ids)
            write_png(labels / f"{name}_gtFine_color.png", image)
            write_png(labels / f"{name}_gtFine_instanceIds.png", ids.astype(np.uint16) * 1000)
            if train_ids:
                write_png(labels / f"{name}_gtFine_labelTrainIds.png", table[ids])


def write_ade20k(data_dir: Path, splits: dict[str, int]) -> None:
    """ade/ADEChallengeData2016/{images,annotations}/<split>/ADE_*.{jpg,png} of several sizes; 0 is no class."""
    for split, count in splits.items():
        for i in range(count):
            rng, root = np.random.default_rng((len(split), i)), data_dir / "ade" / "ADEChallengeData2016"
            name, size = f"ADE_{'train' if split == 'training' else 'val'}_{i + 1:08d}", (60 + 8 * i, 90 - 6 * i)
            label = cv2.resize(rng.integers(0, 151, (4, 5), np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)
            label[0, :3] = 0, 1, 150
            write_jpg(root / "images" / split / f"{name}.jpg", np.stack([label, 255 - label, label // 2], axis=-1))
            write_png(root / "annotations" / split / f"{name}.png", label)


def write_camvid(data_dir: Path, splits: dict[str, int]) -> None:
    """camvid/<split>/ and <split>annot/ of 48 x 64; label 11 is void."""
    for split, count in splits.items():
        for i in range(count):
            image, label = scene(np.random.default_rng((len(split), i)), 48, 64, 11)
            label[:3] = 11
            write_png(data_dir / "camvid" / split / f"{split}_{i}.png", image)
            write_png(data_dir / "camvid" / f"{split}annot" / f"{split}_{i}.png", label)


def write_voc(data_dir: Path, splits: dict[str, int]) -> None:
    """A prepared VOCdevkit/VOC2012 of images of several sizes; labels as palette PNGs with 255 along the edge."""
    from exp.data.registry import DATASETS

    root = data_dir / "VOCdevkit" / "VOC2012"
    for split, count in splits.items():
        names = [f"2007_{split}_{i:06d}" for i in range(count)]
        lists = root / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
        folder = root / ("SegmentationClassTrainAug" if split == "trainaug" else "SegmentationClass")
        folder.mkdir(exist_ok=True)
        for i, name in enumerate(names):
            image, label = scene(np.random.default_rng((len(split), i)), 50 + 7 * i, 90 - 9 * i, 21)
            label[:2] = 255
            write_jpg(root / "JPEGImages" / f"{name}.jpg", image)
            indexed = Image.fromarray(label).convert("P")
            indexed.putpalette(np.array(DATASETS["pascal_voc"].palette, np.uint8).tobytes())
            indexed.putdata(label.flatten())
            indexed.save(folder / f"{name}.png")


def write_folder(data_dir: Path, splits: dict[str, int]) -> None:
    """<split>/images/*.jpg and <split>/labels/*.png of two classes, some in a folder below."""
    for split, count in splits.items():
        for i in range(count):
            image, label = scene(np.random.default_rng((len(split), i)), 48, 64, 2)
            name = f"{'site_b/' if i % 2 else ''}photo {i}"
            write_jpg(data_dir / split / "images" / f"{name}.jpg", image)
            write_png(data_dir / split / "labels" / f"{name}.png", label)
