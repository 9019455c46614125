"""The three tasks of DeepGlobe 2018 on satellite images, in five folds: land cover, roads, buildings."""

from exp.config.data import IGNORE_INDEX, NUM_FOLDS
from exp.data.base import Sample, SegmentationDataset, class_names, colours, pair_samples, require_folder
from exp.files.paths import visible_files
from exp.runtime.errors import InputError

IMAGE, LABEL = "_sat.jpg", "_label.png"


class DeepGlobe(SegmentationDataset):
    """<task>/train/*_sat.jpg with *_label.png, class indices that scripts/prepare_data.py writes.

    `val` is the fold that the YAML names, `train` all the others. Folds are contiguous in the order of the names, as in
    the paper's code: a fifth of each of `groups`, rounded down, so that what is left over is always trained on. The
    order is that of the files' whole names: x_100_sat.jpg comes before x_10_sat.jpg.
    """

    task: str
    groups: tuple[str, ...] = ("",)  # what the names of the images begin with

    def list_samples(self) -> list[Sample]:
        if self.split not in ("train", "val"):
            raise InputError(f"data.*_split: got '{self.split}', expected train or val: these images come in folds")
        folder = require_folder(self.root / self.task / "train")
        files = [path.name for path in visible_files(folder, f"*{IMAGE}")]
        names = [file.removesuffix(IMAGE) for file in files]
        chosen = [name for group in self.groups for name in self._part([n for n in names if n.startswith(group)])]
        return pair_samples(chosen, lambda n: folder / f"{n}{IMAGE}", lambda n: folder / f"{n}{LABEL}")

    def _part(self, names: list[str]) -> list[str]:
        size = len(names) // NUM_FOLDS
        first, end = size * self.fold, size * (self.fold + 1)
        return names[first:end] if self.split == "val" else names[:first] + names[end:]


class DeepGlobeLand(DeepGlobe):
    """803 images of 2448 x 2448, 6 classes of land cover (Demir et al., CVPR workshops 2018); unknown is ignored.

    It is 255 in a label, or 6 where the paper's code wrote it.
    """

    task = "land"
    label_map = {6: IGNORE_INDEX}
    classes = class_names("urban, agriculture, rangeland, forest, water, barren")
    palette = colours("00ffff ffff00 ff00ff 00ff00 0000ff ffffff")
    archives = {"the training images of DeepGlobe's land cover classification": ("land/train",)}
    totals = {"train": 643, "val": 160}


class DeepGlobeRoad(DeepGlobe):
    """6,226 images of 1024 x 1024, road against the rest (Demir et al., CVPR workshops 2018)."""

    task = "road"
    classes = class_names("background, road")
    palette = colours("000000 ffffff")
    archives = {"the training images of DeepGlobe's road extraction": ("road/train",)}
    totals = {"train": 4981, "val": 1245}


class DeepGlobeBuilding(DeepGlobe):
    """10,593 images of 650 x 650 from four cities, building against the rest (Demir et al., CVPR workshops 2018)."""

    task = "building"
    groups = ("Vegas_", "Paris_", "Shanghai_", "Khartoum_")
    classes = class_names("background, building")
    palette = colours("000000 ffffff")
    archives = {"DeepGlobe's building detection (SpaceNet 2), made into images and masks": ("building/train",)}
    totals = {"train": 8476, "val": 2117}
