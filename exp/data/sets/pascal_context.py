"""PASCAL Context, its 59 most frequent classes, in the VOCdevkit layout."""

from exp.data.base import (
    IGNORE_INDEX,
    Sample,
    SegmentationDataset,
    class_names,
    numbered_colours,
    pair_samples,
    require_folder,
)
from exp.files.paths import read_names


class PascalContext(SegmentationDataset):
    """4,996 / 5,104 photographs of VOC 2010, 59 classes (Mottaghi et al., CVPR 2014); 0 in a file is ignored.

    VOCdevkit/VOC2010/: JPEGImages/*.jpg, ImageSets/SegmentationContext/<split>.txt, labels as class indices in
    SegmentationClassContext/*.png. The colours are those of VOC's scheme.
    """

    classes = class_names("""
        aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat,
        ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse,
        keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves,
        sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood
    """)
    palette = numbered_colours(len(classes) + 1)[1:]
    label_map = {0: IGNORE_INDEX} | {value: value - 1 for value in range(1, 60)}
    archives = {
        "VOCtrainval_03-May-2010.tar": ("VOCdevkit/VOC2010/JPEGImages",),
        "the labels of trainval_merged.json, which MMSegmentation's pascal_context.py writes": (
            "VOCdevkit/VOC2010/SegmentationClassContext",
            "VOCdevkit/VOC2010/ImageSets/SegmentationContext",
        ),
    }
    totals = {"train": 4996, "val": 5104}

    def list_samples(self) -> list[Sample]:
        root = require_folder(self.root / "VOCdevkit" / "VOC2010")
        names = read_names(root / "ImageSets" / "SegmentationContext" / f"{self.split}.txt")
        images, labels = require_folder(root / "JPEGImages"), require_folder(root / "SegmentationClassContext")
        return pair_samples(
            names, lambda n: images / f"{n}.jpg", lambda n: labels / f"{n}.png", inside=(images, labels)
        )
