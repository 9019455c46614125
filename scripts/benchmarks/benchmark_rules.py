"""Time and memory of `rankseg_rma` beside argmax, a sort-based RankSEG-RMA and the PyPI package `rankseg`.

    python scripts/benchmarks/benchmark_rules.py --output rules.json  # all shapes, about ten minutes
    python scripts/benchmarks/benchmark_rules.py --shapes voc small --threads 2 --repeats 5
    python scripts/benchmarks/benchmark_rules.py --maps FOLDER  # maps of a network: .npy, .npz or .pt

All rules run in one process, one after the other in every round; a table holds the medians over the rounds and their
ratio to `prob.argmax(1)`. Peak memory is the growth of the resident set in a fresh process, output included.
Generated maps are smooth regions with soft borders; the share of pruned classes is that of real maps (89 % for VOC,
92 % for ADE20K, 43 % for Cityscapes), and the share of entries near their threshold is printed. Everything is
measured on a CPU, and nothing here says how the rules compare on an accelerator.
"""

from __future__ import annotations

import argparse
import json
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# name: shape, and the share of classes whose probability never exceeds 0.1
SHAPES = {
    "voc": ((1, 21, 512, 512), 0.89),
    "ade20k": ((1, 150, 512, 683), 0.92),
    "cityscapes": ((1, 19, 1024, 2048), 0.43),
    "binary": ((8, 2, 512, 512), 0.0),
    "small": None,
}
SMALL_SHAPES = tuple((1, classes, side, side) for classes in (2, 21, 150) for side in (8, 16, 32, 64))
PRUNING_PROB = 0.1
NEAR = 0.05  # an entry is near its threshold if it is less than that away from it
CPU_NOTE = "Measured on a CPU only; nothing here says how the rules compare on an accelerator."


def realistic_map(shape: tuple[int, int, int, int], pruned: float, seed: int = 0) -> Tensor:
    """(B, C, H, W) float32 probabilities: smooth regions of few classes with soft borders, the others pruned."""
    import torch
    from torch.nn.functional import interpolate

    generator = torch.Generator().manual_seed(seed)
    _, classes, height, width = shape
    present = max(2, round(classes * (1 - pruned)))

    def noise(channels: int, cell: int) -> Tensor:
        grid = (max(2, height // cell), max(2, width // cell))
        coarse = torch.randn(1, channels, *grid, generator=generator)
        return interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0]

    prob = torch.empty(shape)
    for image in prob:
        order = torch.randperm(classes, generator=generator)
        image[order[:present]] = 12 * noise(present, 96) + 2 * noise(present, 12)
        top = image[order[:present]].amax(0)
        for c in order[present:].tolist():
            image[c] = top - 10 + noise(1, 32)[0]
        image.copy_(image.softmax(0))
    return prob


def read_maps(path: Path) -> list[tuple[str, Tensor]]:
    """A .npy, .npz or .pt file, or a folder of them, of (C, H, W) or (B, C, H, W) maps -> names and (B, C, H, W)."""
    import numpy as np
    import torch

    files = sorted(path.iterdir()) if path.is_dir() else [path]
    maps = []
    for file in files:
        if file.suffix == ".npy":
            maps.append((file.stem, torch.from_numpy(np.load(file, allow_pickle=False))))
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                maps += [(f"{file.stem}:{key}", torch.from_numpy(arrays[key])) for key in arrays.files]
        elif file.suffix == ".pt":
            value = torch.load(file, weights_only=True, map_location="cpu")
            values = value if isinstance(value, dict) else {"": value}
            maps += [(f"{file.stem}:{key}".rstrip(":"), tensor) for key, tensor in values.items()]
    maps = [(name, prob.unsqueeze(0) if prob.dim() == 3 else prob) for name, prob in maps]
    wrong = [f"{name} {tuple(prob.shape)}" for name, prob in maps if prob.dim() != 4]
    if wrong or not maps:
        raise ValueError(f"{path} must hold (C, H, W) or (B, C, H, W) maps (.npy, .npz, .pt), got {wrong or 'none'}")
    return [(name, prob.float().contiguous()) for name, prob in maps]


def sort_rma(prob: Tensor, metric: str) -> Tensor:
    """(B, C, H, W) -> (B, H, W) labels: RankSEG-RMA as the paper describes it, by sorting every class."""
    import torch

    flat = prob.flatten(2)
    size = flat.shape[-1]
    mu = flat.sum(-1, keepdim=True)
    ranked, order = flat.sort(-1, descending=True)
    mass = ranked.cumsum(-1)
    count = torch.arange(1, size + 1, dtype=flat.dtype)
    score = 2 * mass / (count + mu + 1) if metric == "dice" else mass / (count + mu - mass)
    best = score.argmax(-1, keepdim=True)
    kept = ranked[..., :1] > PRUNING_PROB
    chosen = (torch.arange(size) <= best) & kept
    own = torch.zeros_like(chosen).scatter_(-1, order, chosen)
    held = own.sum(1, keepdim=True)
    alone = own & (held == 1)
    n, s = alone.sum(-1, keepdim=True), (flat * alone).sum(-1, keepdim=True)
    if metric == "dice":
        gain = 2 * (s + flat) / (n + mu + 2) - 2 * s / (n + mu + 1)
    else:
        gain = (s + flat) / (n + 1 + mu - s - flat) - s / (n + mu - s)
    gain = gain.where(kept, torch.zeros(()))
    label = torch.where(held[:, 0] == 1, alone.byte().argmax(1), torch.where(held[:, 0] > 1, gain.argmax(1), 0))
    return label.view(prob.shape[0], *prob.shape[2:])


def build_rules(prob: Tensor, with_sort: bool) -> dict[str, Callable[[], object]]:
    """A map -> what is timed on it, by name; the first is what ratios refer to."""
    from rankseg_rma import rankseg_rma

    half = prob.half()
    rules: dict[str, Callable[[], object]] = {
        "argmax": lambda: prob.argmax(1),
        "amax (one read)": lambda: prob.amax(),
    }
    for metric in ("dice", "iou"):
        rules[f"ours {metric}"] = lambda metric=metric: rankseg_rma(prob, metric)
        rules[f"ours {metric} float16"] = lambda metric=metric: rankseg_rma(half, metric)
        if with_sort:
            rules[f"sort-based {metric}"] = lambda metric=metric: sort_rma(prob, metric)
        rules |= build_package_rules(prob, metric)
    return rules


def build_package_rules(prob: Tensor, metric: str) -> dict[str, Callable[[], object]]:
    """The PyPI package in its default and its fastest mode, if it is installed; two classes by the foreground."""
    try:
        from rankseg import RankSEG
    except ImportError:
        return {}
    binary = prob.shape[1] == 2
    rules = {}
    for mode, screening in (("default", False), ("screening", "auto")):
        solver = RankSEG(
            metric=metric,
            solver="RMA",
            output_mode="multilabel" if binary else "multiclass",
            pruning_prob=PRUNING_PROB,
            safe_screening=screening,
        )
        rules[f"rankseg {mode} {metric}"] = lambda solver=solver: solver.predict(prob[:, 1:] if binary else prob)
    return rules


def time_rules(rules: dict[str, Callable[[], object]], repeats: int, budget: float) -> dict[str, float]:
    """Functions -> median seconds, measured in turns; one that has used up its budget of seconds sits out."""
    spent: dict[str, list[float]] = {name: [] for name in rules}
    for turn in range(repeats + 1):
        for name, rule in rules.items():
            if turn > 1 and sum(spent[name]) > budget:
                continue
            start = time.perf_counter()
            rule()
            elapsed = time.perf_counter() - start
            if turn or elapsed > budget:  # the first turn warms up
                spent[name].append(elapsed)
    return {name: statistics.median(times) for name, times in spent.items()}


def resident(field: str) -> int:
    """Bytes of this process, `VmRSS` or `VmHWM` (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def peak_memory(prob: Tensor, name: str, queue) -> None:
    """Run in a fresh process: bytes by which the resident set grows at most while the rule `name` runs."""
    rule = build_rules(prob, with_sort=True)[name]
    rule()  # loads the code it needs, which is not its memory
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = resident("VmRSS")
    result = rule()
    queue.put(resident("VmHWM") - before)
    del result


def measure_memory(prob: Tensor, names: list[str]) -> dict[str, int]:
    """Rule names -> peak extra bytes on this map, output included; each in a process of its own."""
    from torch import multiprocessing

    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory goes back to the system at once
    context = multiprocessing.get_context("spawn")
    shared = prob.clone().share_memory_()
    peaks = {}
    for name in names:
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(shared, name, queue))
        process.start()
        peaks[name] = queue.get(timeout=120)
        process.join()
    return peaks


def describe_map(prob: Tensor) -> dict[str, float]:
    """How real a map looks: share of pruned classes, and of the other classes' entries near their threshold."""
    from rankseg_rma import rankseg_rma

    flat = prob.flatten(2)
    own = rankseg_rma(prob, allow_overlap=True).flatten(2)
    n, s, mu = own.sum(-1), (flat * own).sum(-1), flat.sum(-1)
    threshold = (s / (n + mu + 1)).unsqueeze(-1)
    kept = flat.amax(-1) > PRUNING_PROB
    near = ((flat - threshold).abs() < NEAR)[kept].float().mean().item()
    held = own.sum(1)
    return {
        "pruned_classes": 1 - kept.float().mean().item(),
        "near_threshold": near,
        "contested_pixels": (held > 1).float().mean().item(),
        "unassigned_pixels": (held == 0).float().mean().item(),
    }


def print_table(result: dict) -> None:
    """One measured map as a Markdown table."""
    facts = ", ".join(f"{key.replace('_', ' ')} {100 * value:.2f} %" for key, value in result["map"].items())
    print(f"\n{result['name']} {tuple(result['shape'])}, {result['threads']} thread(s); {facts}")
    print("| rule | median ms | x argmax | x ours | peak extra MB | of the input |\n|---|---:|---:|---:|---:|---:|")
    argmax, memory = result["seconds"]["argmax"], result["memory"]
    for name, seconds in result["seconds"].items():
        ours = result["seconds"]["ours iou" if "iou" in name else "ours dice"]
        size = result["input_bytes"][name]
        peak = f"{memory[name] / 1e6:.1f} | {memory[name] / size:.2f}" if name in memory else " | "
        print(f"| {name} | {1e3 * seconds:.3f} | {seconds / argmax:.3f} | {seconds / ours:.2f} | {peak} |", flush=True)


def measure(name: str, prob: Tensor, threads: int, args: argparse.Namespace, with_memory: bool) -> dict:
    """One map -> the record that is printed and written."""
    import torch

    torch.set_num_threads(threads)
    rules = build_rules(prob, with_sort=not args.no_sort)
    small = prob.numel() < 2**20
    seconds = time_rules(rules, args.repeats * (10 if small else 1), args.budget)
    size = prob.numel() * prob.element_size()
    return {
        "name": name,
        "shape": list(prob.shape),
        "threads": threads,
        "map": describe_map(prob),
        "seconds": seconds,
        "memory": measure_memory(prob, list(rules)) if with_memory else {},
        "input_bytes": {rule: size // 2 if "float16" in rule else size for rule in rules},
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=None, help="generated maps (default: all)")
    parser.add_argument("--maps", type=Path, help="file or folder of maps of a network, instead of generated ones")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, ten times as many for small maps")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds after which a slow rule sits out")
    parser.add_argument("--no-sort", action="store_true", help="leave the sort-based implementation out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory (it needs Linux)")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import torch

    if args.maps is not None:
        sources = [(name, lambda prob=prob: prob) for name, prob in read_maps(args.maps)]
    else:
        sources = []
        for key in args.shapes if args.shapes is not None else SHAPES:
            for shape, pruned in [SHAPES[key]] if SHAPES[key] else [(shape, 0.5) for shape in SMALL_SHAPES]:
                sources.append((key, lambda shape=shape, pruned=pruned: realistic_map(shape, pruned)))
    results = []
    for name, make in sources:
        prob = make()
        for threads in args.threads:
            with_memory = not args.no_memory and threads == args.threads[-1] and prob.numel() >= 2**20
            results.append(measure(name, prob, threads, args, with_memory))
            print_table(results[-1])
    print(f"\n{CPU_NOTE} torch {torch.__version__}, {platform.processor() or platform.machine()}.")
    if args.output is not None:
        record = {"note": CPU_NOTE, "torch": torch.__version__, "machine": platform.platform(), "results": results}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
