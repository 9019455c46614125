"""The user's own images and index masks: the data YAML says where they are and what their classes are called."""

from pathlib import Path

from exp.data.base import Sample, SegmentationDataset, pair_samples, require_folder
from exp.files.images import FORMATS
from exp.files.paths import match_names, read_names, visible_files
from exp.runtime.errors import InputError


class Folder(SegmentationDataset):
    """Images and masks from two folders, paired by their names, or from two lists, paired line by line.

    `images` and `labels` of the YAML lie below data_dir; "{split}" in them stands for train_split or val_split. What
    ends in .txt is a list of paths below data_dir, anything else a folder, whose own folders are searched too.
    """

    images: str
    labels: str
    window = (0.0, 255.0)  # of grey images

    def list_samples(self) -> list[Sample]:
        images, labels = (self.root / text.replace("{split}", self.split) for text in (self.images, self.labels))
        if {images.suffix, labels.suffix} == {".txt"}:
            return self._pair_lists(images, labels)
        if ".txt" in (images.suffix, labels.suffix):
            raise InputError(f"data.images, data.labels: got {images} and {labels}, expected two folders or two lists")
        by_name = _files_by_name(images)
        by_label_name = match_names(_files_by_name(labels), by_name)
        return pair_samples(
            sorted(by_name.keys() | by_label_name.keys()),
            lambda name: by_name.get(name, images / f"{name}.jpg"),
            lambda name: by_label_name.get(name, labels / f"{name}.png"),
        )

    def _pair_lists(self, images: Path, labels: Path) -> list[Sample]:
        names, label_names = read_names(images), read_names(labels)
        if len(names) != len(label_names):
            raise InputError(f"{labels}: got {len(label_names)} lines, expected {len(names)} as in {images}")
        label_of = dict(zip(names, label_names))
        return pair_samples(
            names,
            lambda name: self.root / name,
            lambda name: self.root / label_of[name],
            inside=(self.root, self.root),
        )


def _files_by_name(folder: Path) -> dict[str, Path]:
    """The images below a folder by their path in it without the suffix."""
    files = {}
    for path in visible_files(require_folder(folder), "**/*.*"):
        if path.suffix.lower() not in FORMATS:
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise InputError(f"{path}: got a second file of the name {name} beside {files[name]}, expected one")
        files[name] = path
    return files
