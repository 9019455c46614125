"""Cityscapes as its owners hand it out: fine labels by label id, or by train id where somebody made them; and scenes by
night with labels of the same classes, to evaluate on."""

from exp.data.base import IGNORE_INDEX, Sample, SegmentationDataset, class_names, colours, pair_samples, require_folder
from exp.files.paths import visible_files

TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # label ids of classes 0..18
NUM_LABEL_IDS = 34
IMAGE, LABEL_IDS, LABEL_TRAIN_IDS = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"


class Cityscapes(SegmentationDataset):
    """2,975 / 500 street scenes of 1024 x 2048, 19 classes (Cordts et al., CVPR 2016).

    cityscapes/leftImg8bit/<split>/<city>/*_leftImg8bit.png, and below gtFine/ *_gtFine_labelIds.png through the
    standard table of 34 ids, or *_gtFine_labelTrainIds.png if the whole split has them.
    """

    classes = class_names("""
        road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person,
        rider, car, truck, bus, train, motorcycle, bicycle
    """)
    palette = colours("""
        804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64
        005064 0000e6 770b20
    """)
    label_map = {i: TRAIN_IDS.index(i) if i in TRAIN_IDS else IGNORE_INDEX for i in range(NUM_LABEL_IDS)}
    archives = {
        "leftImg8bit_trainvaltest.zip": ("cityscapes/leftImg8bit/train", "cityscapes/leftImg8bit/val"),
        "gtFine_trainvaltest.zip": ("cityscapes/gtFine/train", "cityscapes/gtFine/val"),
    }
    totals = {"train": 2975, "val": 500}

    def list_samples(self) -> list[Sample]:
        images = require_folder(self.root / "cityscapes" / "leftImg8bit" / self.split)
        labels = require_folder(self.root / "cityscapes" / "gtFine" / self.split)
        names = {p.relative_to(images).as_posix().removesuffix(IMAGE) for p in visible_files(images, f"*/*{IMAGE}")}
        with_ids, with_train_ids = (
            {p.relative_to(labels).as_posix().removesuffix(suffix) for p in visible_files(labels, f"*/*{suffix}")}
            for suffix in (LABEL_IDS, LABEL_TRAIN_IDS)
        )
        suffix = LABEL_IDS
        if names and names <= with_train_ids:
            suffix, with_ids, self.label_map = LABEL_TRAIN_IDS, with_train_ids, {}
        return pair_samples(
            sorted(names | with_ids), lambda n: images / f"{n}{IMAGE}", lambda n: labels / f"{n}{suffix}"
        )


class NightScenes(SegmentationDataset):
    """Street scenes by night with Cityscapes' classes, by train id; images and labels lie in trees of one shape."""

    classes, palette = Cityscapes.classes, Cityscapes.palette
    folders: tuple[str, str]  # of images and labels below data_dir; the split's folder is below
    suffixes: tuple[str, str]

    def list_samples(self) -> list[Sample]:
        images, labels = (require_folder(self.root / folder / self.split) for folder in self.folders)
        names = {
            path.relative_to(folder).as_posix().removesuffix(suffix)
            for folder, suffix in zip((images, labels), self.suffixes)
            for path in visible_files(folder, f"**/*{suffix}")
        }
        image, label = self.suffixes
        return pair_samples(sorted(names), lambda n: images / f"{n}{image}", lambda n: labels / f"{n}{label}")


class DarkZurich(NightScenes):
    """50 scenes of 1080 x 1920, the validation set of Dark Zurich (Sakaridis et al., ICCV 2019)."""

    folders = ("dark_zurich/rgb_anon", "dark_zurich/gt")
    suffixes = ("_rgb_anon.png", "_gt_labelTrainIds.png")
    archives = {"Dark_Zurich_val_anon.zip": ("dark_zurich/rgb_anon/val", "dark_zurich/gt/val")}
    totals = {"val": 50}


class NighttimeDriving(NightScenes):
    """50 scenes of 1080 x 1920, the test set of Nighttime Driving (Dai & Van Gool, ITSC 2018)."""

    folders = ("NighttimeDrivingTest/leftImg8bit", "NighttimeDrivingTest/gtCoarse_daytime_trainvaltest")
    suffixes = ("_leftImg8bit.png", "_gtCoarse_labelTrainIds.png")
    archives = {
        "NighttimeDrivingTest.zip": (
            "NighttimeDrivingTest/leftImg8bit/test",
            "NighttimeDrivingTest/gtCoarse_daytime_trainvaltest/test",
        )
    }
    totals = {"test": 50}
