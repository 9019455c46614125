"""The part `rules` of scripts/check_gpu.py: the labels of the rules on CUDA against those of the CPU, and the time and
peak memory of `rankseg_rma` beside argmax, the plain maximum, the other rules, the authors' package and a sort."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exp.rules.dep import rankseg_dep
from exp.rules.dep_levels import rankseg_dep_levels
from rankseg_rma import rankseg_levelset, rankseg_rma
from scripts.benchmarks.benchmark_rules import PRUNING_PROB, SHAPES, realistic_map, sort_rma

if TYPE_CHECKING:
    from scripts.check_gpu import Check

# name: shape, the share of classes whose probability never exceeds 0.1, milliseconds that the rule should stay below
MAPS = {
    name: (*SHAPES[name], {"ade20k": 1.0, "cityscapes": 1.0, "voc": 0.3}.get(name)) for name in SHAPES if SHAPES[name]
}
MAPS |= {
    "volume, 2 classes": ((1, 2, 128, 256, 256), 0.0, None),
    "volume, 8 classes": ((1, 8, 64, 128, 128), 0.4, None),
    "small": ((1, 21, 64, 64), 0.5, None),
    "tiny": ((1, 2, 16, 16), 0.0, None),
}
ORDER = ("ade20k", "cityscapes", "voc", "volume, 2 classes", "small", "tiny", "binary", "volume, 8 classes")
BIG = ORDER[:3]
OTHERWISE = (("iou", torch.float32), ("dice", torch.float16), ("dice", torch.bfloat16))  # than Dice in float32
CACHE = 2**28  # bytes of copies of a map that calls take in turn, so that none of them finds its map in the L2 cache
SAME = 1e-6  # by how much the objective of two labellings may differ, relatively, where only rounding sets them apart
FEW = 1e-3  # of the pixels, in which they may
ONCE = ("dep", "dep_levels")  # are timed on the first map alone
SLOW = (*ONCE, "rankseg", "sort")  # are called fewer times
MAX_TIMES_MAXIMUM, MIN_TIMES_SORT = 3.0, 10.0
OPTIONS = (  # what else the rule can be asked for, on a small map
    {"allow_overlap": True},
    {"return_tau": True},
    {"unassigned": "first"},
    {"unassigned": 3},
    {"to_nonoverlap_method": "prob"},
    {"to_nonoverlap_method": "weight_prob"},
    {"contested": "all", "unassigned": "first"},
    {"pruning_prob": 0.0},
    {"binary_threshold": False},
)


def make_map(shape: tuple[int, ...], pruned: float) -> Tensor:
    """(B, C, *spatial) probabilities; a volume is a tall picture, folded."""
    batch, classes, *spatial = shape
    height = torch.tensor(spatial[:-1]).prod().item()
    return realistic_map((batch, classes, height, spatial[-1]), pruned).reshape(shape)


def objective(prob: Tensor, labels: Tensor, metric: str) -> float:
    """(B, C, *spatial) on the CPU and (B, *spatial) labels -> sum over images and classes of the expected metric."""
    flat, total = prob.flatten(2).double(), 0.0
    for image, label in zip(flat, labels.flatten(1)):
        n = torch.bincount(label, minlength=len(image)).double()
        s = torch.zeros_like(n).index_add_(0, label, image.gather(0, label[None])[0])
        mu = image.sum(1)
        values = 2 * s / (n + mu + 1) if metric == "dice" else s / (n + mu - s).clamp(min=1e-30)
        total += values[1:].sum().item() if len(image) == 2 else values.sum().item()
    return total


def compare(check: Check, name: str, prob: Tensor, metric: str, dtype: torch.dtype) -> None:
    """Labels on the device against the CPU's, on the same values."""
    cast = prob.to(dtype)
    expected, got = rankseg_rma(cast, metric), rankseg_rma(cast.to(check.device), metric).cpu()
    differing = (expected != got).sum().item()
    row = {
        "map": name,
        "shape": "x".join(map(str, prob.shape)),
        "type": str(dtype).removeprefix("torch."),
        "metric": metric,
    }
    row |= {"pixels": expected.numel(), "pixels that differ": differing, "objective: device - CPU, relative": None}
    if differing:
        own, other = objective(cast, got, metric), objective(cast, expected, metric)
        change = row["objective: device - CPU, relative"] = (own - other) / other
        if change < -SAME or differing > FEW * expected.numel():
            check.wrong(f"{name} {row['type']} {metric}: {differing} pixels differ, objective by {change:.2e}")
    check.row("Labels against the CPU's", **row)


def compare_levelset(check: Check, name: str, prob: Tensor, metric: str, dtype: torch.dtype) -> None:
    """Labels of `rankseg_levelset` on the device against the CPU's, on the same values."""
    cast = prob.to(dtype)
    expected, got = rankseg_levelset(cast, metric), rankseg_levelset(cast.to(check.device), metric).cpu()
    row = {"map": name, "type": str(dtype).removeprefix("torch."), "metric": metric, "pixels": expected.numel()}
    row["pixels that differ"] = differing = (expected != got).sum().item()
    if differing > FEW * expected.numel():
        check.wrong(f"{name} {row['type']} {metric} rankseg_levelset: {differing} of {expected.numel()} pixels differ")
    check.row("Labels of rankseg_levelset against the CPU's", **row)


def compare_options(check: Check) -> None:
    """Every option, on small maps of several and of two classes, with a mask and in every layout, against the CPU."""
    wrong = 0
    tried = itertools.product((5, 2), ("dice", "iou"), OPTIONS, (False, True), (False, True))
    for classes, metric, options, masked, last in tried:
        if options.get("unassigned", 0) == 3 and classes == 2:
            continue
        prob = realistic_map((2, classes, 40, 56), 0.2 if classes > 2 else 0.0, seed=classes)
        valid = torch.rand(2, 40, 56, generator=torch.Generator().manual_seed(0)) < 0.9 if masked else None
        given = prob.contiguous(memory_format=torch.channels_last) if last else prob
        expected = rankseg_rma(given, metric, valid=valid, **options)
        on_device = given.to(check.device)
        got = rankseg_rma(on_device, metric, valid=None if valid is None else valid.to(check.device), **options)
        pairs = zip(expected, got) if isinstance(expected, tuple) else [(expected, got)]
        share = max((one != other.cpu()).double().mean().item() for one, other in pairs)
        if share > (0.5 if options.get("return_tau") else FEW):  # sizes differ by some pixels where labels do
            wrong += 1
            check.wrong(
                f"{classes} classes, {metric}, {options}, mask {masked}, channels_last {last}: {share:.2%} differ"
            )
    check.say(f"options: {wrong} of all combinations give other labels than on the CPU")


def rules_for(prob: Tensor, metric: str) -> dict[str, Callable[[Tensor], object]]:
    """What is timed on maps like `prob`, by name."""
    rules: dict[str, Callable[[Tensor], object]] = {
        "argmax(1)": lambda p: p.argmax(1),
        "max(1)": lambda p: p.max(1),
        "ours": lambda p: rankseg_rma(p, metric),
        "levelset": lambda p: rankseg_levelset(p, metric),
    }
    if prob.dtype == torch.float32:
        if metric == "dice":
            rules |= {"dep": rankseg_dep, "dep_levels": rankseg_dep_levels}
        rules |= package_rules(prob, metric)
        rules["sort"] = lambda p: sort_on(p, metric)
    return rules


def sort_on(prob: Tensor, metric: str) -> Tensor:
    """`sort_rma` with what it makes on the map's device."""
    with torch.device(prob.device):
        return sort_rma(prob, metric)


def package_rules(prob: Tensor, metric: str) -> dict[str, Callable[[Tensor], object]]:
    """The authors' package, and with its fused kernels (of Dice alone); two classes by the foreground."""
    try:
        from rankseg import RankSEG
    except ImportError:
        return {}
    binary, rules = prob.shape[1] == 2, {}
    for name, screening in (("rankseg", False), ("rankseg, fused", "auto")):
        solver = RankSEG(
            metric=metric,
            solver="RMA",
            output_mode="multilabel" if binary else "multiclass",
            pruning_prob=PRUNING_PROB,
            safe_screening=screening,
        )
        if screening is False or metric == "dice":
            rules[name] = lambda p, solver=solver: solver.predict(p[:, 1:] if binary else p)
    return rules


def time_on(device: torch.device, rule: Callable[[Tensor], object], maps: list[Tensor], repeats: int) -> float:
    """Median milliseconds a call, from an idle device to an idle device, the calls' launches included."""
    if device.type != "cuda":
        rule(maps[0])
        return 0.0
    for prob in maps[:2]:
        rule(prob)
    times = []
    for i in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        rule(maps[i % len(maps)])
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_on(device: torch.device, rule: Callable[[Tensor], object], prob: Tensor) -> float:
    """MB that a call holds at most beside its map, its result included."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = rule(prob)
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy on the device: what no rule can read its map faster than."""
    if device.type != "cuda":
        return 1e9
    large = torch.randint(0, 2**31 - 1, (2**29,), dtype=torch.int32, device=device)
    target = torch.empty_like(large)
    return 2 * large.nbytes / (time_on(device, target.copy_, [large], 10) / 1000)


def measure(
    check: Check,
    name: str,
    prob: Tensor,
    metric: str,
    dtype: torch.dtype,
    aim: float | None = None,
    left_out: tuple[str, ...] = (),
) -> None:
    """Time and memory of the rules on one map."""
    cast = prob.to(check.device).to(dtype)
    copies = min(16, max(1, -(-CACHE // cast.nbytes)))
    maps = [cast.clone() for _ in range(copies)]
    found = {}
    for rule_name, rule in rules_for(cast, metric).items():
        if rule_name in left_out:
            continue
        try:
            slow = rule_name in SLOW
            found[rule_name] = time_on(check.device, rule, maps, 10 if slow else 50), peak_on(check.device, rule, cast)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            if rule_name in ("ours", "levelset", *ONCE):
                check.wrong(f"{name}: {type(error).__name__}: {reason}")
            else:
                check.say(f"{rule_name} failed on {name}: {type(error).__name__}: {reason}")
    facts = {"map": name, "type": str(dtype).removeprefix("torch."), "metric": metric, "MB": cast.nbytes / 1e6}
    times = {rule: value for rule, (value, _) in found.items()}
    row = {f"{rule}, ms": value for rule, value in times.items()}
    row |= {
        f"{rule}, extra MB": value
        for rule, (_, value) in found.items()
        if rule in ("argmax(1)", "ours", "levelset", "rankseg, fused")
    }
    check.row("Time and peak memory", **facts, **row)
    if dtype == torch.float32 and "ours" in times and check.device.type == "cuda":
        report_aims(check, name, metric, times, aim)


def report_aims(check: Check, name: str, metric: str, times: dict[str, float], aim: float | None) -> None:
    """Say which of the aims were met; missing one is slow, not wrong."""
    ours, row = times["ours"], {"map": name, "metric": metric, "ours, ms": times["ours"], "aim, ms": aim}
    row["aim met"] = None if aim is None else str(ours <= aim)
    row["x max(1)"] = ours / times["max(1)"]
    row["at most 3"] = str(row["x max(1)"] <= MAX_TIMES_MAXIMUM)
    if "sort" in times:
        row["sort / ours"] = times["sort"] / ours
        row["at least 10"] = str(row["sort / ours"] >= MIN_TIMES_SORT)
    authors = [times[rule] for rule in ("rankseg", "rankseg, fused") if rule in times]
    if authors:
        row["authors' fastest / ours"] = min(authors) / ours
    check.row("Against the aims", **row)


def check_map(check: Check, name: str, prob: Tensor, metric: str, dtype: torch.dtype) -> None:
    """Labels of both rules, then times."""
    compare(check, name, prob, metric, dtype)
    compare_levelset(check, name, prob, metric, dtype)
    measure(check, name, prob, metric, dtype, MAPS[name][2], () if name == ORDER[0] else ONCE)
    print(f"{name} {metric} {dtype}: done, {check.left():.0f} s are left", flush=True)


def check_rules(check: Check) -> None:
    """All maps in float32 for Dice; the big ones otherwise; all options; a very large map; the other maps otherwise."""
    rate = copy_rate(check.device)
    check.say(f"a copy on the device moves {rate / 1e12:.2f} TB/s, read and written")
    scale = 8 if check.tiny else 1
    maps: dict[str, Tensor] = {}
    for name in ORDER:
        if check.left() < 5:
            check.say(f"no time was left for {name} and what follows")
            return
        shape, pruned, _ = MAPS[name]
        maps[name] = make_map((*shape[:2], *(max(8, side // scale) for side in shape[2:])), pruned)
        check_map(check, name, maps[name], "dice", torch.float32)
    if not check_otherwise(check, {name: maps[name] for name in ORDER if name in BIG}):
        return
    compare_options(check)
    size = (40, 60) if check.tiny else (2000, 3000)
    large = torch.randn(1, 150, *size, device=check.device).mul_(4).softmax(1)
    measure(check, "150 classes, 2000x3000", large, "dice", torch.float32, left_out=("rankseg, fused", *SLOW))
    del large
    check_otherwise(check, {name: maps[name] for name in ORDER if name not in BIG})


def check_otherwise(check: Check, maps: dict[str, Tensor]) -> bool:
    """These maps for IoU and in the half types -> whether there was time for all."""
    for (name, prob), (metric, dtype) in itertools.product(maps.items(), OTHERWISE):
        if check.left() < 3:
            check.say(f"no time was left for {name} {metric} {dtype} and what follows")
            return False
        check_map(check, name, prob, metric, dtype)
    return True
