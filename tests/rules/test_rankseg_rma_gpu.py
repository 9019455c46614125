"""`rankseg_rma` on a CUDA device, against the labels of the CPU; its fused kernels in an interpreter elsewhere."""

import contextlib
import inspect
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rankseg_rma as module
from rankseg_rma import rankseg_levelset, rankseg_rma
from scripts.benchmarks.benchmark_rules import real_maps

ROOT = Path(__file__).resolve().parents[2]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = ((2, 21, 120, 130), (1, 150, 63, 71), (3, 2, 200, 190), (1, 5, 40, 50, 60), (1, 4, 700, 900), (2, 3, 7))
LAUNCHES = 4 + 2 * module.FUSED_PASSES  # for a map


def run_script(name: str, *flags: str, **environment: str) -> str:
    """Output of a program of this folder, or its traceback as a failure."""
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "rules" / name, *flags]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_kernels_give_the_labels_of_the_cpu_in_an_interpreter():
    assert int(run_script("interpret_fused.py").split()[0]) >= 25


@pytest.mark.long
def test_the_kernels_give_the_labels_of_the_cpu_for_every_keyword_and_layout_in_an_interpreter():
    assert int(run_script("interpret_fused.py", "--all").split()[0]) >= 400


def test_the_kernels_of_level_sets_give_the_labels_of_the_cpu_in_an_interpreter():
    assert int(run_script("interpret_fused.py", "--levels").split()[0]) >= 30


@pytest.mark.long
def test_the_kernels_of_level_sets_give_the_labels_of_the_cpu_for_every_layout_in_an_interpreter():
    assert int(run_script("interpret_fused.py", "--levels", "--all").split()[0]) >= 200


def test_the_kernels_of_level_sets_on_a_real_map(tmp_path, real_data):
    """Logits of a network on PASCAL VOC; every third pixel, for the interpreter is slow."""
    _, read = next(real_maps(real_data, 1))
    np.save(tmp_path / "map.npy", read()[..., ::3, ::3].numpy())
    assert run_script("interpret_fused.py", "--maps", str(tmp_path / "map.npy")).split()[0] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--levels",)])
def test_the_kernels_compile_for_a_gpu(tmp_path, flags):
    output = run_script("compile_fused.py", *flags, TRITON_CACHE_DIR=str(tmp_path))
    assert int(output.split()[-2]) >= (20 if flags else 40)
    assert all(int(line.split("STACK:")[1].split()[0]) <= 64 for line in output.splitlines() if "STACK:" in line)


def random_map(*shape: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).softmax(1)


def random_valid(prob: torch.Tensor) -> torch.Tensor:
    return torch.rand(prob.shape[0], *prob.shape[2:], generator=torch.Generator().manual_seed(1)) > 0.2


def host_waits(rule, prob: torch.Tensor, **options) -> int:
    """How often the host waits for the device in a call that is not the first of its kind."""
    rule(prob, **options)
    torch.cuda.synchronize()
    with warnings.catch_warnings():  # it warns that it is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="called a synchronizing") as found:
            rule(prob, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len([w for w in found if "called a synchronizing" in str(w.message)])


def extra_memory(rule, prob: torch.Tensor) -> int:
    """Bytes that such a call takes at most, beyond its labels."""
    rule(prob)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    labels = rule(prob)
    return torch.cuda.max_memory_allocated() - before - labels.nbytes


def objective(prob: torch.Tensor, sets: torch.Tensor, metric: str, valid: torch.Tensor | None) -> torch.Tensor:
    """(B, C, *spatial) map and sets -> (B, C) RMA of the expected metric, in float64."""
    p = prob.double() if valid is None else prob.double() * valid.unsqueeze(1)
    p, own = p.flatten(2), sets.flatten(2)
    n, s, mu = own.sum(-1), (p * own).sum(-1), p.sum(-1)
    return 2 * s / (n + mu + 1) if metric == "dice" else s / (n + mu - s).clamp_min(1e-300)


def compare(prob: torch.Tensor, on_device: torch.Tensor | None = None, **options) -> None:
    """The device's labels are the CPU's, but for pixels at a threshold; its sets are as good, where they differ."""
    device_map = prob.cuda() if on_device is None else on_device
    valid = options.get("valid")
    moved = {**options, "valid": None if valid is None else valid.cuda()}
    labels, tau = rankseg_rma(device_map, return_tau=True, **moved)
    expected, expected_tau = rankseg_rma(prob, return_tau=True, **options)
    assert labels.device.type == tau.device.type == "cuda"
    assert labels.shape == expected.shape
    assert labels.dtype == expected.dtype
    labels, tau = labels.cpu(), tau.cpu()
    different = (labels != expected).nonzero()
    assert len(different) <= 4 + expected.numel() // 10000, (options, len(different), different[:5].tolist())
    if len(different):
        print(f"{tuple(prob.shape)} {options}: {len(different)} pixels differ: {different[:10].tolist()}")
        keys = ("opt_metric", "valid", "pruning_prob")
        kept = {key: options[key] for key in keys if key in options}
        ours = rankseg_rma(device_map, allow_overlap=True, **{**kept, "valid": moved["valid"]}).cpu()
        theirs = rankseg_rma(prob, allow_overlap=True, **kept)
        metric = options.get("opt_metric", "dice")
        values = [objective(prob, sets, metric, valid) for sets in (ours, theirs)]
        torch.testing.assert_close(*values, rtol=0, atol=1e-6)
        assert (tau - expected_tau).abs().max() <= len(different)
    else:
        assert torch.equal(tau, expected_tau)


class Compiled:
    """Stands in for a compiled kernel: counts its launches, and fails if it is told to."""

    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.error: Exception | None = None

    def run(self, *args) -> None:
        if self.error:
            raise self.error
        self.launches.append(args)


class Kernel:
    """Stands in for one of Triton's kernels, whose launches it counts."""

    def __init__(self, names: list[str], compiled: Compiled) -> None:
        self.arg_names, self.compiled, self.count = names, compiled, 0

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.count += 1
            return self.compiled

        return launch


class TestRepeatedLaunches:
    """What is launched without Triton, with stand-ins for its kernels: no device takes part."""

    @pytest.fixture
    def compiled(self, monkeypatch) -> Compiled:
        pytest.importorskip("triton")
        if not module._load_triton():
            pytest.skip("no C compiler")
        compiled = Compiled()
        self.kernels = []
        for name in module._KERNELS:
            self.kernels.append(Kernel(list(inspect.signature(module._KERNELS[name]).parameters), compiled))
            monkeypatch.setattr(module, name, self.kernels[-1])
        runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=SimpleNamespace(calls=[]))
        replaced = {"_on_cpu": False, "_is_fused": True, "_stream": 7, "_runtime": runtime}
        for name, value in replaced.items():
            monkeypatch.setattr(module, name, lambda *_, value=value: value)
        monkeypatch.setattr(module, "_PLANS", {})
        monkeypatch.setattr(module, "_COMPILED", {})
        monkeypatch.setattr(module, "FUSED_DIRECT", True)
        monkeypatch.setattr(torch, "empty", torch.zeros)  # zero flags: all is well
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        self.compiled = compiled
        return compiled

    def solve(self, prob: torch.Tensor, rule=rankseg_rma, **options) -> tuple[int, int]:
        """Launches by way of Triton and without it."""
        before = sum(kernel.count for kernel in self.kernels), len(self.compiled.launches)
        rule(prob, **options)
        return sum(kernel.count for kernel in self.kernels) - before[0], len(self.compiled.launches) - before[1]

    def test_another_map_of_a_kind(self, compiled):
        assert self.solve(torch.zeros(1, 3, 8, 8)) == (
            6 + 1,
            LAUNCHES - 7,
        )  # in the last pass, `_advance` is another kernel
        prob = torch.zeros(1, 3, 8, 8)
        del compiled.launches[:]
        assert self.solve(prob) == (0, LAUNCHES)
        assert compiled.launches[0][3:9] == (7, 11, (4, 1, 0), None, None, None)
        assert compiled.launches[0][9] == prob.data_ptr()
        assert all(
            len(launch) - 9 in [len(kernel.arg_names) for kernel in self.kernels] for launch in compiled.launches
        )

    @pytest.mark.parametrize(
        ("other", "compiles"),
        [
            ({"shape": (2, 3, 4, 16)}, 0),
            (
                {"shape": (1, 3, 8, 9)},
                5,
            ),  # 16 does not divide the size of a class
            ({"dtype": torch.float16}, 5),
            ({"valid": torch.ones(1, 8, 8, dtype=torch.bool)}, 5),
            ({"opt_metric": "iou"}, 4),
            ({"pruning_prob": 0.2}, 0),
            ({"unassigned": 2}, 1),
            ({"return_tau": True}, 0),
        ],
    )
    def test_another_kind(self, compiled, other, compiles):
        options = {key: value for key, value in other.items() if key not in ("shape", "dtype")}
        self.solve(torch.zeros(1, 3, 8, 8))
        prob = torch.zeros(other.get("shape", (1, 3, 8, 8)), dtype=other.get("dtype", torch.float32))
        assert self.solve(prob, **options) == (compiles, LAUNCHES - compiles)
        assert len(module._PLANS) == 2
        assert self.solve(prob, **options) == (0, LAUNCHES)

    def test_another_alignment_or_layout_or_setting(self, compiled, monkeypatch):
        buffer = torch.zeros(1 + 3 * 64)
        self.solve(buffer[:-1].view(1, 3, 8, 8))
        assert self.solve(buffer[1:].view(1, 3, 8, 8)) == (5, LAUNCHES - 5)
        assert self.solve(buffer[:-1].view(1, 8, 8, 3).movedim(3, 1))[0] == 5
        assert len(module._PLANS) == 3
        monkeypatch.setattr(module, "FUSED_PASSES", 1)
        assert self.solve(buffer[:-1].view(1, 3, 8, 8)) == (0, 6)
        assert len(module._PLANS) == 4

    def test_numbers_that_triton_tells_apart(self):
        variants = {module._variant(x) for x in (1, 2, 16, 2**31, 2**31 + 1, 0)}
        assert len(variants) == 5  # 0 and 16 are the same to it
        assert module._variant(-(2**31)) == module._variant(32)

    def test_a_launch_that_fails(self, compiled):
        self.solve(torch.zeros(1, 3, 8, 8))
        compiled.error = TypeError("function takes exactly 40 arguments")
        assert self.solve(torch.zeros(1, 3, 8, 8)) == (LAUNCHES, 0)
        compiled.error = None
        assert self.solve(torch.zeros(1, 3, 8, 8)) == (LAUNCHES, 0), "it is tried once"

    def test_a_launch_that_fails_for_another_map(self, compiled):
        self.solve(torch.zeros(1, 3, 8, 8))
        compiled.error = TypeError("function takes exactly 40 arguments")
        assert self.solve(torch.zeros(1, 3, 8, 16)) == (LAUNCHES, 0)
        assert not module.FUSED_DIRECT

    def test_who_asks_triton_is_told_of_every_launch(self, compiled):
        self.solve(torch.zeros(1, 3, 8, 8))
        module._runtime().launch_exit_hook.calls.append(print)
        assert self.solve(torch.zeros(1, 3, 8, 8)) == (LAUNCHES, 0)

    def test_launches_of_level_sets(self, compiled):
        prob, valid = torch.zeros(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
        cases = (({}, 7), ({"valid": valid}, 8), ({"allow_overlap": True}, 5), ({"opt_metric": "dice"}, 7))
        for options, launches in cases:
            assert sum(self.solve(prob, rankseg_levelset, **options)) == launches
            assert self.solve(torch.zeros(2, 3, 8, 8), rankseg_levelset, **options) == (0, launches)

    def test_the_number_of_kinds_is_bounded(self, compiled, monkeypatch):
        monkeypatch.setattr(module, "FUSED_PLANS", 3)
        for size in range(1, 9):
            self.solve(torch.zeros(1, 3, size))
            assert len(module._PLANS) <= 3


class TestDevice:
    pytestmark = gpu

    def test_the_fused_kernels_run(self):
        prob = random_map(1, 3, 40, 50).cuda()
        assert module._is_fused(prob), "Triton or a C compiler is missing, or the device is too old"

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("metric", ["dice", "iou"])
    def test_every_keyword(self, shape, metric):
        """Every method with every choice for unassigned pixels; the other keywords change from one to the next."""
        turn = SHAPES.index(shape) + (metric == "iou")
        choices = itertools.product(("rma_score", "weight_prob", "prob"), ("max_score", "first", -1, 1))
        for k, (method, unassigned) in enumerate(choices, turn):
            prob = random_map(*shape, scale=(0.2, 3.0, 9.0)[k % 3])
            compare(
                prob,
                opt_metric=metric,
                to_nonoverlap_method=method,
                unassigned=unassigned,
                contested=("holders", "all")[(k + k // 4) % 2],
                valid=random_valid(prob) if k % 4 in (1, 2) else None,
                binary_threshold=False,
            )

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", module.DTYPES)
    def test_every_dtype(self, shape, dtype):
        prob = random_map(*shape).to(dtype)
        turn = SHAPES.index(shape) + module.DTYPES.index(dtype)
        metrics = ("dice", "iou") if turn % 2 else ("iou", "dice")
        compare(prob, opt_metric=metrics[0])
        compare(prob, opt_metric=metrics[1], pruning_prob=(0, 0.5, 1.0)[turn % 3])
        compare(prob, opt_metric=metrics[0], allow_overlap=True, valid=random_valid(prob) if turn % 4 < 2 else None)

    @pytest.mark.parametrize(
        ("classes", "dtype"),
        [(c, torch.float32) for c in (1, 2, 5, 33, 150)] + [(21, torch.float16), (3, torch.float64)],
    )
    def test_every_layout(self, classes, dtype):
        prob = random_map(2, classes, 61, 83).to(dtype) if classes > 1 else torch.rand(2, 1, 61, 83).to(dtype)
        choices = ({}, {"opt_metric": "iou", "contested": "all"}, {"allow_overlap": True})
        for k, layout in enumerate(layouts(prob.cuda()), classes):
            before = layout.clone()
            compare(prob, layout, **choices[2 if classes == 1 else k % 3])
            assert torch.equal(layout, before)

    def test_volumes_of_any_strides(self):
        prob = random_map(2, 4, 9, 11, 13, 3)
        for order in itertools.islice(itertools.permutations(range(6)), 0, None, 17):
            inverse = [order.index(k) for k in range(6)]
            compare(prob, prob.cuda().permute(order).contiguous().permute(inverse))

    def test_maps_of_one_kind(self):
        """The second map of a kind is solved without Triton, under the addresses of its own tensors."""
        for shape, options in (((2, 21, 60, 70), {}), ((3, 2, 50, 40), {}), ((1, 5, 30, 40), {"allow_overlap": True})):
            for seed in range(4):
                prob = random_map(*shape, seed=seed)
                compare(prob, valid=random_valid(prob) if shape[1] == 21 else None, **options)
                assert module.FUSED_DIRECT, "Triton launches in another way than expected"
        assert module._PLANS
        buffer = torch.zeros(3 * 40 * 50 + 3).cuda()
        for first in (0, 1, 2, 0, 3):
            prob = random_map(1, 3, 40, 50, seed=first)
            moved = buffer[first : first + prob.numel()].view(prob.shape).copy_(prob)
            compare(prob, moved)

    def test_maps_of_one_kind_on_another_stream(self):
        prob = random_map(1, 5, 200, 300)
        expected = rankseg_rma(prob)
        for _ in range(3):
            with torch.cuda.stream(torch.cuda.Stream()):
                labels = rankseg_rma(prob.cuda())
                assert (labels.cpu() != expected).sum() <= 10

    def test_without_batch(self):
        prob = random_map(1, 6, 30, 40)[0]
        assert torch.equal(rankseg_rma(prob.cuda(), in_batch=False).cpu(), rankseg_rma(prob, in_batch=False))

    @pytest.mark.parametrize("dtype", module.DTYPES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.25, 1.25])
    def test_values_that_are_no_probabilities(self, dtype, value):
        for classes, c in ((2, 0), (2, 1), (4, 3)):
            prob = random_map(2, classes, 50, 100).to(dtype).cuda()
            prob[1, c, 49, 98] = value
            with pytest.raises(ValueError, match=r"finite probabilities in \[0, 1\], got values from"):
                rankseg_rma(prob)

    def test_edges(self):
        for dtype in module.DTYPES:
            edge = torch.full((1, 3, 2), 0.1, dtype=dtype)
            compare(edge)
            edge[0, 1, 0], edge[0, 2, 0] = 1 + 2 * torch.finfo(dtype).eps, -0.0
            compare(edge)
        for classes, size, value in itertools.product((2, 3), (1, 2, 5000), (0.0, 1.0)):
            compare(torch.full((1, classes, size), value), allow_overlap=True, pruning_prob=0.0)
            compare(torch.full((1, classes, size), value))
        prob = random_map(1, 4, 130, 200)
        compare(prob, valid=torch.zeros(1, 130, 200, dtype=torch.bool))

    def test_many_passes(self, monkeypatch):
        monkeypatch.setattr(module, "FUSED_PASSES", 1)
        monkeypatch.setattr(module, "FUSED_SAMPLE", 1)
        compare(random_map(1, 7, 300, 400))

    def test_same_bits_in_every_run_and_layout(self):
        prob = random_map(1, 19, 512, 1024, scale=2.0).cuda()
        first = rankseg_rma(prob, return_tau=True)
        for again in [*([prob] * 5), prob.contiguous(memory_format=torch.channels_last)]:
            assert all(torch.equal(a, b) for a, b in zip(first, rankseg_rma(again, return_tau=True)))

    def test_the_host_waits_once(self):
        prob = random_map(1, 6, 300, 400).cuda()
        for options in ({}, {"allow_overlap": True}, {"opt_metric": "iou", "unassigned": 3, "return_tau": True}):
            assert host_waits(rankseg_rma, prob, **options) == 1

    @pytest.mark.parametrize("shape", [(1, 21, 512, 512), (1, 150, 512, 683), (2, 19, 512, 1024)])
    @pytest.mark.parametrize("last", [False, True])
    def test_memory_stays_below_an_eighth_of_the_input(self, shape, last):
        prob = random_map(*shape).cuda()
        prob = prob.contiguous(memory_format=torch.channels_last) if last else prob
        assert extra_memory(rankseg_rma, prob) < prob.numel() * prob.element_size() / 8

    @pytest.mark.slow
    def test_more_than_two_billion_elements(self):
        if torch.cuda.get_device_properties(0).total_memory < 2**35:
            pytest.skip("needs 32 GiB of device memory")
        prob = torch.empty(1, 3, 2**30 + 5, dtype=torch.float16, device="cuda").uniform_(0, 0.3)
        prob[0, 2, -1] = 0.9
        labels, tau = rankseg_rma(prob, return_tau=True)
        own = rankseg_rma(prob, allow_overlap=True)
        assert torch.equal(own.sum(-1), tau)
        assert labels[0, -1] == 2
        alone = own[0].sum(0, dtype=torch.uint8) == 1
        for c in range(3):
            assert (labels[0][alone & own[0, c]] == c).all()

    @pytest.mark.slow
    def test_an_image_of_more_than_two_billion_pixels(self):
        if torch.cuda.get_device_properties(0).total_memory < 2**36:
            pytest.skip("needs 64 GiB of device memory")
        prob = torch.empty(1, 2, 2**31 + 5, dtype=torch.float16, device="cuda").uniform_(0, 0.3)
        prob[0, 1, -1] = 0.9
        labels, tau = rankseg_rma(prob, return_tau=True)
        assert labels[0, -1] == 1
        assert labels.sum() == tau[0, 1]

    def test_the_plain_path_gives_the_same_labels(self, monkeypatch):
        prob = random_map(2, 21, 120, 130)
        monkeypatch.setattr(module, "FUSED", 2**62)
        assert not module._is_fused(prob.cuda())
        compare(prob)
        compare(prob, allow_overlap=True, valid=random_valid(prob))
        compare(random_map(1, 9, 1100, 1200), opt_metric="iou")  # in several pieces


def layouts(prob: torch.Tensor) -> list[torch.Tensor]:
    """The same (B, C, H, W) map channels-last, as crops, transposed, classes outermost, and every second column."""
    *outer, height, width = prob.shape
    wide = prob.new_full((*outer, height + 3, 2 * width + 5), 7.0)
    wide[..., 1 : height + 1, 3 : width + 3] = prob
    apart = prob.new_full((*outer, height, 2 * width), 7.0)
    apart[..., ::2] = prob
    last = prob.new_full((outer[0], height, width + 2, outer[1] + 3), 7.0)
    last[:, :, 1 : width + 1, 2 : outer[1] + 2] = prob.permute(0, 2, 3, 1)
    return [
        prob,
        prob.contiguous(memory_format=torch.channels_last),
        wide[..., 1 : height + 1, 3 : width + 3],
        prob.transpose(2, 3).contiguous().transpose(2, 3),
        prob.transpose(0, 1).contiguous().transpose(0, 1),
        apart[..., ::2],
        last[:, :, 1 : width + 1, 2 : outer[1] + 2].permute(0, 3, 1, 2),
    ]


@pytest.mark.parametrize("rule", [rankseg_rma, rankseg_levelset])
def test_kernels_that_cannot_be_compiled_are_done_without(rule, monkeypatch: pytest.MonkeyPatch):
    """As where Python's headers are missing: a warning once, and PyTorch's own operations decide."""

    def fail(*args: object) -> None:
        raise OSError("no Python.h")

    prob = torch.rand(1, 4, 9, 11, generator=torch.Generator().manual_seed(0)).softmax(1)
    expected = rule(prob)
    monkeypatch.setattr(module, "_on_cpu", lambda x: False)
    monkeypatch.setattr(module, "_is_fused", lambda x: True)
    monkeypatch.setattr(module, "_UNUSABLE", {})
    monkeypatch.setattr(module, "_solve_fused", fail)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with pytest.warns(
        RuntimeWarning, match=rf"{rule.__name__} goes without its CUDA kernels, more slowly: no Python\.h"
    ):
        assert torch.equal(rule(prob), expected)
    assert torch.equal(rule(prob), expected)
    assert len(module._UNUSABLE) == 1  # the other rule keeps its kernels
    monkeypatch.setattr(module, "_UNUSABLE", {})
    monkeypatch.setattr(module, "_solve_fused", lambda *args: module._check_range(2.0, 2.0, torch.float32))
    with pytest.raises(ValueError, match="finite probabilities"):
        rule(prob)
