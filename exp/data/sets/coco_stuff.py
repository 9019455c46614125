"""COCO-Stuff, all 164,000 images of COCO 2017, as the owners hand them out or in train ids."""

from exp.data.base import (
    IGNORE_INDEX,
    Sample,
    SegmentationDataset,
    class_names,
    numbered_colours,
    pair_samples,
    require_folder,
)
from exp.files.paths import visible_files

TRAIN_IDS = "_labelTrainIds"
NUM_IDS = 182  # of things and stuff together; in the files they begin at 0
UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # ids of things that no image was annotated with
USED = [i for i in range(NUM_IDS) if i not in UNUSED]


class COCOStuff(SegmentationDataset):
    """118,287 / 5,000 photographs, 80 things and 91 kinds of stuff (Caesar et al., CVPR 2018); 255 is ignored.

    coco_stuff164k/images/{train2017,val2017}/*.jpg, and below annotations/ *.png of the owners' ids, or
    *_labelTrainIds.png if the whole split has them. The colours are those of VOC's scheme.
    """

    classes = class_names("""
        person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
        parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
        handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
        surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
        broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
        laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
        scissors, teddy bear, hair drier, toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet,
        cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain,
        desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower,
        fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal,
        mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform,
        playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper,
        snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable,
        wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops,
        window-blind, window-other, wood
    """)
    palette = numbered_colours(len(classes))
    label_map = dict.fromkeys(UNUSED, IGNORE_INDEX) | {value: label for label, value in enumerate(USED)}
    archives = {
        "train2017.zip": ("coco_stuff164k/images/train2017",),
        "val2017.zip": ("coco_stuff164k/images/val2017",),
        "stuffthingmaps_trainval2017.zip": (
            "coco_stuff164k/annotations/train2017",
            "coco_stuff164k/annotations/val2017",
        ),
    }
    totals = {"train2017": 118287, "val2017": 5000}

    def list_samples(self) -> list[Sample]:
        images = require_folder(self.root / "coco_stuff164k" / "images" / self.split)
        labels = require_folder(self.root / "coco_stuff164k" / "annotations" / self.split)
        names, found = (
            {p.stem for p in visible_files(images, "*.jpg")},
            {p.stem for p in visible_files(labels, "*.png")},
        )
        in_train_ids = {stem.removesuffix(TRAIN_IDS) for stem in found if stem.endswith(TRAIN_IDS)}
        labelled, suffix = {stem for stem in found if not stem.endswith(TRAIN_IDS)}, ""
        if names and names <= in_train_ids:
            labelled, suffix, self.label_map = in_train_ids, TRAIN_IDS, {}
        return pair_samples(
            sorted(names | labelled), lambda n: images / f"{n}.jpg", lambda n: labels / f"{n}{suffix}.png"
        )
