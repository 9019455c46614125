"""PASCAL VOC 2012 with the labels of SBD, in the VOCdevkit layout."""

from pathlib import Path

from exp.data.base import Sample, SegmentationDataset, class_names, colours, pair_samples, require_folder
from exp.files.paths import read_names, read_pairs
from exp.runtime.errors import InputError


class PascalVOC(SegmentationDataset):
    """10,582 (trainaug) / 1,449 photographs, 20 classes and background (Everingham et al., 2010; SBD: Hariharan et
    al., ICCV 2011); 255 is ignored.

    VOCdevkit/VOC2012/: JPEGImages/*.jpg, ImageSets/Segmentation/<split>.txt, labels as palette PNGs in
    SegmentationClassTrainAug/ (split trainaug) or SegmentationClass/ (the others). A list may also have two paths a
    line, of an image and its label, as the paper's code has its train_aug.txt.
    """

    classes = class_names("""
        background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse,
        motorbike, person, pottedplant, sheep, sofa, train, tvmonitor
    """)
    palette = colours("""
        000000 800000 008000 808000 000080 800080 008080 808080 400000 c00000 408000 c08000 400080 c00080 408080 c08080
        004000 804000 00c000 80c000 004080
    """)
    archives = {
        "VOCtrainval_11-May-2012.tar": (
            "VOCdevkit/VOC2012/JPEGImages",
            "VOCdevkit/VOC2012/SegmentationClass",
            "VOCdevkit/VOC2012/ImageSets/Segmentation",
        ),
        "benchmark.tgz": ("VOCdevkit/VOCaug/benchmark_RELEASE/dataset/cls",),
    }
    totals = {"trainaug": 10582, "train_aug": 10582, "train": 1464, "val": 1449}

    def list_samples(self) -> list[Sample]:
        root = require_folder(self.root / "VOCdevkit" / "VOC2012")
        names_file = root / "ImageSets" / "Segmentation" / f"{self.split}.txt"
        if pairs := read_pairs(names_file):
            return self._pair_paths(root, pairs, names_file)
        names = read_names(names_file)
        kind = "SegmentationClassTrainAug" if self.split == "trainaug" else "SegmentationClass"
        images, labels = require_folder(root / "JPEGImages"), require_folder(root / kind)
        return pair_samples(
            names, lambda n: images / f"{n}.jpg", lambda n: labels / f"{n}.png", inside=(images, labels)
        )

    def _pair_paths(self, root: Path, pairs: list[tuple[str, str]], names_file: Path) -> list[Sample]:
        """Paths below `root` of images and their labels -> the samples, under the images' names."""
        folders = {(root / image).parent for image, _ in pairs}, {(root / label).parent for _, label in pairs}
        if len(folders[0]) > 1 or len(folders[1]) > 1:
            raise InputError(f"{names_file}: got paths in several folders, expected one of images and one of labels")
        images, labels = (require_folder(folder) for (folder,) in folders)
        rows = {Path(image).stem: (Path(image).name, Path(label).name) for image, label in pairs}
        names = [Path(image).stem for image, _ in pairs]
        return pair_samples(
            names, lambda n: images / rows[n][0], lambda n: labels / rows[n][1], inside=(images, labels)
        )
