"""The interface of `rankseg_rma`: shapes, dtypes, keywords, errors, layouts, threads, memory and synchronisation."""

import re

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import profile

import rankseg_rma as module
from rankseg_rma import rankseg_levelset, rankseg_rma

STREAMED, BATCHED = 0, 2**40  # values of SMALL that force one strategy or the other


def softmax_map(*shape: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).softmax(1)


def smooth_map(*shape: int) -> torch.Tensor:
    """Regions with soft borders, as a network gives them."""
    coarse = torch.randn(*shape[:2], 9, 9, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(12 * coarse, shape[2:], mode="bicubic").softmax(1)


def outputs(prob, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return rankseg_rma(prob, return_tau=True, **options)


@pytest.fixture(params=[STREAMED, BATCHED], ids=["streamed", "batched"])
def strategy(request, monkeypatch):
    monkeypatch.setattr(module, "SMALL", request.param)


@pytest.mark.parametrize("rule", [rankseg_rma, rankseg_levelset])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_map_without_its_batch_is_told(rule, dtype: torch.dtype):
    """On the CPU: to look would keep a GPU waiting."""
    prob = smooth_map(1, 5, 48, 64).to(dtype)
    with pytest.raises(ValueError, match=r"shape \(5, 48, 64\) sums to 1 over its first axis.*in_batch=False"):
        rule(prob[0])
    assert torch.equal(rule(prob[0], in_batch=False), rule(prob)[0])
    pixels = prob.flatten(2).expand(5, -1, -1)
    assert torch.equal(rule(pixels)[0], rule(prob).flatten()), "(B, C, pixels) with B = C"
    rule((pixels / 2).contiguous())
    rule(torch.rand(5, 48, 64, generator=torch.Generator().manual_seed(0)).to(dtype))
    rule(prob[0], allow_overlap=True)


@pytest.mark.parametrize("spatial", [(7,), (5, 6), (3, 4, 5), (2, 3, 2, 2)])
@pytest.mark.usefixtures("strategy")
def test_shapes_and_dtypes(spatial):
    prob = softmax_map(2, 4, *spatial)
    labels, tau = outputs(prob)
    assert labels.shape == (2, *spatial)
    assert labels.dtype == torch.int64
    assert tau.shape == (2, 4)
    assert tau.dtype == torch.int64
    masks, mask_tau = outputs(prob, allow_overlap=True)
    assert masks.shape == prob.shape
    assert masks.dtype == torch.bool
    assert torch.equal(mask_tau, masks.flatten(2).sum(-1))
    assert torch.equal(tau, mask_tau)
    single, single_tau = outputs(prob[0], in_batch=False)
    assert torch.equal(single, labels[0])
    assert torch.equal(single_tau, tau[0])
    assert torch.equal(rankseg_rma(prob[0], in_batch=False, allow_overlap=True), masks[0])


def test_positional_order_is_the_documented_one():
    prob = softmax_map(1, 3, 4, 5)
    valid = torch.ones(1, 4, 5, dtype=torch.bool)
    positional = rankseg_rma(prob, "iou", False, True, True, "prob", 255, 0.2, valid)
    named = outputs(prob, opt_metric="iou", to_nonoverlap_method="prob", unassigned=255, pruning_prob=0.2, valid=valid)
    assert all(torch.equal(a, b) for a, b in zip(positional, named))
    with pytest.raises(TypeError):
        rankseg_rma(prob, "iou", False, True, True, "prob", 255, 0.2, valid, "all")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_in_numpy_out(dtype):
    array = softmax_map(2, 3, 6, 7).numpy().astype(dtype)
    labels, tau = rankseg_rma(array, return_tau=True)
    assert isinstance(labels, np.ndarray)
    assert labels.dtype == np.int64
    assert isinstance(tau, np.ndarray)
    np.testing.assert_array_equal(labels, rankseg_rma(torch.from_numpy(array)).numpy())
    flipped = rankseg_rma(array[..., ::-1], valid=np.ones((2, 6, 7), bool))
    np.testing.assert_array_equal(flipped[..., ::-1], labels)
    array.flags.writeable = False
    np.testing.assert_array_equal(rankseg_rma(array), labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("strategy")
def test_half_precision_decides_as_its_exact_float32_copy(dtype):
    prob = softmax_map(2, 5, 40, 50).to(dtype)
    for options in ({}, {"opt_metric": "iou"}, {"allow_overlap": True}):
        ours = outputs(prob, **options)
        exact = outputs(prob.float(), pruning_prob=torch.tensor(0.1, dtype=dtype).item(), **options)
        assert torch.equal(ours[0], exact[0])
        assert torch.equal(ours[1], exact[1])


def test_half_precision_counts_beyond_its_own_range():
    prob = torch.zeros(1, 3, 300, 300, dtype=torch.float16)  # 90,000 pixels: above the largest float16
    prob[:, 0], prob[:, 1] = 0.75, 0.25
    labels, tau = outputs(prob)
    assert (labels == 0).all()
    assert tau.tolist() == [[90000, 90000, 0]]


@pytest.mark.usefixtures("strategy")
def test_input_is_left_alone_and_no_gradient_recorded():
    prob = softmax_map(1, 4, 9, 9).requires_grad_()
    before = prob.detach().clone()
    labels = rankseg_rma(prob, unassigned="first", valid=torch.rand(1, 9, 9) > 0.5)
    assert torch.equal(prob.detach(), before)
    assert not labels.requires_grad
    assert labels.grad_fn is None


def layouts(prob: torch.Tensor) -> dict[str, torch.Tensor]:
    batch, classes, height, width = prob.shape
    wide = torch.rand(batch, classes, height + 3, 2 * width)
    wide[:, :, 1 : height + 1, ::2] = prob
    crop = torch.rand(batch, classes, height + 2, width + 5)
    crop[..., :height, 2 : width + 2] = prob
    return {
        "channels-last": prob.contiguous(memory_format=torch.channels_last),
        "strided": wide[:, :, 1 : height + 1, ::2],
        "crop": crop[..., :height, 2 : width + 2],
        "transposed": prob.transpose(2, 3).contiguous().transpose(2, 3),
        "classes outermost": prob.transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("metric", ["dice", "iou"])
@pytest.mark.parametrize("classes", [2, 5, 21])
@pytest.mark.usefixtures("strategy")
def test_layouts_give_identical_bits(metric, classes):
    prob = softmax_map(2, classes, 95, 131)
    for options in ({}, {"allow_overlap": True}, {"contested": "all", "unassigned": 255}):
        expected = outputs(prob, opt_metric=metric, **options)
        for name, same in layouts(prob).items():
            assert torch.equal(same, prob)
            got = outputs(same, opt_metric=metric, **options)
            assert all(torch.equal(a, b) for a, b in zip(got, expected)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ["dice", "iou"])
def test_threads_pieces_and_strategies_give_identical_bits(dtype, metric, monkeypatch):
    prob = softmax_map(1, 5, 401, 523, scale=2.0).to(dtype)
    valid = torch.rand(1, 401, 523, generator=torch.Generator().manual_seed(1)) > 0.1
    threads = torch.get_num_threads()
    try:
        for options in ({}, {"valid": valid, "contested": "all"}, {"allow_overlap": True}):
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                for tile in (module.BLOCK, 3 * module.BLOCK, 2**19):
                    monkeypatch.setattr(module, "TILE", tile)
                    monkeypatch.setattr(module, "SMALL", STREAMED)
                    results.append(outputs(prob, opt_metric=metric, **options))
                for small, pieces in ((STREAMED, 32), (STREAMED, 5), (BATCHED, 1)):
                    monkeypatch.setattr(module, "PIECES", pieces)
                    monkeypatch.setattr(module, "SMALL", small)
                    monkeypatch.setattr(module, "_on_cpu", lambda _: False)
                    results.append(outputs(prob, opt_metric=metric, **options))
                    monkeypatch.undo()
            for labels, tau in results[1:]:
                assert torch.equal(labels, results[0][0])
                assert torch.equal(tau, results[0][1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(2, 21, 20, 27), (1, 3, 90, 117), (2, 5, 33), (1, 150, 9, 8), (3, 2, 41, 7)])
@pytest.mark.parametrize("scale", [0.2, 3.0, 9.0])
def test_strategies_agree_for_every_keyword(shape, scale, monkeypatch):
    prob = softmax_map(*shape, scale=scale)
    valid = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(2)) > 0.2
    cases = [
        {
            "opt_metric": metric,
            "to_nonoverlap_method": method,
            "unassigned": unassigned,
            "contested": contested,
            "valid": mask,
            "binary_threshold": False,
        }
        for metric in ("dice", "iou")
        for method in ("rma_score", "weight_prob", "prob")
        for unassigned in ("max_score", "first", 255)
        for contested in ("holders", "all")
        for mask in (None, valid)
    ]
    for options in cases:
        results = []
        for small in (STREAMED, BATCHED):
            monkeypatch.setattr(module, "SMALL", small)
            results.append(outputs(prob, **options))
        assert all(torch.equal(a, b) for a, b in zip(*results)), options


@pytest.mark.usefixtures("strategy")
def test_valid_pixels_alone_shape_the_sets():
    prob = softmax_map(1, 4, 20, 30)
    padded = torch.rand(1, 4, 25, 36)
    padded[..., :20, :30] = prob
    valid = torch.zeros(1, 25, 36, dtype=torch.bool)
    valid[:, :20, :30] = True
    labels, tau = outputs(padded, valid=valid)
    expected, expected_tau = outputs(prob)
    assert torch.equal(labels[:, :20, :30], expected)
    assert torch.equal(tau, expected_tau)
    masks = rankseg_rma(padded, allow_overlap=True, valid=valid)
    assert not masks[:, :, ~valid[0]].any()
    assert (rankseg_rma(padded, valid=valid, unassigned=9)[~valid] == 9).all()
    nothing, no_tau = outputs(padded, valid=torch.zeros_like(valid))
    assert no_tau.sum() == 0
    assert nothing.shape == valid.shape


@pytest.mark.usefixtures("strategy")
def test_two_classes_threshold_the_foreground():
    prob = softmax_map(2, 2, 30, 31, scale=1.0)
    labels = rankseg_rma(prob)
    foreground = rankseg_rma(prob[:, 1:], allow_overlap=True)[:, 0]
    assert torch.equal(labels, foreground.long())
    assert not torch.equal(rankseg_rma(prob, binary_threshold=False, unassigned="first"), labels)
    assert torch.equal(outputs(prob)[1], outputs(prob, allow_overlap=True)[1])
    nothing = torch.stack([torch.full((1, 8), 0.95), torch.full((1, 8), 0.05)], 1)
    labels, tau = outputs(nothing)
    assert (labels == 0).all()
    assert tau.tolist() == [[8, 0]]


@pytest.mark.usefixtures("strategy")
def test_pruning_and_its_boundary():
    prob = torch.zeros(1, 3, 4)
    prob[0, 0], prob[0, 1, 0], prob[0, 2, 1] = 0.8, 0.1, 0.2
    assert outputs(prob)[1].tolist() == [[4, 0, 1]]
    assert outputs(prob, pruning_prob=0.0)[1].tolist() == [[4, 1, 1]]
    assert outputs(prob, pruning_prob=0.5)[1].tolist() == [[4, 0, 0]]
    labels, tau = outputs(prob, pruning_prob=1.0)  # all pruned: every class competes for every pixel
    assert tau.sum() == 0
    assert (labels == 0).all()
    assert (rankseg_rma(prob, pruning_prob=1.0, unassigned=7) == 7).all()
    for dtype in module.DTYPES:  # the boundary is that of the map's own precision
        edge = torch.full((1, 3, 2), 0.1, dtype=dtype)
        assert outputs(edge)[1].sum() == 0


@pytest.mark.usefixtures("strategy")
@pytest.mark.parametrize("metric", ["dice", "iou"])
def test_degenerate_maps(metric):
    for classes in (1, 2, 3):
        for size in (1, 2, 100):
            zeros = torch.zeros(1, classes, size)
            masks, tau = outputs(zeros, opt_metric=metric, allow_overlap=True, pruning_prob=0.0)
            assert not masks.any()
            assert tau.sum() == 0
            masks, tau = outputs(zeros + 1, opt_metric=metric, allow_overlap=True)
            assert masks.all()
            assert (tau == size).all()
            if classes > 1:
                assert (rankseg_rma(zeros, metric) == 0).all()
                assert (rankseg_rma(zeros + 1, metric, binary_threshold=False) == 0).all()


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf"), -0.25, 1.25])
@pytest.mark.parametrize("dtype", module.DTYPES)
@pytest.mark.usefixtures("strategy")
def test_values_that_are_no_probabilities(value, dtype):
    for classes in (2, 4):
        for c in (0, classes - 1):
            prob = softmax_map(2, classes, 50, 100).to(dtype)
            prob[1, c, 49, 98] = value
            with pytest.raises(ValueError, match=r"finite probabilities in \[0, 1\], got values from"):
                rankseg_rma(prob)


@pytest.mark.parametrize("dtype", module.DTYPES)
@pytest.mark.usefixtures("strategy")
def test_rounding_of_a_softmax_and_negative_zero_pass(dtype):
    prob = softmax_map(1, 3, 10, 10).to(dtype)
    prob[0, 1, 0, 0] = 1 + 2 * torch.finfo(dtype).eps
    prob[0, 2, 0, 0] = -0.0
    assert rankseg_rma(prob)[0, 0, 0] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prob": torch.rand(3, 4)}, ValueError, "with at least one spatial dimension, got shape (3, 4)"),
        ({"prob": torch.rand(3), "in_batch": False}, ValueError, "at least one spatial dimension, got shape (3,)"),
        ({"prob": torch.rand(1, 0, 4)}, ValueError, "without empty dimensions, got shape (1, 0, 4)"),
        ({"prob": torch.rand(0, 3, 4)}, ValueError, "without empty dimensions, got shape (0, 3, 4)"),
        ({"prob": torch.rand(1, 1, 4)}, ValueError, "allow_overlap=True"),
        ({"prob": torch.zeros(1, 3, 4, dtype=torch.int64)}, TypeError, "float64, got torch.int64"),
        ({"prob": torch.zeros(1, 3, 4).to_sparse()}, TypeError, "dense"),
        ({"prob": [[[0.5]]]}, TypeError, "torch.Tensor or a numpy.ndarray, got list"),
        ({"prob": np.array([[["a"]]])}, TypeError, "numpy array of dtype <U1"),
        ({"prob": np.zeros((1, 3, 4), np.int32)}, TypeError, "float64, got torch.int32"),
        ({"opt_metric": "Dice"}, ValueError, "opt_metric must be one of ('dice', 'iou'), got 'Dice'"),
        ({"to_nonoverlap_method": "max"}, ValueError, "to_nonoverlap_method must be one of"),
        ({"contested": "none"}, ValueError, "contested must be one of ('holders', 'all'), got 'none'"),
        ({"unassigned": "last"}, ValueError, "unassigned must be 'max_score', 'first' or an int label, got 'last'"),
        ({"unassigned": 2.0}, TypeError, "unassigned must be"),
        ({"unassigned": True}, TypeError, "unassigned must be"),
        ({"unassigned": 2**63}, ValueError, "int64"),
        ({"pruning_prob": 1.5}, ValueError, "pruning_prob must lie in [0, 1], got 1.5"),
        ({"pruning_prob": float("nan")}, ValueError, "pruning_prob must lie in [0, 1], got nan"),
        ({"pruning_prob": "0.1"}, TypeError, "pruning_prob must be a number"),
        ({"valid": torch.ones(1, 5, dtype=torch.bool)}, ValueError, "shape (1, 4) of prob without its classes, got"),
        ({"valid": torch.ones(1, 4)}, TypeError, "valid must be bool, got torch.float32"),
        ({"valid": [True]}, TypeError, "valid must be a torch.Tensor"),
    ],
)
def test_errors_say_what_was_got_and_expected(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        rankseg_rma(**{"prob": softmax_map(1, 3, 4), **change})


class CountSynchronisations(TorchFunctionMode):
    """Counts what makes the host wait for a device: values read, and results whose size depends on values."""

    names = {
        "item",
        "tolist",
        "nonzero",
        "masked_select",
        "unique",
        "cpu",
        "numpy",
        "argwhere",
        "equal",
        "allclose",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__contains__",
        "__len__bool",
    }

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if name in self.names:
            self.found.append(name)
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index):
                self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(1, 4, 30, 30), (1, 60, 30, 30), (9, 3, 300, 100)])
def test_an_accelerator_is_waited_for_once(shape, monkeypatch):
    monkeypatch.setattr(module, "_on_cpu", lambda _: False)
    for options in (
        {},
        {"opt_metric": "iou", "contested": "all"},
        {"allow_overlap": True},
        {"valid": torch.ones(shape[0], *shape[2:], dtype=torch.bool), "unassigned": 3},
    ):
        with CountSynchronisations() as count:
            rankseg_rma(softmax_map(*shape), return_tau=True, **options)
        assert count.found == ["tolist"]


def peak_bytes(function) -> int:
    """Peak of the bytes allocated while a function runs, what its operators allocate inside included."""
    with profile(profile_memory=True) as run:
        result = function()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    del result
    return peak


@pytest.mark.parametrize(
    "shape", [(1, 21, 512, 512), (1, 150, 256, 341), (1, 19, 512, 1024), (8, 2, 512, 512), (1, 11, 360, 480)]
)
@pytest.mark.parametrize("half", [False, True])
def test_memory_stays_below_an_eighth_of_the_input(shape, half, monkeypatch):
    monkeypatch.setattr(module, "SMALL", STREAMED)
    prob = smooth_map(*shape)
    prob = prob.half() if half else prob
    output = 8 * prob[:, 0].numel()
    extra = peak_bytes(lambda: rankseg_rma(prob)) - output
    assert 0 < extra < prob.numel() * prob.element_size() / 8


class CountThreads(TorchFunctionMode):
    """The numbers of threads that reductions and comparisons run on."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("amax", "aminmax", "gt", "sort", "sum"):
            self.found.add(torch.get_num_threads())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(1, 5, 150, 401), (2, 7, 30, 31), (1, 2, 20, 20)])
def test_a_call_stays_on_its_thread_and_leaves_the_setting_alone(shape):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        prob = softmax_map(*shape)
        with CountThreads() as count:
            rankseg_rma(prob)
        assert count.found == {1}
        with pytest.raises(ValueError, match="finite probabilities"):
            rankseg_rma(prob + 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("options", [{}, {"allow_overlap": True}, {"valid": True}])
def test_blocks_without_a_class_are_left_out(options, monkeypatch):
    """Classes that lie in a part of the image, at its end too, whose last pixels make no whole block."""
    monkeypatch.setattr(module, "TILE", 2 * module.BLOCK)
    logits = softmax_map(1, 4, 300, 331).log()
    for c, rows in enumerate((slice(0, 100), slice(90, 220), slice(200, 290), slice(280, 300))):
        logits[:, c, rows] += 4.0
    prob = logits.softmax(1)
    if "valid" in options:
        options = {"valid": torch.rand(1, 300, 331, generator=torch.Generator().manual_seed(1)) > 0.3}
    results = []
    for small in (STREAMED, BATCHED):
        monkeypatch.setattr(module, "SMALL", small)
        results.append(outputs(prob, **options))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("small", [0, 10**9])
def test_the_default_device_decides_nothing(small, monkeypatch):
    monkeypatch.setattr(module, "SMALL", small)
    prob = smooth_map(2, 5, 32, 40)
    for options in ({}, {"allow_overlap": True}, {"return_tau": True}):
        expected = rankseg_rma(prob, **options)
        with torch.device("meta"):
            found = rankseg_rma(prob, **options)
            assert rankseg_levelset(prob).device.type == "cpu"
        for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected))):
            assert torch.equal(one, other)
