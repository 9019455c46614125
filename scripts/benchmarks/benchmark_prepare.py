"""Time and memory of preparing one LiTS volume, beside loading both volumes as float64 and writing slice by slice.

    python scripts/benchmarks/benchmark_prepare.py  # .nii and .nii.gz, slices along the last axis (LiTS)
    python scripts/benchmarks/benchmark_prepare.py --axis 0  # along the first axis (KiTS19)

A volume of 512x512x200 is generated: a body with noise, an organ and, in a fifth of the slices, a tumour. Each way
runs in a fresh process, the ways one after the other in every round; shown are the medians of the seconds without the
imports and the largest resident set, imports included (it needs Linux). "float64" writes the slices with tumour alone,
as ours; --all_slices adds the way that writes all. Ours runs as scripts/prepare_data.py does with one worker: both
looks at the labels, the space check and the renaming are in it.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SIDE, DEPTH = 512, 200
NAIVE = """
import nibabel, numpy, pathlib, sys, time
source, target, axis, all_slices = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), {all_slices}
start = time.perf_counter()
image = numpy.moveaxis(nibabel.load(source / ("volume-0" + sys.argv[4])).get_fdata(), axis, 0)
label = numpy.moveaxis(nibabel.load(source / ("segmentation-0" + sys.argv[4])).get_fdata(), axis, 0)
for index in range(len(image)):
    if all_slices or (label[index] == 2).any():
        numpy.savez_compressed(target / str(index), image=image[index], label=label[index])
print(time.perf_counter() - start)
print(pathlib.Path("/proc/self/status").read_text())
"""
OURS = """
import contextlib, io, pathlib, sys, time
from exp.data.prepare.volumes import prepare_cases
source, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
(target / "lits").mkdir()
for name in ("volume-0", "segmentation-0"):
    (target / "lits" / (name + sys.argv[4])).symlink_to(source / (name + sys.argv[4]))
start = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    prepare_cases("lits", target, 1)
print(time.perf_counter() - start)
print(pathlib.Path("/proc/self/status").read_text())
"""
WAYS = {"ours": OURS, "float64": NAIVE.format(all_slices=False), "float64, all slices": NAIVE.format(all_slices=True)}


def generate(folder: Path, axis: int, depth: int) -> None:
    """Write volume-0 and segmentation-0 as .nii and .nii.gz."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    body, organ, tumour = x**2 + y**2 / 0.5 < 0.8, (x + 0.3) ** 2 + y**2 < 0.12, (x + 0.3) ** 2 + y**2 < 0.01
    label = np.zeros((depth, SIDE, SIDE), np.uint8)
    label[depth // 5 : 4 * depth // 5, organ] = 1
    label[2 * depth // 5 : 3 * depth // 5, tumour] = 2
    image = np.empty(label.shape, np.int16)
    for k in range(depth):
        image[k] = np.where(body, 40 + 40 * (label[k] == 1), -1000) + rng.normal(0, np.where(body, 20, 8))
    affine = np.diag([0.8, 0.8, 1.5, 1.0])
    if axis == 0:
        affine = affine[:, [2, 1, 0, 3]]
    for name, values in (("volume-0", image), ("segmentation-0", label)):
        picture = nib.Nifti1Image(np.asfortranarray(np.moveaxis(values, 0, axis)), affine)
        for suffix in (".nii", ".nii.gz"):
            nib.save(picture, folder / f"{name}{suffix}")


def run(code: str, source: Path, axis: int, suffix: str) -> tuple[float, float]:
    """One way in a fresh process -> seconds, peak bytes."""
    with tempfile.TemporaryDirectory(dir=source) as target:
        command = [sys.executable, "-c", code, source, target, str(axis), suffix]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)  # getrusage() would count this process before the exec
    return float(done.stdout.split()[0]), 1024 * float(peak[1])


def measure(source: Path, ways: list[str], axis: int, suffix: str, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of the seconds and the largest peak of every way."""
    rounds = [{way: run(WAYS[way], source, axis, suffix) for way in ways} for _ in range(repeats)]
    return {
        way: {
            "seconds": statistics.median(r[way][0] for r in rounds),
            "peak_bytes": max(r[way][1] for r in rounds),
        }
        for way in ways
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", type=int, choices=(0, 2), default=2, help="along which slices lie (default: 2, LiTS)")
    parser.add_argument("--slices", type=int, default=DEPTH, help=f"of the volume (default: {DEPTH})")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--all_slices", action="store_true", help="measure float64 with every slice written, too")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        generate(source, args.axis, args.slices)
        print("| file | way | median s | x ours | peak MB | x ours |\n|---|---|---:|---:|---:|---:|", flush=True)
        for suffix in (".nii", ".nii.gz"):
            ways = list(WAYS)[: 3 if args.all_slices else 2]
            results[suffix] = measure(source, ways, args.axis, suffix, args.repeats)
            ours = results[suffix]["ours"]
            for way, row in results[suffix].items():
                seconds, peak = row["seconds"] / ours["seconds"], row["peak_bytes"] / ours["peak_bytes"]
                megabytes = row["peak_bytes"] / 1e6
                print(
                    f"| {suffix} | {way} | {row['seconds']:.2f} | {seconds:.1f} | {megabytes:.0f} | {peak:.1f} |",
                    flush=True,
                )
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
