"""Decode every image and label of a data set and report all that is wrong.

    python scripts/verify_data.py --data_yaml camvid --data_dir /path/to/data

Reads the training and the validation split as the data YAML has them, and for lits, kits and hippocampus the volumes
too. A data set without faults gets a manifest of SHA-256 sums, <data_dir>/<data YAML's name>.sha256 (`sha256sum -c`
reads it); where there is one, the files are compared with it, and it is never written again. Exit status: 0 without
faults, 1 with them, 2 if the data set or a flag cannot be read at all.
"""

import argparse
import os
import sys
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import add_overrides, build_script_parser
from exp.config.data import DataConfig
from exp.config.experiment import load_groups
from exp.data import verify
from exp.data.base import SegmentationDataset
from exp.data.prepare.facts import VOLUMES
from exp.data.prepare.jobs import run_jobs, worker_pool
from exp.data.prepare.volumes import RawCase, missing_cases
from exp.data.registry import DATASETS, dataset_facts
from exp.data.verify import Finding
from exp.files.atomic import replacing
from exp.runtime.errors import InputError, run_and_report

Checked = tuple[list[Finding], dict[Path, str]]  # findings, and SHA-256 by file


def parse_args() -> argparse.Namespace:
    parser = build_script_parser(__doc__)
    parser.add_argument("--data_yaml", required=True, metavar="NAME", help="configs/data/NAME.yaml, or a path")
    parser.add_argument("--data_dir", required=True, type=Path, metavar="DIR", help="the folder of the data sets")
    add_overrides(parser, "data.KEY=VALUE")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="threads")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="in place of <data_dir>/<YAML's name>.sha256")
    parser.add_argument(
        "--ignore_affine",
        action="store_true",
        help="volumes: pairs of other affines are a note, as prepare_data.py's flag",
    )
    parser.add_argument("--no_manifest", action="store_true", help="neither read nor write a manifest")
    parser.add_argument("--show", type=int, default=10, metavar="N", help="files shown of each kind (default: 10)")
    args = parser.parse_args()
    if args.workers < 1 or args.show < 0:
        raise InputError(f"--workers {args.workers}, --show {args.show}: expected 1 or more workers, 0 or more files")
    return args


def main() -> None:
    args = parse_args()
    config = load_groups({"data": [args.data_yaml]}, args.overrides)["data"]
    if not DATASETS[config.dataset].on_disk:
        raise InputError(f"--data_yaml {args.data_yaml}: got a data set made on the fly, expected one on disk")
    with worker_pool(args.workers, threads=True) as pool:
        findings, hashes = check_dataset(config, args.data_dir, pool, check_affine=not args.ignore_affine)
    if not args.no_manifest:
        manifest = args.manifest or args.data_dir / f"{config.name}.sha256"
        findings += check_manifest(manifest, hashes, args.data_dir, reason_against(config, args.data_dir, findings))
    if findings:
        print(verify.format_report(findings, args.show))
    faults = sum(finding.kind in verify.FAULTS for finding in findings)
    print(f"{config.name}: {len(hashes)} files checked, {faults or 'no'} faults")
    if faults:
        sys.exit(1)


def check_dataset(config: DataConfig, data_dir: Path, pool: Executor, *, check_affine: bool) -> Checked:
    """Both splits and, where there are any, the volumes behind them."""
    facts = VOLUMES.get(config.dataset)
    findings, hashes = [], {}
    if facts:
        raw, more = verify.list_raw(config.dataset, data_dir)
        results, _ = run_jobs(partial(check_raw, check_affine), raw, pool, "volumes", "case")
        collect(results, findings, hashes)
        findings += more + verify.check_prepared(facts, data_dir)
        prepared = [path.name for path in verify.prepared_cases(facts, data_dir)]
        missing = missing_cases(facts, prepared)
        print(f"{len(prepared)} of {facts.total_cases} known cases have slices{f'; not {missing}' if missing else ''}")
        if not prepared:
            print(f"{config.name}: got volumes alone, no slices yet (scripts/prepare_data.py makes them)")
            return findings, hashes
    images = []
    for split in ("train", "val"):
        dataset = open_split(config, data_dir, split)
        total = dataset.totals.get(dataset.split)
        results, _ = run_jobs(partial(check_index, dataset), range(len(dataset)), pool, split, "image")
        collect(results, findings, hashes)
        findings += verify.find_duplicates(dataset)
        findings += [Finding("unpaired", path, text) for path, text in dataset.unpaired]
        if total and len(dataset) > total:
            text = f"got {len(dataset)} images in split '{dataset.split}', expected {total} at most"
            findings.append(Finding("count", dataset.root, text))
        images += [sample.image for sample in dataset.samples]
        print(f"{split}: {len(dataset)}{f' of {total} known' if total else ''} images")
    return findings + verify.find_identical(images, hashes), hashes


def open_split(config: DataConfig, data_dir: Path, split: str) -> SegmentationDataset:
    """The 'train' or 'val' split with every pair it has, and in `unpaired` what has no partner."""
    cls, name = DATASETS[config.dataset], config.train_split if split == "train" else config.val_split
    return cls(data_dir, name, facts=dataset_facts(config), lenient=True)


def check_raw(check_affine: bool, raw: RawCase) -> Checked:
    return verify.check_volumes(raw, check_affine=check_affine), verify.hash_files([raw.image, raw.label])


def check_index(dataset: SegmentationDataset, index: int) -> Checked:
    sample = dataset.samples[index]
    return verify.check_sample(dataset, index), verify.hash_files([sample.image, sample.label])


def collect(results: list[tuple[object, Checked]], findings: list[Finding], hashes: dict[Path, str]) -> None:
    """Add what jobs found to what was found before."""
    for _, (found, hashed) in results:
        findings += found
        hashes.update(hashed)


def reason_against(config: DataConfig, data_dir: Path, findings: list[Finding]) -> str | None:
    """Why these files should not be written down as sound, if so."""
    if any(finding.kind in verify.FAULTS for finding in findings):
        return "the data set has faults"
    if config.dataset in VOLUMES and not verify.prepared_cases(VOLUMES[config.dataset], data_dir):
        return "the data set is not prepared yet"
    return None


def check_manifest(path: Path, hashes: dict[Path, str], data_dir: Path, reason: str | None) -> list[Finding]:
    """Compare the files with the manifest; where there is none, write it, unless there is a reason against it."""
    if path.exists():
        findings = verify.compare_manifest(verify.read_manifest(path), hashes, data_dir)
        print(f"{path}: compared")
        return findings
    if reason:
        print(f"{path}: not written, {reason}")
    elif not os.access(path.parent, os.W_OK):
        print(f"{path}: not written, the folder cannot be written to (--manifest names another file)")
    else:
        with replacing(path, durable=False, new=True) as temporary:
            temporary.write_text(verify.format_manifest(hashes, data_dir), encoding="utf-8")
        print(f"{path}: written; the next run compares with it")
    return []


if __name__ == "__main__":
    sys.exit(run_and_report(main))
