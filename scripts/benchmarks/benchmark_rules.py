"""Time and memory of `rankseg_rma` beside max(1), argmax, a sort-based RankSEG-RMA and the PyPI package `rankseg`.

    python scripts/benchmarks/benchmark_rules.py --output rules.json  # all shapes, about twenty minutes
    python scripts/benchmarks/benchmark_rules.py --shapes voc small --threads 2 --repeats 5
    python scripts/benchmarks/benchmark_rules.py --data DATA  # real maps: logits of networks on VOC and CamVid
    python scripts/benchmarks/benchmark_rules.py --maps FOLDER  # maps of a network: .npy, .npz or .pt

All rules run in one process, one after the other in every round; a table holds the least times of the rounds, on each
number of threads, and their ratio to `prob.max(1).indices`, which gives the labels of argmax in a fraction of its time.
"Under load" are medians while other processes, which the program starts and ends, keep all cores busy, as workers of a
loader do. Peak memory is the growth of the resident set in a fresh process, output included. Generated maps are smooth
regions with soft borders; the share of pruned classes is that of real maps (89 % for VOC, 92 % for ADE20K, 43 % for
Cityscapes), and the share of entries near their threshold is printed. Everything is measured on a CPU, and nothing here
says how the rules compare on an accelerator.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
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


def real_maps(data: Path, images: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """A folder with `voc/` and `camvid_logits/` -> names, and what makes the (1, C, H, W) map, of some images each."""
    networks = [*sorted((data / "voc" / "logits").glob("*/")), *sorted((data / "camvid_logits").glob("*/"))]
    if not networks:
        raise ValueError(f"{data} must hold voc/logits/NETWORK/ or camvid_logits/NETWORK/ with .npz files, got neither")
    for network in networks:
        files = sorted(network.glob("*.npz"))
        for file in files[:: max(1, len(files) // images)][:images]:
            yield f"{network.parent.parent.name}/{network.name}/{file.stem}", partial(read_logits, data, file)


def read_logits(data: Path, file: Path) -> Tensor:
    """A .npz of 8-bit logits, with scale and offset -> (1, C, H, W) probabilities of the label's size."""
    import numpy as np
    import torch
    from PIL import Image
    from torch.nn.functional import interpolate

    with np.load(file, allow_pickle=False) as stored:
        logits = torch.from_numpy(stored["logits"] * np.float32(stored["scale"]) + np.float32(stored["offset"]))[None]
        inside = stored["inside"].tolist() if "inside" in stored else None
    size = (360, 480)
    if "voc" in file.parts:
        with Image.open(data / "voc/VOCdevkit/VOC2012/SegmentationClass" / f"{file.stem}.png") as label:
            size = label.size[::-1]
    if inside is not None:  # the part of the network's square input that the image fills
        logits = interpolate(logits, (513, 513), mode="bilinear", align_corners=True)[..., : inside[0], : inside[1]]
    return interpolate(logits, size, mode="bilinear", align_corners=False).softmax(1)


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
    """A map -> what is timed on it, by name, a line each; the first is what ratios refer to."""
    from exp.rules.dep import rankseg_dep
    from rankseg_rma import rankseg_levelset, rankseg_rma

    half = prob.half()
    rules: dict[str, Callable[[], object]] = {
        "max": lambda: prob.max(1).indices,
        "max float16": lambda: half.max(1).indices,
        "argmax": lambda: prob.argmax(1),
        "amax (one read)": lambda: prob.amax(),
        "ours dice": lambda: rankseg_rma(prob),
        "ours iou": lambda: rankseg_rma(prob, "iou"),
        "ours dice float16": lambda: rankseg_rma(half),
        "ours iou float16": lambda: rankseg_rma(half, "iou"),
        "level sets": lambda: rankseg_levelset(prob),
        "level sets float16": lambda: rankseg_levelset(half),
        "rankseg_dep dice": lambda: rankseg_dep(prob),
        "rankseg_dep iou": lambda: rankseg_dep(prob, "iou"),
    }
    for metric in ("dice", "iou"):
        if with_sort:
            rules[f"sort-based {metric}"] = partial(sort_rma, prob, metric)
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


def time_rules(
    rules: dict[str, Callable[[], object]],
    repeats: int,
    budget: float,
    of: Callable[[list[float]], float],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Functions -> seconds, measured in turns, the least or the median; who has used up his budget of them sits out."""
    spent: dict[str, list[float]] = {name: [] for name in rules}
    for turn in range(repeats + 1):
        gc.collect()  # else it falls to the same rule in every turn
        for name, rule in rules.items():
            if turn > 1 and sum(spent[name]) > budget:
                continue
            start = clock()
            rule()
            elapsed = clock() - start
            if turn or elapsed > budget:  # the first turn warms up
                spent[name].append(elapsed)
    return {name: of(times) for name, times in spent.items()}


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """That many processes that compute without pause, ended at the end."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(1)  # until all of them run
        yield
    finally:
        for process in processes:
            process.terminate()
            process.wait()


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
    print(f"\n{result['name']} {tuple(result['shape'])}; {facts}")
    threads = list(result["seconds"])
    heads = [f"{n} thread(s), ms | x max | x ours" for n in threads] + [
        f"{n} under load, ms | x idle 1" for n in threads
    ]
    print(f"| rule | {' | '.join(heads)} | peak extra MB | of the input |")
    print("|---|" + "---:|" * (5 * len(threads) + 2))
    idle = result["seconds"]
    for name in idle[threads[0]]:
        yardstick = "max float16" if "float16" in name else "max"
        ours = "ours iou" if "iou" in name else "ours dice"
        cells = []
        for n in threads:
            seconds = idle[n][name]
            cells += [f"{1e3 * seconds:.3f}", f"{seconds / idle[n][yardstick]:.2f}", f"{seconds / idle[n][ours]:.2f}"]
        for n in threads:
            loaded = result["under_load"].get(n, {}).get(name)
            cells += [f"{1e3 * loaded:.3f}", f"{loaded / idle[threads[0]][name]:.2f}"] if loaded else ["", ""]
        memory = result["memory"].get(name)
        cells += [f"{memory / 1e6:.1f}", f"{memory / result['input_bytes'][name]:.2f}"] if memory else ["", ""]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def measure(name: str, prob: Tensor, args: argparse.Namespace) -> dict:
    """One map -> the record that is printed and written; seconds by number of threads and by rule."""
    import torch

    rules = build_rules(prob, with_sort=not args.no_sort)
    repeats = args.repeats * (10 if prob.numel() < 2**20 else 1)
    seconds, under_load = {}, {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        clock = time.thread_time if args.cpu_time else time.perf_counter
        seconds[str(threads)] = time_rules(rules, repeats, args.budget, min, clock)
    first = seconds[str(args.threads[0])]
    short = {key: rule for key, rule in rules.items() if first[key] < args.budget / 2}
    if args.busy:
        with busy_cores(args.busy):
            for threads in args.threads:
                torch.set_num_threads(threads)
                under_load[str(threads)] = time_rules(short, repeats, args.budget, statistics.median)
    size = prob.numel() * prob.element_size()
    return {
        "name": name,
        "shape": list(prob.shape),
        "map": describe_map(prob),
        "seconds": seconds,
        "under_load": under_load,
        "memory": {} if args.no_memory or prob.numel() < 2**20 else measure_memory(prob, list(rules)),
        "input_bytes": {rule: size // 2 if "float16" in rule else size for rule in rules},
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=None, help="generated maps (default: all)")
    parser.add_argument("--maps", type=Path, help="file or folder of maps of a network, instead of generated ones")
    parser.add_argument("--data", type=Path, help="folder with voc/ and camvid_logits/, instead of generated maps")
    parser.add_argument("--images", type=int, default=3, help="of each network in --data (default: 3)")
    parser.add_argument(
        "--busy", type=int, default=os.cpu_count(), help="busy processes of the load (default: one a core; 0: no load)"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the CPU time of the calling thread: for a machine that is not idle, with --threads 1 --busy 0",
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds, ten times as many for small maps")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds after which a slow rule sits out")
    parser.add_argument("--no-sort", action="store_true", help="leave the sort-based implementation out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory (it needs Linux)")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import torch

    sources: list[tuple[str, Callable[[], Tensor]]] = []
    if args.maps is not None:
        sources = [(name, lambda prob=prob: prob) for name, prob in read_maps(args.maps)]
    elif args.data is not None:
        sources = list(real_maps(args.data, args.images))
    else:
        for key in args.shapes if args.shapes is not None else SHAPES:
            for shape, pruned in [SHAPES[key]] if SHAPES[key] else [(shape, 0.5) for shape in SMALL_SHAPES]:
                sources.append((key, partial(realistic_map, shape, pruned)))
    if not build_package_rules(torch.zeros(1, 2, 1, 1), "dice"):
        print("Without the package `rankseg`, which is not installed: pip install rankseg==0.0.8")
    results = []
    for name, make in sources:
        results.append(measure(name, make(), args))
        print_table(results[-1])
    print(f"\n{CPU_NOTE} torch {torch.__version__}, {platform.processor() or platform.machine()}.")
    if args.output is not None:
        record = {"note": CPU_NOTE, "torch": torch.__version__, "machine": platform.platform(), "results": results}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
