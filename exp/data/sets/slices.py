"""Prepared slices of CT and MR volumes, in five folds of cases; scripts/prepare_data.py makes them."""

import numpy as np
import torch

from exp.data.base import Sample, SegmentationDataset
from exp.data.prepare.facts import VOLUMES, VolumeFacts, fold_of
from exp.data.prepare.volumes import TRAIN
from exp.data.slice_files import case_number, find_orientations, list_cases, list_slices, read_slice
from exp.runtime.errors import InputError


class SliceDataset(SegmentationDataset):
    """Slices grouped by case: `val` is the fold that the YAML names, `train` the four others.

    The folds are contiguous by case number. An Item's values are clipped to the YAML's window.
    """

    volumes: VolumeFacts
    channels = 1
    image_dtype = torch.int16

    @property
    def limits(self) -> tuple[int, int]:
        return round(self.window[0]), round(self.window[1])

    def list_samples(self) -> list[Sample]:
        if self.split not in ("train", "val"):
            raise InputError(f"data.*_split: got '{self.split}', expected train or val: these slices come in folds")
        validating, samples = self.split == "val", []
        cases = list_cases(self.root / self.volumes.folder / TRAIN)
        self.orientations = find_orientations(cases)
        for case in cases:
            in_fold = fold_of(case_number(case.name), self.volumes.cases_per_fold) == self.fold
            if in_fold == validating:
                samples += [Sample(f"{case.name}/{p.stem}", p, p, case=case.name) for p in list_slices(case)]
        return samples

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        path = self.samples[index].image
        image, values = read_slice(path)
        return image[..., None], self.decode_label(values, path)


class Tumour(SliceDataset):
    """CT slices that hold tumour (2 in the files) against all else."""

    classes = ("background", "tumour")
    palette = ((0, 0, 0), (240, 228, 66))
    label_map = {0: 0, 1: 0, 2: 1}


class LiTS(Tumour):
    """7,190 slices of 512 x 512 from 131 CT volumes, liver tumour (Bilic et al., MedIA 2023)."""

    volumes = VOLUMES["lits"]
    archives = {"Training_Batch1.zip": ("lits",), "Training_Batch2.zip": ("lits",)}


class KiTS(Tumour):
    """5,712 slices of 512 x 512 from 210 CT volumes, kidney tumour (KiTS19: Heller et al., 2019)."""

    volumes = VOLUMES["kits"]
    archives = {"the repository github.com/neheller/kits19 with its starter_code.get_imaging": ("kits",)}


class Hippocampus(SliceDataset):
    """Slices of some 35 x 50 pixels from 260 MR volumes (Medical Segmentation Decathlon, task 4)."""

    classes = ("background", "anterior", "posterior")
    palette = ((0, 0, 0), (230, 159, 0), (86, 180, 233))
    volumes = VOLUMES["hippocampus"]
    archives = {"Task04_Hippocampus.tar": ("hippocampus",)}
