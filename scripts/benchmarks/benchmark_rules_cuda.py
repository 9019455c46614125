"""Time and memory of `rankseg_rma` on a CUDA device, beside argmax, max, a sort and the PyPI package `rankseg`.

    python scripts/benchmarks/benchmark_rules_cuda.py                               # all shapes, a minute or two
    python scripts/benchmarks/benchmark_rules_cuda.py --shapes voc --kernels        # and where the time goes
    python scripts/benchmarks/benchmark_rules_cuda.py --shapes ade20k --only ours --variant FUSED_PASSES=3

A call is timed twice: by CUDA events around it, and by the clock of the host from an idle device to an idle device.
Each call gets another of several maps, which together are larger than the cache; tables hold medians. A variant sets
constants of rankseg_rma.py, several if they are joined by commas; `_kernel=elements:warps` is a tile of FUSED_TILES.
Labels are compared with those of the CPU, and pixels that differ are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmarks.benchmark_rules import build_package_rules, realistic_map, sort_rma

if TYPE_CHECKING:
    from torch import Tensor

# name: shape, share of pruned classes, and whether classes are adjacent in memory
SHAPES = {
    "voc": ((1, 21, 512, 512), 0.89, False),
    "ade20k": ((1, 150, 512, 683), 0.92, False),
    "ade20k_last": ((1, 150, 512, 683), 0.92, True),
    "cityscapes": ((1, 19, 1024, 2048), 0.43, False),
    "cityscapes_last": ((1, 19, 1024, 2048), 0.43, True),
    "batch": ((16, 21, 512, 512), 0.89, False),
    "binary": ((8, 2, 512, 512), 0.0, False),
    "volume": ((2, 2, 128, 256 * 256), 0.0, False),
    "small": ((1, 21, 32, 32), 0.5, False),
    "tiny": ((1, 2, 8, 8), 0.0, False),
}
CACHE = 2**28  # bytes of maps that calls rotate among: several times the level-2 cache
COMPARED = 2**27  # larger maps are not compared with the CPU's labels


def make_maps(name: str) -> list[Tensor]:
    """Maps of one kind on the device, shifted copies of each other."""
    import torch

    shape, pruned, last = SHAPES[name]
    one = realistic_map((1, *shape[1:]), pruned).cuda()
    prob = torch.cat([one.roll(17 * k, -1) for k in range(shape[0])])
    layout = torch.channels_last if last else torch.contiguous_format
    copies = min(64, max(2, -(-CACHE // (prob.numel() * prob.element_size()))))
    maps = [prob.roll(31 * k, -1).contiguous(memory_format=layout) for k in range(copies)]
    return [m.unflatten(-1, (256, 256)) for m in maps] if name == "volume" else maps


@contextlib.contextmanager
def settings(variant: str) -> Iterator[None]:
    """The constants of rankseg_rma.py as the variant says, until the end of the block."""
    import rankseg_rma as module

    before = {name: value for name, value in vars(module).items() if name.startswith("FUSED")}
    changed = {**before, "FUSED_TILES": dict(module.FUSED_TILES)}
    for part in filter(None, variant.split(",")):
        key, value = part.split("=")
        if key in module.FUSED_TILES:
            elements, warps = value.split(":")
            changed["FUSED_TILES"][key] = (int(elements), int(warps))
        elif isinstance(before.get(key), int):
            changed[key] = int(value)
        else:
            raise ValueError(f"rankseg_rma.py has no whole number FUSED... and no kernel named {key}")
    try:
        vars(module).update(changed)
        yield
    finally:
        vars(module).update(before)


def build_rules(prob: Tensor, args: argparse.Namespace) -> dict[str, tuple[str, Callable[[Tensor], object]]]:
    """What is timed: names -> a variant of the settings, and a function of the map."""
    import torch

    from rankseg_rma import rankseg_rma

    def package(name: str, metric: str) -> Callable[[Tensor], object]:
        return lambda p: build_package_rules(p, metric)[name]()

    rules: dict[str, tuple[str, Callable[[Tensor], object]]] = {
        "max(1)": ("", lambda p: p.max(1)),
        "argmax(1)": ("", lambda p: p.argmax(1)),
        "amax (one read)": ("", lambda p: p.amax()),
    }
    half = torch.channels_last if prob.dim() == 4 and prob.stride(1) == 1 else torch.contiguous_format
    for metric in args.metrics:
        rules[f"ours {metric}"] = ("", lambda p, m=metric: rankseg_rma(p, m))
        for variant in args.variant:
            rules[f"ours {metric} {variant}"] = (variant, rules[f"ours {metric}"][1])
        if args.only == "ours":
            continue
        rules[f"ours {metric} masks"] = ("", lambda p, m=metric: rankseg_rma(p, m, allow_overlap=True))
        rules[f"ours {metric} plain"] = (f"FUSED={2**62}", rules[f"ours {metric}"][1])
        if prob.dim() == 4:
            rules[f"sort-based {metric}"] = ("", lambda p, m=metric: on_device(sort_rma, p, m))
        for name in build_package_rules(prob, metric):
            rules[name] = ("", package(name, metric))
    if args.half:
        halves = {id(prob): prob.half().contiguous(memory_format=half)}
        rules["ours dice float16, one map"] = ("", lambda p: rankseg_rma(halves[id(prob)]))
    return rules


def on_device(function: Callable, prob: Tensor, *options: object) -> object:
    """A function that makes its tensors where PyTorch does by default."""
    import torch

    with torch.device(prob.device):
        return function(prob, *options)


def time_rule(rule: Callable[[Tensor], object], maps: list[Tensor], budget: float) -> tuple[float, float, int]:
    """Median seconds of a call by events and by the host, and peak bytes allocated, output included."""
    import torch

    for prob in maps[:3]:
        rule(prob)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rule(maps[0])
    peak = torch.cuda.max_memory_allocated() - before
    events, walls, begun, turn = [], [], time.perf_counter(), 0
    while turn < 5 or (turn < 200 and time.perf_counter() - begun < budget):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        wall = time.perf_counter()
        start.record()
        rule(maps[turn % len(maps)])
        end.record()
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        events.append(start.elapsed_time(end) / 1e3)
        turn += 1
    return statistics.median(events), statistics.median(walls), peak


def print_kernels(rule: Callable[[Tensor], object], maps: list[Tensor]) -> None:
    """Time on the device of each kernel of a call, the mean of several calls."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    calls = 20
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as run:
        for turn in range(calls):
            rule(maps[turn % len(maps)])
        torch.cuda.synchronize()
    rows = [(e.self_device_time_total, e.count, e.key) for e in run.key_averages() if e.device_type.name == "CUDA"]
    total = sum(row[0] for row in rows)
    print(f"  on the device {total / calls:.1f} us a call:")
    for spent, count, key in sorted(rows, reverse=True)[:12]:
        print(f"    {spent / calls:8.1f} us {count / calls:5.1f} x  {key[:70]}")


def count_different(prob: Tensor) -> str:
    """Pixels whose label on the device is not the CPU's."""
    from rankseg_rma import rankseg_rma

    if prob.numel() > COMPARED:
        return "not compared with the CPU"
    different = (rankseg_rma(prob).cpu() != rankseg_rma(prob.cpu())).sum().item()
    return f"{different} of {prob[:, 0].numel()} labels are not the CPU's"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--metrics", nargs="+", choices=("dice", "iou"), default=["dice", "iou"])
    parser.add_argument("--only", choices=("ours", "all"), default="all", help="ours: no other rules than max, argmax")
    parser.add_argument("--variant", action="append", default=[], help="constants to try; may be given several times")
    parser.add_argument("--half", action="store_true", help="also a float16 map")
    parser.add_argument("--kernels", action="store_true", help="time of every kernel of ours")
    parser.add_argument("--budget", type=float, default=0.4, help="seconds for each rule and shape")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace) -> dict:
    """One kind of map -> its table, printed, as a record."""
    import torch

    maps = make_maps(name)
    size = maps[0].numel() * maps[0].element_size()
    print(f"\n{name} {tuple(maps[0].shape)}, {size / 1e6:.1f} MB, {len(maps)} maps; {count_different(maps[0])}")
    print("| rule | ms | ms, host | x max(1) | GB/s of one read | peak extra MB | of the input |\n|" + "---|" * 7)
    rows = {}
    for rule_name, (variant, rule) in build_rules(maps[0], args).items():
        with settings(variant):
            try:
                rows[rule_name] = time_rule(rule, maps, args.budget)
            except torch.cuda.OutOfMemoryError:
                print(f"| {rule_name} | out of memory |")
                continue
            event, wall, peak = rows[rule_name]
            ratio = event / rows["max(1)"][0]
            print(
                f"| {rule_name} | {1e3 * event:.3f} | {1e3 * wall:.3f} | {ratio:.2f} | {size / event / 1e9:.0f} "
                f"| {peak / 1e6:.2f} | {peak / size:.3f} |",
                flush=True,
            )
            if args.kernels and rule_name.startswith("ours") and "plain" not in rule_name:
                print_kernels(rule, maps)
    return {"name": name, "shape": list(maps[0].shape), "bytes": size, "rules": rows}


def main() -> None:
    args = parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmark_rules_cuda.py needs a CUDA device; benchmark_rules.py measures on a CPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with torch.no_grad():
        results = [measure(name, args) for name in args.shapes]
    if args.output is not None:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
