"""Time and memory of the metrics beside the usual ways: one-hot masks, torchmetrics, segmentation_models_pytorch.

    python scripts/benchmarks/benchmark_metrics.py --output metrics.json  # minutes, and some GB for the one-hot way
    python scripts/benchmarks/benchmark_metrics.py --shapes voc --threads 2

Every way turns predictions and labels in hand into TP, FP and FN of every class of one image, ignoring 255. All run in
one process, one after the other in every round; medians over the rounds, and ratios to ours. Peak memory is the growth
of the resident set in a fresh process. Calibration counts stand beside `prob.argmax(1)` of the same map, and the
comparison of two rules on 2,000 images is timed once imported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SHAPES = {"camvid": (11, 360, 480), "voc": (21, 512, 512), "ade20k": (150, 512, 683)}
IGNORE_INDEX = 255
SLOW_ROUNDS = 3  # of ways that take seconds


def make_image(classes: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """int64 predictions and uint8 labels of (height, width): blocky regions, 80 % right, 5 % ignored."""
    import torch
    from torch.nn.functional import interpolate

    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, classes, (1, 1, 12, 16), generator=generator).float()
    label = interpolate(coarse, (height, width))[0, 0].to(torch.uint8)
    wrong = torch.rand(height, width, generator=generator) > 0.8
    pred = torch.where(wrong, torch.randint(0, classes, (height, width), generator=generator), label.long())
    label[torch.rand(height, width, generator=generator) < 0.05] = IGNORE_INDEX
    return pred, label


def one_hot(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(H, W) -> (3, C): masks of every class by one_hot(), their products summed."""
    import torch
    from torch.nn.functional import one_hot

    keep = label != IGNORE_INDEX
    predicted = one_hot(pred, num_classes).movedim(-1, 0).float() * keep
    true = one_hot(label.long().where(keep, 0), num_classes).movedim(-1, 0).float() * keep
    tp = (predicted * true).sum((1, 2))
    return torch.stack([tp, (predicted * (1 - true)).sum((1, 2)), ((1 - predicted) * true).sum((1, 2))]).long()


def masks(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(H, W) -> (3, C): a comparison with every class, one after the other."""
    import torch

    keep, rows = label != IGNORE_INDEX, []
    for c in range(num_classes):
        predicted, true = (pred == c) & keep, label == c
        tp = (predicted & true).sum()
        rows.append(torch.stack([tp, predicted.sum() - tp, true.sum() - tp]))
    return torch.stack(rows, 1)


def torchmetrics_counts(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    import torch
    from torchmetrics.functional.classification import multiclass_stat_scores

    options = {"num_classes": num_classes, "average": None, "ignore_index": IGNORE_INDEX}
    tp, fp, _, fn, _ = multiclass_stat_scores(pred[None], label[None].long(), **options).unbind(1)
    return torch.stack([tp, fp, fn])


def smp_counts(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    import torch
    from segmentation_models_pytorch.metrics import get_stats

    options = {"mode": "multiclass", "num_classes": num_classes, "ignore_index": IGNORE_INDEX}
    tp, fp, fn, _ = get_stats(pred[None], label[None].long(), **options)
    return torch.stack([tp[0], fp[0], fn[0]])


def ours(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    from exp.evaluation.metrics import count

    return count(pred, label, num_classes)


WAYS: dict[str, Callable] = {
    "ours": ours,
    "torchmetrics": torchmetrics_counts,
    "segmentation_models_pytorch": smp_counts,
    "a mask a class": masks,
    "one-hot": one_hot,
}


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """What is timed by name -> median milliseconds; a way that takes seconds gets fewer rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for i in range(rounds):
        for name, way in ways.items():
            if i >= SLOW_ROUNDS and statistics.median(times[name]) > 500:
                continue
            start = time.perf_counter()
            way()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(name: str, shape: tuple[int, int, int]) -> float:
    """One way in a fresh process -> MB by which its resident set grew beyond predictions and labels."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory goes back to the system at once
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grow, (name, shape))


def _grow(name: str, shape: tuple[int, int, int]) -> float:
    import torch

    from scripts.benchmarks.benchmark_rules import resident

    torch.set_num_threads(1)
    small = make_image(shape[0], 8, 8)
    WAYS[name](*small, shape[0])  # libraries are loaded
    pred, label = make_image(*shape)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = resident("VmRSS")
    WAYS[name](pred, label, shape[0])
    return (resident("VmHWM") - before) / 2**20


def bench_counts(shape: tuple[int, int, int], rounds: int) -> dict[str, dict[str, float]]:
    import torch

    pred, label = make_image(*shape)
    expected = ours(pred, label, shape[0])
    for name, way in WAYS.items():
        if not torch.equal(way(pred, label, shape[0]).long(), expected):
            raise AssertionError(f"{name}: other counts than ours")
    times = medians({name: lambda way=way: way(pred, label, shape[0]) for name, way in WAYS.items()}, rounds)
    return {
        name: {"ms": ms, "times_ours": ms / times["ours"], "extra_mb": peak_memory(name, shape)}
        for name, ms in times.items()
    }


def bench_calibration(shape: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """(C, H, W) -> milliseconds of the calibration counts, of argmax, and of torchmetrics' ECE alone."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    from exp.evaluation.calibration import count_calibration
    from scripts.benchmarks.benchmark_rules import SHAPES as RULE_SHAPES
    from scripts.benchmarks.benchmark_rules import realistic_map

    pruned = {size[1:]: share for size, share in filter(None, RULE_SHAPES.values())}.get(shape, 0.0)
    prob = realistic_map((1, *shape), pruned)
    _, label = make_image(*shape)
    target = label.long()[None]
    options = {"num_classes": shape[0], "n_bins": 10, "ignore_index": IGNORE_INDEX}
    return medians(
        {
            "ours, ECE and SCE": lambda: count_calibration(prob, label),
            "argmax": lambda: prob.argmax(1),
            "torchmetrics, ECE": lambda: multiclass_calibration_error(prob, target, **options),
        },
        rounds,
    )


def bench_statistics(rounds: int) -> float:
    """Milliseconds to compare two rules on 2,000 images of 21 classes, and to score both."""
    import numpy as np

    from exp.evaluation.comparison import compare_rules
    from exp.evaluation.metrics import EvalResult

    rng = np.random.default_rng(0)
    names, classes = tuple(map(str, range(2000))), tuple(map(str, range(21)))
    results = [EvalResult(rule, names, classes, rng.integers(0, 999, (2000, 3, 21))) for rule in "ab"]
    return medians({"compare": lambda: compare_rules(results, "mIoUI")}, rounds)["compare"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write all figures, JSON")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(args.threads)
    print(f"PyTorch {torch.__version__}, {args.threads} thread(s), {platform.processor() or platform.machine()}")
    report: dict = {"torch": torch.__version__, "threads": args.threads, "counts": {}, "calibration": {}}
    for name in args.shapes:
        shape = SHAPES[name]
        report["counts"][name] = rows = bench_counts(shape, args.rounds)
        print(f"\ncounts, {name} {shape}")
        for way, row in rows.items():
            print(f"  {way:<28} {row['ms']:10.2f} ms {row['times_ours']:9.1f} x {row['extra_mb']:9.1f} MB")
        report["calibration"][name] = times = bench_calibration(shape, args.rounds)
        print(f"calibration, {name} {shape}: " + ", ".join(f"{way} {ms:.1f} ms" for way, ms in times.items()))
    report["compare_2000_images_ms"] = bench_statistics(max(3, args.rounds // 3))
    print(f"\ncomparing two rules on 2,000 images: {report['compare_2000_images_ms']:.0f} ms")
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
