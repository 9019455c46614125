"""A data set as its owner hands it out -> what training reads, below the same data_dir (DATA.md shows the trees).

    python scripts/prepare_data.py lits --data_dir /path/to/data

pascal_voc: writes SegmentationClassTrainAug/ and trainaug.txt from VOC 2012 and SBD. lits, kits, hippocampus: writes
the slices that hold tumour (any structure) to <name>/train/. deepglobe_*: writes a label of class indices for every
mask. All others: nothing to convert; the tree is checked. Interrupted, the same command resumes. Nothing that was there
before is changed or removed.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import build_script_parser
from exp.config.experiment import load_groups
from exp.data.prepare.deepglobe import prepare_masks
from exp.data.prepare.facts import NUM_FOLDS, VOLUMES, fold_of
from exp.data.prepare.trees import check_tree
from exp.data.prepare.voc import prepare_voc
from exp.data.prepare.volumes import TRAIN, missing_cases, prepare_cases
from exp.data.slice_files import case_number, list_cases, read_case
from exp.runtime.errors import InputError, run_and_report

# Workers import this file: exp.data.registry, with PyTorch behind it, is imported in functions alone.


def parse_args() -> argparse.Namespace:
    from exp.data.registry import DATASETS

    parser = build_script_parser(__doc__)
    parser.add_argument("name", choices=sorted(name for name, cls in DATASETS.items() if cls.archives))
    parser.add_argument("--data_dir", type=Path, required=True, metavar="DIR", help="the folder of the data sets")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default: {cores})")
    parser.add_argument(
        "--ignore_affine",
        action="store_true",
        help="lits, kits, hippocampus: pair label volumes with images by their shape alone, whatever their affines say",
    )
    args = parser.parse_args()
    if args.workers < 1:
        raise InputError(f"--workers: got {args.workers}, expected 1 or more")
    return args


def main() -> None:
    from exp.data.registry import DATASETS

    args = parse_args()
    check_tree(DATASETS[args.name].archives, args.data_dir)
    if args.name in VOLUMES:
        prepare_cases(args.name, args.data_dir, args.workers, check_affine=not args.ignore_affine)
        print_cases(args.name, args.data_dir)
    else:
        if args.name == "pascal_voc":
            prepare_voc(args.data_dir, args.workers)
        if args.name.startswith("deepglobe_"):
            cls = DATASETS[args.name]
            prepare_masks(args.data_dir / cls.task / TRAIN, cls.palette, args.workers)
        print_images(args.name, args.data_dir)
    flags = f"--data_dir {args.data_dir} --data_yaml {args.name}"
    print(f"check every file: python scripts/verify_data.py {flags}")
    print(f"train:            python exp/main.py {flags}")


def print_cases(name: str, data_dir: Path) -> None:
    """Cases and slices that are ready, beside the known totals."""
    facts = VOLUMES[name]
    counts = {path.name: len(read_case(path).slices) for path in list_cases(data_dir / facts.folder / TRAIN)}
    folds = [0] * NUM_FOLDS
    for case, count in counts.items():
        folds[fold_of(case_number(case), facts.cases_per_fold)] += count
    known = f"; known: {sum(facts.fold_slices)}, {describe(facts.fold_slices)}" if facts.fold_slices else ""
    print(f"{data_dir / facts.folder / TRAIN}: {len(counts)} of {facts.total_cases} cases are ready")
    if missing := missing_cases(facts, counts):
        print(f"without slices: the cases {missing}")
    print(f"slices: {sum(folds)}, {describe(folds)}{known}")


def describe(folds: list[int] | tuple[int, ...]) -> str:
    return "by fold " + " / ".join(map(str, folds))


def print_images(name: str, data_dir: Path) -> None:
    """Training and validation images that the data set finds, beside the known totals."""
    from exp.data.registry import DATASETS, build_dataset

    config = load_groups({"data": [name]}, [])["data"]
    for split, name_of_split in (("train", config.train_split), ("val", config.val_split)):
        total = DATASETS[name].totals.get(name_of_split, "an unknown number")
        print(f"{name}: {len(build_dataset(config, str(data_dir), split))} of {total} images to {split}")


if __name__ == "__main__":
    sys.exit(run_and_report(main))
