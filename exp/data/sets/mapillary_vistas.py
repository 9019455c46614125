"""Mapillary Vistas 1.2, as its owners hand it out."""

from exp.data.base import IGNORE_INDEX, Sample, SegmentationDataset, class_names, colours, pair_samples, require_folder
from exp.files.paths import visible_files

COPY = "_labelTrainIds"  # how the paper's code calls its copies of the labels, of the same values


class MapillaryVistas(SegmentationDataset):
    """18,000 / 2,000 street scenes of many sizes, 65 classes (Neuhold et al., ICCV 2017); 65 in a file is ignored.

    mapillary/{training,validation}/images/*.jpg and v1.2/labels/*.png, palette PNGs of class indices.
    """

    classes = class_names("""
        bird, ground animal, curb, fence, guard rail, barrier, wall, bike lane, crosswalk - plain, curb cut, parking,
        pedestrian area, rail track, road, service lane, sidewalk, bridge, building, tunnel, person, bicyclist,
        motorcyclist, other rider, lane marking - crosswalk, lane marking - general, mountain, sand, sky, snow, terrain,
        vegetation, water, banner, bench, bike rack, billboard, catch basin, cctv camera, fire hydrant, junction box,
        mailbox, manhole, phone booth, pothole, street light, pole, traffic sign frame, utility pole, traffic light,
        traffic sign (back), traffic sign (front), trash can, bicycle, boat, bus, car, caravan, motorcycle, on rails,
        other vehicle, trailer, truck, wheeled slow, car mount, ego vehicle
    """)
    palette = colours("""
        a52a2a 00c000 c4c4c4 be9999 b4a5b4 5a7896 66669c 8040ff 8c8cc8 aaaaaa faaaa0 606060 e6968c 804080 6e6e6e
        f423e8 966464 464646 96785a dc143c ff0000 ff0064 ff00c8 c88080 ffffff 40aa40 e6a032 4682b4 beffff 98fb98
        6b8e23 00aa1e ffff80 fa001e 648cb4 dcdcdc dc8080 de2828 64aa1e 282828 212121 6480a0 8e0000 466496 d2aa64
        999999 808080 000050 faaa1e c0c0c0 dcdc00 8c8c14 770b20 9600ff 003c64 00008e 00005a 0000e6 005064 804040
        00006e 000046 0000c0 202020 780a0a
    """)
    label_map = {65: IGNORE_INDEX}
    archives = {
        "Mapillary Vistas (v2.0, which has the labels of v1.2 too)": tuple(
            f"mapillary/{split}/{folder}"
            for split in ("training", "validation")
            for folder in ("images", "v1.2/labels")
        )
    }
    totals = {"training": 18000, "validation": 2000}

    def list_samples(self) -> list[Sample]:
        images = require_folder(self.root / "mapillary" / self.split / "images")
        labels = require_folder(self.root / "mapillary" / self.split / "v1.2" / "labels")
        labelled = {path.stem for path in visible_files(labels, "*.png") if not path.stem.endswith(COPY)}
        names = sorted({path.stem for path in visible_files(images, "*.jpg")} | labelled)
        return pair_samples(names, lambda n: images / f"{n}.jpg", lambda n: labels / f"{n}.png")
