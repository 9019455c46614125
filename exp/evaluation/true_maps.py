"""The probabilities from which a data set draws its labels -> units to judge rules on, without a network."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exp.config.data import DataConfig
from exp.data.base import SegmentationDataset
from exp.data.registry import build_dataset
from exp.evaluation.probability_maps import MapFile, Unit
from exp.runtime.errors import InputError


@dataclass(frozen=True)
class TrueMapReader:
    """As a MapReader, of a data set that knows its probabilities; the files' names are the images'."""

    dataset: SegmentationDataset

    def files(self) -> list[MapFile]:
        """The images in the data set's order; nothing of them is on disk."""
        return [MapFile(sample.name, Path(sample.name), Path(sample.name)) for sample in self.dataset.samples]

    def units(self, file: MapFile) -> Iterator[Unit]:
        """The one unit of an image: its probabilities and the labels that were drawn from them."""
        index = next(i for i, sample in enumerate(self.dataset.samples) if sample.name == file.name)
        yield Unit(file.name, None, self.dataset.probabilities(index), self.dataset.read(index)[1])


def build_true_reader(config: DataConfig) -> TrueMapReader:
    """The validation images of the YAML of a data set that has `probabilities`; InputError if they would be cut."""
    if config.test_crop:
        raise InputError(f"data.test_crop: got {list(config.test_crop)}, expected null: whole images are judged")
    return TrueMapReader(build_dataset(config, None, "val"))
