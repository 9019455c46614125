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


def write_pascal_context(data_dir: Path, splits: dict[str, int]) -> None:
    """A VOCdevkit/VOC2010 with SegmentationClassContext; 0 is no class, 59 the last."""
    root = data_dir / "VOCdevkit" / "VOC2010"
    for split, count in splits.items():
        names = [f"2008_{split}_{i:06d}" for i in range(count)]
        lists = root / "ImageSets" / "SegmentationContext"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            image, label = scene(np.random.default_rng((len(split), i)), 50 + 7 * i, 70, 60)
            label[0, :3] = 0, 1, 59
            write_jpg(root / "JPEGImages" / f"{name}.jpg", image)
            write_png(root / "SegmentationClassContext" / f"{name}.png", label)


def write_coco_stuff(data_dir: Path, splits: dict[str, int], train_ids: bool = False) -> None:
    """coco_stuff164k/{images,annotations}/<split>/ of owners' ids, 0 to 181; with train ids beside them, if wanted."""
    used = [i for i in range(182) if i + 1 not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)]
    for split, count in splits.items():
        for i in range(count):
            rng, root = np.random.default_rng((len(split), i)), data_dir / "coco_stuff164k"
            ids = np.resize(rng.permutation(used).astype(np.uint8), (40, 50))
            ids[0, :3] = 0, 181, 255
            write_jpg(root / "images" / split / f"{i:012d}.jpg", np.stack([ids, 255 - ids, ids // 2], axis=-1))
            write_png(root / "annotations" / split / f"{i:012d}.png", ids)
            if train_ids:
                table = np.full(256, 255, np.uint8)
                table[used] = np.arange(171)
                write_png(root / "annotations" / split / f"{i:012d}_labelTrainIds.png", table[ids])


def write_mapillary(data_dir: Path, splits: dict[str, int]) -> None:
    """mapillary/<split>/images/*.jpg and v1.2/labels/*.png, palette PNGs of 0..65, with the paper's code's copies."""
    for split, count in splits.items():
        for i in range(count):
            image, label = scene(np.random.default_rng((len(split), i)), 60, 80 + i, 65)
            label[0, :3] = 0, 64, 65
            root, indexed = data_dir / "mapillary" / split, Image.fromarray(label).convert("P")
            indexed.putdata(label.flatten())
            write_jpg(root / "images" / f"{split}_{i}.jpg", image)
            (root / "v1.2" / "labels").mkdir(parents=True, exist_ok=True)
            for suffix in ("", "_labelTrainIds"):
                indexed.save(root / "v1.2" / "labels" / f"{split}_{i}{suffix}.png")


def write_night(data_dir: Path, name: str, count: int) -> None:
    """Dark Zurich's or Nighttime Driving's scenes with labels by train id and in colours."""
    for i in range(count):
        image, label = scene(np.random.default_rng(i), 54, 96, 19)
        label[0, :3] = 0, 18, 255
        if name == "dark_zurich":
            stem = f"val/night/GOPR0356/GOPR0356_frame_{i:06d}"
            image_path, labels = f"dark_zurich/rgb_anon/{stem}_rgb_anon.png", f"dark_zurich/gt/{stem}_gt"
        else:
            root, stem = "NighttimeDrivingTest", f"test/night/{i}"
            image_path = f"{root}/leftImg8bit/{stem}_leftImg8bit.png"
            labels = f"{root}/gtCoarse_daytime_trainvaltest/{stem}_gtCoarse"
        write_png(data_dir / image_path, image)
        write_png(data_dir / f"{labels}_labelTrainIds.png", label)
        write_png(data_dir / f"{labels}_labelColor.png", image)


def write_deepglobe(data_dir: Path, name: str, count: int) -> None:
    """<task>/train/*_sat.jpg and *_mask.png in the owners' colours, not quite pure; of buildings from four cities."""
    from exp.data.registry import DATASETS

    cls = DATASETS[name]
    colours = np.array([*cls.palette, (0, 0, 0)], np.uint8)  # the last: unknown
    for group in cls.groups:
        for i in range(count):
            image, label = scene(np.random.default_rng(i), 48, 48, len(cls.classes))
            if name == "deepglobe_land":
                label[:2] = len(cls.classes)
            stem = data_dir / cls.task / "train" / f"{group}{10**i if i < 4 else i}"
            write_jpg(stem.with_name(f"{stem.name}_sat.jpg"), image)
            mask = colours[label].astype(int)
            mask[2:4] += np.where(mask[2:4] > 0, -60, 60)
            write_png(stem.with_name(f"{stem.name}_mask.png"), mask.astype(np.uint8))
