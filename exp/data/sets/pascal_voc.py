"""PASCAL VOC 2012 with the labels of SBD, in the VOCdevkit layout."""

from exp.data.base import Sample, SegmentationDataset, class_names, colours, pair_samples, require_folder
from exp.files.paths import read_names


class PascalVOC(SegmentationDataset):
    """10,582 (trainaug) / 1,449 photographs, 20 classes and background (Everingham et al., 2010; SBD: Hariharan et
    al., ICCV 2011); 255 is ignored.

    VOCdevkit/VOC2012/: JPEGImages/*.jpg, ImageSets/Segmentation/<split>.txt, labels as palette PNGs in
    SegmentationClassTrainAug/ (split trainaug) or SegmentationClass/ (the others).
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
    totals = {"trainaug": 10582, "train": 1464, "val": 1449}

    def list_samples(self) -> list[Sample]:
        root = require_folder(self.root / "VOCdevkit" / "VOC2012")
        names_file = root / "ImageSets" / "Segmentation" / f"{self.split}.txt"
        names = read_names(names_file)
        kind = "SegmentationClassTrainAug" if self.split == "trainaug" else "SegmentationClass"
        images, labels = require_folder(root / "JPEGImages"), require_folder(root / kind)
        return pair_samples(
            names, lambda n: images / f"{n}.jpg", lambda n: labels / f"{n}.png", inside=(images, labels)
        )
