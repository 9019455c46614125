"""Whether two revisions of this repository train and evaluate alike, byte for byte: for changes that move nothing.

    python scripts/benchmarks/compare_revisions.py BEFORE [AFTER] [--data_dir DIR] [--only NAME ...]

BEFORE, AFTER: commits (AFTER: HEAD). Each is checked out into a folder of its own and runs the same trainings with the
same seed: the quick start; with --data_dir, which holds camvid/ and prepared hippocampus/, also CamVid on one and on
two processes and a fold of hippocampus. Then the checkpoint of BEFORE is evaluated by AFTER.

Compared are the weights tensor by tensor, the losses of log.jsonl, every CSV, and every JSON of results/ but for the
times and what names the revision. A key of a config that only AFTER has is listed; it is no difference.
Exit status 0: all the same; 1: something differs, and it is named.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RULES = ("argmax", "rankseg_rma")
PROVENANCE = ("revision", "versions", "method")  # of a result's JSON; `method` is prose
SMALL = ("schedule.train_iters=20", "schedule.log_iters=5", "schedule.num_workers=1")
CAMVID = ("--data_yaml", "camvid", "--model_yaml", "deeplabv3plus_mobilenetv2_100", "--optim_yaml", "adamw_lr6e-4")
HIPPOCAMPUS = ("--data_yaml", "hippocampus", "--model_yaml", "unet_mobilenetv3_small_100", "--test_yaml", "test_dice")
RUNS = {  # name: processes, flags, --set
    "quickstart": (1, (), ("schedule.num_workers=1",)),
    "camvid": (1, CAMVID, (*SMALL, "model.pretrained=false", "schedule.batch_size=4")),
    "camvid_two_processes": (2, CAMVID, (*SMALL, "model.pretrained=false", "schedule.batch_size=4")),
    "hippocampus": (1, HIPPOCAMPUS, (*SMALL, "data.fold=0", "schedule.batch_size=8")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    names = [name for name in args.only if args.data_dir or name == "quickstart"]
    folder, differences = Path(tempfile.mkdtemp(prefix="compare_")), []
    try:
        trees = [
            checkout(revision, folder / side) for revision, side in ((args.before, "before"), (args.after, "after"))
        ]
        for name in names:
            before, after = (run(tree, name, args.data_dir, tree.with_name(f"{tree.name}_{name}")) for tree in trees)
            found = list(compare(before, after))
            again = evaluate_again(trees[1], name, args.data_dir, before, folder / f"again_{name}")
            found += [f"AFTER on BEFORE's checkpoint: {text}" for text in compare_files(before, again)]
            print(f"{name}: {'the same' if not found else f'{len(found)} differences'}", flush=True)
            differences += [f"{name}: {text}" for text in found]
    finally:
        for side in ("before", "after"):
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder / side], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(differences) or f"{args.before} and {args.after} are the same in {', '.join(names)}")
    return bool(differences)


def checkout(revision: str, folder: Path) -> Path:
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", "--quiet", folder, revision], check=True)
    return folder


def run(tree: Path, name: str, data_dir: Path | None, output: Path) -> Path:
    """Train and evaluate in a revision's tree -> the run's folder."""
    call(tree, program(tree, name, data_dir, output))
    return next(path.parent for path in output.glob("*/results"))


def evaluate_again(tree: Path, name: str, data_dir: Path | None, trained: Path, output: Path) -> Path:
    """A tree evaluates what another one trained, in a copy of that run's folder -> the folder of the new results."""
    shutil.copytree(trained, output / trained.name)
    shutil.rmtree(output / trained.name / "results")
    call(tree, [*program(tree, name, data_dir, output), "--test-only"])
    return output / trained.name


def program(tree: Path, name: str, data_dir: Path | None, output: Path) -> list[str]:
    """On as many processes each time: another number of threads rounds otherwise."""
    processes, flags, settings = RUNS[name]
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    data = ["--data_dir", str(data_dir.resolve())] if data_dir and flags else []
    rules = ["--predict_yaml", *RULES, "--output_dir", str(output)]
    return [*launch, f"{tree}/exp/main.py", *data, *flags, *rules, "--set", *settings]


def call(tree: Path, arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stderr[-3000:]}")


def compare(before: Path, after: Path) -> Iterator[str]:
    """Two runs' folders -> what differs in weights, losses and results."""
    from safetensors.torch import load_file

    one, other = (load_file(path / "checkpoints" / "last.safetensors") for path in (before, after))
    if one.keys() != other.keys():
        yield f"weights: other names, {sorted(one.keys() ^ other.keys())[:5]}"
    for name in one.keys() & other.keys():
        if one[name].dtype != other[name].dtype or not one[name].equal(other[name]):
            yield f"weights: {name}"
    if losses(before) != losses(after):
        yield "log.jsonl: the losses"
    yield from compare_files(before, after)


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(row["iteration"], row["train/loss"]) for row in rows if "train/loss" in row]


def compare_files(before: Path, after: Path) -> Iterator[str]:
    """The CSVs and JSONs of two results/ folders."""
    names = {path.name for run in (before, after) for path in (run / "results").iterdir() if path.is_file()}
    for name in sorted(names - {"timing.json"}):
        one, other = (run / "results" / name for run in (before, after))
        if not (one.is_file() and other.is_file()):
            yield f"{name}: in one of the two only"
        elif name.endswith(".json"):
            yield from compare_values(*(content(path) for path in (one, other)), name)
        elif one.read_bytes() != other.read_bytes():
            yield name


def content(path: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in PROVENANCE}


def compare_values(one: Any, other: Any, place: str) -> Iterator[str]:
    """Two JSON values -> the places where they differ; a config's keys that only the second has are printed."""
    if isinstance(one, dict) and isinstance(other, dict):
        added = other.keys() - one.keys()
        if added and (".config." in place or ".training." in place):
            print(f"  new in {place}: {', '.join(sorted(added))}")
            added = set()
        for key in [key for key in one if key not in other] + sorted(added):
            yield f"{place}.{key}: in one of the two only"
        for key in one.keys() & other.keys():
            yield from compare_values(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other)):
            yield from compare_values(*pair, f"{place}[{index}]")
    elif json.dumps(one) != json.dumps(other):
        yield f"{place}: {json.dumps(one)[:60]} and {json.dumps(other)[:60]}"


if __name__ == "__main__":
    sys.exit(main())
