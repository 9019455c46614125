"""The fused kernels of rankseg_rma.py in Triton's interpreter, on CPU tensors, against the CPU's own results.

    python tests/rules/interpret_fused.py [--all]             # those of rankseg_rma
    python tests/rules/interpret_fused.py --levels [--all]    # those of rankseg_levelset
    python tests/rules/interpret_fused.py --maps FILE.npy     # those of rankseg_levelset on (B, C, *spatial) maps

A program of its own, because Triton decides when it is imported whether it interprets. It ends with the number of
comparisons, or with an AssertionError.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import os
import sys
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from triton.runtime import interpreter

import rankseg_rma as module
from rankseg_rma import rankseg_levelset, rankseg_rma

_call = interpreter.InterpretedFunction.__call__
_prepared = {module.__name__}


def call_helper(self, *args, **options):
    """As the interpreter's own, which prepares the language at every call of a helper; once a module is enough."""
    if self.fn.__module__ in _prepared:
        return self.rewrite()(*args, **options)
    _prepared.add(self.fn.__module__)
    return _call(self, *args, **options)


interpreter.InterpretedFunction.__call__ = call_helper

METHODS, UNASSIGNED = ("rma_score", "weight_prob", "prob"), ("max_score", "first", -1)
LAUNCHED = (
    "_survey", "_begin", "_tally", "_advance", "_mask", "_claim", "_contend",
    "_peaks", "_weigh", "_seen", "_count", "_grow", "_divide", "_decide",
)  # fmt: skip
compared = 0


def random_map(*shape: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).softmax(1)


def uneven_map(*shape: int) -> torch.Tensor:
    """Smooth regions of classes that are there, may be there and hardly are."""
    coarse = torch.randn(*shape[:2], 4, 6, generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.interpolate(3 * coarse, shape[2:], mode="bilinear")
    return (smooth - 1.2 * torch.arange(shape[1]).view(1, -1, 1, 1)).softmax(1)


def random_valid(prob: torch.Tensor) -> torch.Tensor:
    return torch.rand(prob.shape[0], *prob.shape[2:], generator=torch.Generator().manual_seed(1)) > 0.2


def on_kernels(rule, prob: torch.Tensor, **options):
    """As the rule, but by the kernels: a CPU tensor passes for one on a device."""
    patched = {"_on_cpu": lambda _: False, "_is_fused": lambda _: module._load_triton()}
    before = {name: getattr(module, name) for name in patched}
    device = torch.cuda.device
    try:
        vars(module).update(patched)
        torch.cuda.device = lambda _: contextlib.nullcontext()
        return rule(prob, **options)
    finally:
        vars(module).update(before)
        torch.cuda.device = device


def fused(prob: torch.Tensor, **options):
    return on_kernels(rankseg_rma, prob, return_tau=True, **options)


def same(got, expected, what: object) -> None:
    global compared
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype, what
        assert ours.shape == theirs.shape, what
        assert torch.equal(ours, theirs), f"{what}: {int((ours != theirs).sum())} of {ours.numel()} differ"
    compared += 1


def compare(prob: torch.Tensor, **options) -> None:
    what = (tuple(prob.shape), prob.stride(), prob.dtype, {k: v for k, v in options.items() if k != "valid"})
    same(fused(prob, **options), rankseg_rma(prob, return_tau=True, **options), what)


def compare_levels(prob: torch.Tensor, **options) -> None:
    """As on a CPU, but for pixels that the rounding of a sum puts into another level: none of a small map."""
    global compared
    expected, got = rankseg_levelset(prob, **options), on_kernels(rankseg_levelset, prob, **options)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    different = int((got != expected).sum())
    given = {k: v for k, v in options.items() if k != "valid"}
    assert different <= got.numel() / 1000, f"{tuple(prob.shape)} {prob.dtype} {given}: {different} pixels differ"
    compared += 1


def compare_tables(prob: torch.Tensor, metric: str) -> None:
    """The growths that labels are looked up in, of one image."""
    table, kept = module._level_table, []

    def note(*args):
        kept.append(table(*args))
        return kept[-1]

    with mock.patch.object(module, "_level_table", note):
        expected = rankseg_levelset(prob, metric)
    assert module._load_triton()
    job = module._FusedLevels(prob, None, module._check_options(metric, "rma_score", "max_score", "holders", 0.1), 0)
    out = torch.empty_like(expected)
    job.survey()
    job.finish(out, False, False)
    names = job.names[: int(job.held[0])]
    assert 1 < len(names) < len(prob[0])
    gains = job.gains[: job.rows * module.FUSED_LEVELS].view(job.rows, -1)[names, : module.LEVELS]
    torch.testing.assert_close(gains, kept[0], rtol=1e-9, atol=1e-15)
    same([out], [expected], metric)


def compare_labels(prob: torch.Tensor, metric: str, valid: torch.Tensor | None, pruning_prob: float = 0.1) -> None:
    """Every choice of how sets become labels; the sets are found once for all of them."""
    assert module._load_triton()
    rule = module._check_options(metric, "prob", "first", "holders", pruning_prob)
    job = module._Fused(prob, valid, rule, 0)
    job.survey()
    job.refine()
    assert module._is_settled(job.space, prob)
    out = torch.empty(prob.shape[0], job.size, dtype=torch.int64)
    for method, unassigned, contested in itertools.product(METHODS, UNASSIGNED, ("holders", "all")):
        label = 0 if unassigned == "first" else unassigned
        job.rule = dataclasses.replace(rule, method=method, unassigned=label, contested=contested)
        job.shared_n.zero_()
        job.shared_s.zero_()
        job.label(out.fill_(-99))
        options = {"to_nonoverlap_method": method, "unassigned": unassigned, "contested": contested}
        expected = rankseg_rma(
            prob, metric, valid=valid, pruning_prob=pruning_prob, binary_threshold=False, return_tau=True, **options
        )
        same((out.view_as(expected[0]), job.tau), expected, (tuple(prob.shape), metric, options))


def strided(prob: torch.Tensor) -> list[torch.Tensor]:
    """The same (B, C, H, W) map channels-last, as a crop, with classes outermost, and every second column."""
    *outer, height, width = prob.shape
    wide = torch.full((*outer, height + 3, 2 * width + 5), 7.0, dtype=prob.dtype)
    wide[..., 1 : height + 1, 2 : width + 2] = prob
    apart = torch.full((*outer, height, 2 * width), 7.0, dtype=prob.dtype)
    apart[..., ::2] = prob
    return [
        prob.contiguous(memory_format=torch.channels_last),
        wide[..., 1 : height + 1, 2 : width + 2],
        prob.transpose(0, 1).contiguous().transpose(0, 1),
        apart[..., ::2],
    ]


def check_every_day() -> None:
    prob = random_map(1, 5, 13, 73)
    for metric in ("dice", "iou"):
        compare_labels(prob, metric, random_valid(prob) if metric == "iou" else None)
    peaks = prob.amax(-1).amax(-1)[0].sort().values
    compare_labels(prob, "dice", None, peaks[2].item())  # three of five classes are pruned
    for layout in strided(prob)[:2]:
        compare(layout)
    compare(prob, allow_overlap=True, valid=random_valid(prob))
    compare(random_map(2, 2, 11, 13))
    compare(random_map(1, 150, 7, 9), pruning_prob=1.0)
    compare(prob.half().contiguous(memory_format=torch.channels_last), opt_metric="iou")
    compare(random_map(1, 3, 4, 5, 6).double())
    check_range(random_map(1, 3, 1100), 1, float("nan"))
    check_many_passes(random_map(1, 3, 40, 55))


def check_range(prob: torch.Tensor, c: int, value: float, rule=rankseg_rma) -> None:
    """The kernels refuse what the CPU refuses, with the same words; rankseg_levelset's CPU names one class's range."""
    global compared
    prob[-1, c].view(-1)[-1] = value
    said = []
    for solve in (on_kernels, lambda rule, prob: rule(prob)):
        try:
            solve(rule, prob)
        except ValueError as error:
            said.append(str(error) if rule is rankseg_rma else str(error).split(" from ")[0])
    assert len(said) == 2, (value, prob.dtype, said)
    assert said[0] == said[1], said
    compared += 1


def check_many_passes(prob: torch.Tensor) -> None:
    """A bad start and one pass at a time end at the same sets: the host goes on until all have settled."""
    before = module.FUSED_PASSES, module.FUSED_SAMPLE
    module.FUSED_PASSES, module.FUSED_SAMPLE = 1, 1
    try:
        compare(prob)
    finally:
        module.FUSED_PASSES, module.FUSED_SAMPLE = before


class Repeated:
    """What Triton gives for a launch on a device: it can be launched again, with addresses instead of tensors."""

    function, packed_metadata, count = 11, (4, 1, 0), 0

    def __init__(self, kernel, grid: tuple[int], args: tuple, options: dict) -> None:
        self.kernel, self.grid, self.args, self.options = kernel, grid, args, options

    def run(self, x, y, z, stream, function, metadata, described, enter, leave, *args) -> None:
        assert (y, z, stream, function, metadata) == (1, 1, 7, self.function, self.packed_metadata)
        assert described is enter is leave is None
        assert len(args) == len(self.kernel.arg_names)
        launched = [self.at(old, new) for old, new in zip(self.args, args)]
        self.kernel.kernel[(x,)](*launched, **self.options)
        Repeated.count += 1

    def at(self, old, new: int):
        """A tensor at the address `new`, of as many bytes as `old` reaches over, or the number that it is."""
        if not isinstance(old, torch.Tensor):
            assert module._variant(new) == module._variant(old)
            return new
        elements = 1 + sum((size - 1) * stride for size, stride in zip(old.shape, old.stride()))
        found = torch.frombuffer((ctypes.c_byte * (elements * old.element_size())).from_address(new), dtype=torch.uint8)
        return found.view(old.dtype)


class Launched:
    """A kernel whose launches give what can be repeated."""

    def __init__(self, kernel) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.kernel[grid](*args, **options)
            return Repeated(self, grid, args, options)

        return launch


@contextlib.contextmanager
def repeatable():
    """Inside, launches can be repeated without Triton."""
    assert module._load_triton()
    kernels = {name: getattr(module, name) for name in module._KERNELS if name in LAUNCHED}
    before = module._stream
    try:
        for name, kernel in kernels.items():
            setattr(module, name, Launched(kernel))
        module._stream = lambda device: 7
        yield
        assert module.FUSED_DIRECT
    finally:
        vars(module).update(kernels)
        module._stream = before
        module.FUSED_PASSES, module.FUSED_SAMPLE = 3, 4096
        module._PLANS.clear()
        module._COMPILED.clear()


def check_repeated() -> None:
    """Launches that are repeated for other maps of a kind give what those of the first one gave, without Triton."""
    with repeatable():
        cases = (
            ((1, 5, 9, 40), {}),
            ((2, 2, 7, 9), {"opt_metric": "iou"}),
            ((1, 3, 40), {"allow_overlap": True}),
            ((1, 3, 4, 2, 5, 3), {"contested": "all", "unassigned": -1}),
        )
        for shape, options in cases:
            for settings in ((4, 4096), (1, 1)):  # in the second, passes are launched until all rows have settled
                module.FUSED_PASSES, module.FUSED_SAMPLE = settings
                for seed in range(3):
                    prob = random_map(*shape, seed=seed)
                    if prob.dim() == 6:  # strides for which the map is copied
                        prob = prob.permute(0, 1, 5, 4, 3, 2).contiguous().permute(0, 1, 5, 4, 3, 2)
                    count = Repeated.count
                    compare(prob, valid=random_valid(prob) if prob.dim() == 3 else None, **options)
                    assert Repeated.count > count or seed == 0, (shape, seed)
        compare(random_map(1, 5, 12, 60))  # of another size, but the same variants of the kernels
        assert len(module._PLANS) == 2 * len(cases) + 1


def check_repeated_levels() -> None:
    with repeatable():
        for shape, options in (((2, 5, 9, 40), {}), ((2, 2, 7, 9), {}), ((1, 3, 40), {"allow_overlap": True})):
            for seed in range(2):
                prob, count = random_map(*shape, seed=seed), Repeated.count
                compare_levels(prob, valid=random_valid(prob) if seed or prob.dim() == 3 else None, **options)
                compare_levels(prob, **options)
                assert Repeated.count > count, (shape, seed)
        assert len(module._PLANS) == 6


def check_levels() -> None:
    for metric in ("iou", "dice"):
        compare_tables(uneven_map(1, 7, 40, 60), metric)
    prob = random_map(1, 5, 13, 73)
    for layout in strided(prob)[:2]:
        compare_levels(layout)
    check_repeated_levels()
    wide = random_map(2, 3, 20, 21, scale=9.0).half()
    compare_levels(wide, opt_metric="dice", valid=random_valid(wide))
    for dtype, metric in ((torch.float32, "iou"), (torch.float64, "dice"), (torch.bfloat16, "iou")):
        two = random_map(2, 2, 11, 13).to(dtype)
        compare_levels(two, opt_metric=metric, valid=random_valid(two) if metric == "iou" else None)
        compare_levels(two, opt_metric=metric, allow_overlap=True, valid=random_valid(two), pruning_prob=0)
    compare_levels(random_map(1, 150, 7, 9), pruning_prob=0.5)
    check_few_classes()
    with_few_samples(random_map(2, 4, 40, 55))
    for value in (float("nan"), -0.25, 1.25):
        check_range(random_map(1, 3, 500), 1, value, rankseg_levelset)


def check_few_classes() -> None:
    """No class above `pruning_prob`, one, none at all, equal ones, and no valid pixel."""
    faint = torch.full((2, 25, 40), 0.03)
    faint[0, 7], faint[0, 9], faint[1, 3, 5] = 0.05, 0.04, 0.97
    compare_levels(faint)
    compare_levels(torch.zeros(1, 3, 10))
    compare_levels(torch.full((1, 4, 30), 0.25))
    compare_levels(torch.nn.functional.one_hot(torch.arange(60).view(1, 60) % 3, 4).movedim(-1, 1).float())
    compare_levels(random_map(1, 3, 50), valid=torch.zeros(1, 50, dtype=torch.bool))


def with_few_samples(prob: torch.Tensor) -> None:
    """On a grid and into several tables, as of a larger image."""
    before = module.LEVEL_SAMPLES, module.FUSED_SPREAD, module.FUSED_SPAN
    module.LEVEL_SAMPLES, module.FUSED_SPREAD, module.FUSED_SPAN = 100, 500, 512
    try:
        compare_levels(prob)
        compare_levels(prob, valid=random_valid(prob))
        compare_levels(prob.contiguous(memory_format=torch.channels_last))
    finally:
        module.LEVEL_SAMPLES, module.FUSED_SPREAD, module.FUSED_SPAN = before


def check_all_levels() -> None:
    for shape in ((2, 21, 20, 27), (1, 3, 90, 117), (2, 5, 33), (1, 40, 9, 8), (3, 2, 41, 7), (1, 3, 4, 5, 6)):
        for scale, metric in itertools.product((0.2, 3.0, 9.0), ("dice", "iou")):
            prob = random_map(*shape, scale=scale)
            compare_levels(prob, opt_metric=metric, valid=random_valid(prob) if scale == 3.0 else None)
    for dtype, classes in itertools.product(module.DTYPES, (2, 5, 33)):
        prob = random_map(2, classes, 30, 31).to(dtype)
        for layout in [prob, *strided(prob)]:
            compare_levels(layout)
            compare_levels(layout, allow_overlap=True, valid=random_valid(prob))
        for value in (float("nan"), -float("nan"), float("inf"), -float("inf"), -0.25, 1.25):
            check_range(random_map(2, classes, 50, 30).to(dtype), 1, value, rankseg_levelset)
    compare_levels(random_map(1, 3, 320, 330))  # on a grid


def check_all() -> None:
    for shape in ((2, 21, 20, 27), (1, 3, 90, 117), (2, 5, 33), (1, 150, 9, 8), (3, 2, 41, 7), (1, 3, 4, 5, 6)):
        for scale, metric in itertools.product((0.2, 3.0, 9.0), ("dice", "iou")):
            prob = random_map(*shape, scale=scale)
            compare_labels(prob, metric, random_valid(prob) if scale == 3.0 else None)
    for dtype, metric in itertools.product(module.DTYPES, ("dice", "iou")):
        for classes in (2, 5, 33):
            prob = random_map(2, classes, 30, 31).to(dtype)
            for layout in [prob, *strided(prob)]:
                compare(layout, opt_metric=metric)
                compare(layout, opt_metric=metric, allow_overlap=True, valid=random_valid(prob))
        for value in (float("nan"), -float("nan"), float("inf"), -float("inf"), -0.25, 1.25):
            check_range(random_map(2, 3, 50, 30).to(dtype), 2, value)
            check_range(random_map(2, 2, 50, 30).to(dtype), 0, value)
        edge = torch.full((1, 3, 2), 0.1, dtype=dtype)
        compare(edge)
        edge[0, 1, 0] = 1 + 2 * torch.finfo(dtype).eps
        edge[0, 2, 0] = -0.0
        compare(edge)
    for classes, size, value in itertools.product((1, 2, 3), (1, 2, 100), (0.0, 1.0)):
        compare(torch.full((1, classes, size), value), allow_overlap=True, pruning_prob=0.0)
        if classes > 1:
            compare(torch.full((1, classes, size), value), opt_metric="iou")
    for shape in ((1, 2, 1), (1, 3, 1), (4, 7, 1, 1), (1, 1100, 3)):
        compare(random_map(*shape), binary_threshold=False, contested="all")
    prob = random_map(1, 4, 130, 200)
    compare(prob)
    compare(prob, valid=torch.zeros(1, 130, 200, dtype=torch.bool))
    compare(torch.cat([random_map(1, 4, 60), torch.full((1, 4, 60), 0.05)]), contested="all")
    check_many_passes(random_map(2, 21, 50, 60))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--maps" in sys.argv:
        compare_levels(torch.from_numpy(np.load(sys.argv[2])))
    elif "--levels" in sys.argv:
        check_levels()
        if "--all" in sys.argv:
            check_all_levels()
    else:
        check_repeated()
        check_every_day()
        if "--all" in sys.argv:
            check_all()
    print(f"{compared} comparisons")
