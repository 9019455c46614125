"""What is known of the data sets of volumes, as their owners hand them out."""

from dataclasses import dataclass

from exp.config.data import NUM_FOLDS


@dataclass(frozen=True)
class VolumeFacts:
    """How the slices of a data set of volumes are made.

    label: slices that hold this value are kept (None: any but 0). size: (H, W) of the slices, None: the source's.
    numbers: those of the cases with labels, where they are without gaps; what lies beyond is the owner's for testing.
    fold_slices: known number of slices in each validation fold, where it is known.
    orientation: that of nearly all volumes (exp/files/nifti.py); slices are cut as if all were stored in it.
    case: a case's name by its number, which the patterns of image and label volumes find in <folder>/<file>.
    """

    folder: str
    label: int | None
    size: tuple[int, int] | None
    rescale: bool
    total_cases: int
    numbers: range | None
    cases_per_fold: int
    fold_slices: tuple[int, ...] | None
    orientation: str
    case: str
    patterns: tuple[str, str]


MAX_LABEL = 2  # in the label volumes of LiTS, KiTS19 and the hippocampus
SLICE_SIZE = (512, 512)  # the paper's; nearly every CT matrix
LITS_FILES = (r".*/volume-(\d+)\.nii(?:\.gz)?", r".*/segmentation-(\d+)\.nii(?:\.gz)?")
KITS_FILES = (r"case_(\d+)/imaging\.nii\.gz", r"case_(\d+)/segmentation\.nii\.gz")
HIPPOCAMPUS_FILES = (r"images(?:Tr)?/hippocampus_(\d+)\.nii\.gz", r"labels(?:Tr)?/hippocampus_(\d+)\.nii\.gz")
LITS_SLICES, KITS_SLICES = (1320, 889, 459, 2278, 2244), (952, 1255, 1418, 1471, 616)  # as the paper's code lists them

VOLUMES = {
    "lits": VolumeFacts("lits", 2, SLICE_SIZE, False, 131, range(131), 26, LITS_SLICES, "LPS", "volume-{}", LITS_FILES),
    "kits": VolumeFacts("kits", 2, SLICE_SIZE, False, 210, range(210), 42, KITS_SLICES, "IPL", "case_{}", KITS_FILES),
    "hippocampus": VolumeFacts(
        "hippocampus", None, None, True, 260, None, 79, None, "RAS", "hippocampus_{}", HIPPOCAMPUS_FILES
    ),
}


def fold_of(number: int, cases_per_fold: int) -> int:
    """A case's number -> its validation fold: contiguous, the remainder in the last."""
    return min(number // cases_per_fold, NUM_FOLDS - 1)
