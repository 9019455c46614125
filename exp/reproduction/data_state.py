"""What of a data set lies in the data folder: complete, partial or nothing, beside the known totals."""

from collections.abc import Sequence
from pathlib import Path

from exp.config.experiment import DataConfig
from exp.data import build_dataset, find_dataset
from exp.data.prepare.facts import ARCHIVES, SPLIT_TOTALS, VOLUMES
from exp.reproduction.job import Job
from exp.runtime.errors import InputError


def describe_data(jobs: Sequence[Job], data_dir: Path) -> list[str]:
    """The jobs' data sets -> a line each."""
    configs = {job.data: job.config.data for job in reversed(jobs)}  # of each the first
    return [f"data {name}: {describe_set(configs[name], data_dir)}" for name in dict.fromkeys(c.data for c in jobs)]


def describe_set(config: DataConfig, data_dir: Path) -> str:
    """complete, partial or empty, and why; files are listed, none is opened."""
    try:
        parts = [build_dataset(config, str(data_dir), split) for split in ("train", "val")]
    except InputError as error:
        return f"{'partial' if has_any(config.dataset, data_dir) else 'empty'}: {error}"
    found = " and ".join(f"{len(part)} {split}" for part, split in zip(parts, ("train", "val"))) + " images"
    if config.fold is not None:
        found += f", fold {config.fold}"
    if not find_dataset(config.dataset).on_disk:
        return f"complete: {found}, made on the fly"
    known, number = known_total(config), sum(map(len, parts))
    if config.dataset == "hippocampus":  # whose slices nobody has counted, but the cases
        number = len({sample.case for part in parts for sample in part.samples})
    if known is None or config.train_samples or config.val_samples:
        return f"of unknown total: {found}"
    what = "cases" if config.dataset == "hippocampus" else "images"
    return f"{'complete' if number == known else 'partial'}: {found}; {number} of {known} {what}"


def known_total(config: DataConfig) -> int | None:
    """Images of both splits when everything is there (of hippocampus: cases)."""
    if config.dataset in VOLUMES:
        facts = VOLUMES[config.dataset]
        return sum(facts.fold_slices) if facts.fold_slices else facts.total_cases
    totals = SPLIT_TOTALS.get(config.dataset, {})
    splits = (config.train_split, config.val_split)
    return sum(totals[split] for split in splits) if all(split in totals for split in splits) else None


def has_any(dataset: str, data_dir: Path) -> bool:
    """Whether any file lies in the folders that the data set's downloads fill."""
    folders = [data_dir / folder for archive in ARCHIVES.get(dataset, ()) for folder in archive.folders]
    return any(path.is_file() for folder in folders if folder.is_dir() for path in folder.rglob("*"))
