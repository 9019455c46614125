"""Every rule on a CUDA device: the CPU's labels, but for pixels that rounding decides."""

import pytest
import torch
from torch import Tensor

import rankseg_rma as module
from exp.config.experiment import CONFIG_DIR
from exp.config.families import RULE_TABLE
from exp.rules.pooled import PooledRule
from exp.rules.registry import build_rule
from rankseg_rma import rankseg_levelset, rankseg_rma
from tests.config.test_config import compose
from tests.rules.test_rankseg_rma_gpu import SHAPES, extra_memory, host_waits, layouts, random_map, random_valid

pytestmark = pytest.mark.gpu
FIXED = "rankseg_rma_fixed"  # decides as the pooled ones, under thresholds from a file
NAMES = sorted(path.stem for path in (CONFIG_DIR / "predict").glob("*.yaml") if path.stem != FIXED)
FEW = 1e-3  # of the pixels


def soft_map(classes: int, size: tuple[int, ...] = (96, 128), seed: int = 0) -> Tensor:
    """(1, C, *size) probabilities of smooth regions."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, classes, *(max(2, side // 16) for side in size), generator=generator)
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return torch.nn.functional.interpolate(4 * coarse, size, mode=mode).softmax(1)


def differing(one: Tensor, other: Tensor) -> float:
    """The share of elements in which two tensors differ."""
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    return (one.cpu() != other.cpu()).double().mean().item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [2, 7])
def test_every_shipped_rule(gpu: torch.device, name: str, classes: int):
    config = compose(predict=[name]).predict[0]
    if RULE_TABLE[config.rule].two_classes and classes != 2:
        pytest.skip("a rule of two classes")
    rule = build_rule(config, classes)
    if isinstance(rule, PooledRule):
        pytest.skip("tests/evaluation/test_evaluate_gpu.py has the pooled rules")
    size = (24, 32) if RULE_TABLE[config.rule].two_classes else (96, 128)
    for seed in range(2):
        prob = soft_map(classes, size, seed)
        labels = rule(prob.to(gpu))
        assert labels.device.type == gpu.type
        assert differing(labels, rule(prob)) <= FEW


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ["dice", "iou"])
@pytest.mark.parametrize(("classes", "size"), [(21, (512, 512)), (2, (300, 401)), (5, (12, 48, 64)), (3, (7,))])
def test_labels_of_every_type_and_shape(gpu: torch.device, classes: int, size: tuple[int, ...], metric: str, dtype):
    if len(size) == 1:
        prob = torch.rand(1, classes, *size, generator=torch.Generator().manual_seed(0)).softmax(1).to(dtype)
    else:
        prob = soft_map(classes, size).to(dtype)
    assert differing(rankseg_rma(prob.to(gpu), metric), rankseg_rma(prob, metric)) <= FEW


def test_one_answer_every_time(gpu: torch.device):
    """Sums are added in one order: the same map has the same labels in every call."""
    prob = soft_map(21, (512, 512)).to(gpu)
    first = rankseg_rma(prob)
    assert all(torch.equal(rankseg_rma(prob), first) for _ in range(5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1])
def test_values_that_are_no_probabilities_are_refused(gpu: torch.device, value: float):
    prob = soft_map(5, (256, 256)).to(gpu)
    prob[0, 3, 100, 100] = value
    with pytest.raises(ValueError, match="prob"):
        rankseg_rma(prob)


def compare_levels(prob: Tensor, on_device: Tensor, **options) -> None:
    """The device's labels or masks are the CPU's, but for pixels that rounding puts into another level."""
    valid = options.pop("valid", None)
    expected = rankseg_levelset(prob, valid=valid, **options)
    got = rankseg_levelset(on_device, valid=None if valid is None else valid.to(on_device.device), **options)
    assert (got.device, got.dtype, got.shape) == (on_device.device, expected.dtype, expected.shape)
    different = (got.cpu() != expected).nonzero()
    print(f"{tuple(prob.shape)} {prob.dtype} {options}: {len(different)} differ, {different[:10].tolist()}")
    assert len(different) <= 2 + expected.numel() // 10000


class TestLevelSets:
    @pytest.mark.parametrize("dtype", module.DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_type_and_shape(self, gpu: torch.device, shape, dtype):
        turn = SHAPES.index(shape) + module.DTYPES.index(dtype)
        metrics = ("iou", "dice") if turn % 2 else ("dice", "iou")
        for scale, metric in ((0.3, metrics[0]), (3.0, metrics[0]), (9.0, metrics[1])):
            prob = random_map(*shape, scale=scale).to(dtype)
            valid = random_valid(prob) if scale == 9.0 else None
            compare_levels(prob, prob.to(gpu), opt_metric=metric, valid=valid)
        assert not module._UNUSABLE, module._UNUSABLE
        assert module._is_fused(prob.to(gpu))

    @pytest.mark.parametrize("metric", ["dice", "iou"])
    def test_masks(self, gpu: torch.device, metric):
        for classes, dtype in ((1, torch.float32), (2, torch.float64), (21, torch.float16)):
            prob = random_map(2, classes + 1, 120, 130)[:, 1:].to(dtype)
            for valid in (None, random_valid(prob)):
                compare_levels(prob, prob.to(gpu), opt_metric=metric, allow_overlap=True, valid=valid)

    @pytest.mark.parametrize("classes", [2, 5, 33, 150])
    def test_every_layout(self, gpu: torch.device, classes: int):
        prob = random_map(2, classes, 261, 283)
        for k, layout in enumerate(layouts(prob.to(gpu))):
            before = layout.clone()
            compare_levels(prob, layout, valid=random_valid(prob) if k % 2 else None)
            assert torch.equal(layout, before)

    @pytest.mark.parametrize(("classes", "size"), [(21, (512, 512)), (19, (1024, 2048)), (8, (64, 128, 128))])
    def test_smooth_regions(self, gpu: torch.device, classes: int, size: tuple[int, ...]):
        prob = soft_map(classes, size)
        compare_levels(prob, prob.to(gpu))
        compare_levels(prob, prob.to(gpu), valid=random_valid(prob))

    def test_few_classes(self, gpu: torch.device):
        """No class above `pruning_prob`, one, none at all, equal ones, certain ones."""
        faint = torch.full((2, 25, 40), 0.03)
        faint[0, 7], faint[0, 9], faint[1, 3, 5] = 0.05, 0.04, 0.97
        certain = torch.nn.functional.one_hot(torch.arange(60).view(1, 60) % 3, 4).movedim(-1, 1).float()
        for prob in (faint, torch.zeros(1, 3, 10), torch.full((1, 4, 30), 0.25), certain):
            for metric in ("dice", "iou"):
                compare_levels(prob, prob.to(gpu), opt_metric=metric)
        prob = random_map(1, 3, 50)
        compare_levels(prob, prob.to(gpu), valid=torch.zeros(1, 50, dtype=torch.bool))

    def test_maps_of_one_kind(self, gpu: torch.device):
        for shape, options in (((2, 21, 60, 70), {}), ((3, 2, 50, 40), {}), ((1, 5, 30, 40), {"allow_overlap": True})):
            for seed in range(4):
                prob = random_map(*shape, seed=seed)
                compare_levels(prob, prob.to(gpu), valid=random_valid(prob) if shape[1] == 21 else None, **options)
                assert module.FUSED_DIRECT, "Triton launches in another way than expected"

    def test_same_bits_in_every_run(self, gpu: torch.device):
        prob = random_map(1, 19, 512, 1024, scale=2.0).to(gpu)
        first = rankseg_levelset(prob)
        assert all(torch.equal(rankseg_levelset(prob), first) for _ in range(5))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.25, 1.25])
    def test_values_that_are_no_probabilities(self, gpu: torch.device, value: float):
        for classes, c in ((2, 0), (2, 1), (4, 3)):
            prob = random_map(2, classes, 50, 100).to(gpu)
            prob[1, c, 49, 98] = value
            with pytest.raises(ValueError, match=r"finite probabilities in \[0, 1\]"):
                rankseg_levelset(prob)

    def test_the_host_waits_once(self, gpu: torch.device):
        prob = random_map(2, 6, 300, 400).to(gpu)
        for options in ({}, {"allow_overlap": True}, {"opt_metric": "dice", "valid": random_valid(prob).to(gpu)}):
            assert host_waits(rankseg_levelset, prob, **options) == 1

    @pytest.mark.parametrize("shape", [(1, 150, 512, 683), (2, 19, 512, 1024)])
    def test_memory_stays_below_an_eighth_of_the_input(self, gpu: torch.device, shape):
        prob = random_map(*shape).to(gpu)
        assert extra_memory(rankseg_levelset, prob) < prob.numel() * prob.element_size() / 8

    @pytest.mark.slow
    def test_more_than_two_billion_elements(self, gpu: torch.device):
        if torch.cuda.get_device_properties(0).total_memory < 2**36:
            pytest.skip("needs 64 GiB of device memory")
        for shape in ((1, 3, 2**30 + 5), (1, 2, 2**31 + 5)):
            prob = torch.empty(shape, dtype=torch.float16, device=gpu).uniform_(0, 0.3)
            prob[0, -1, -1] = 0.99
            labels = rankseg_levelset(prob)
            assert labels[0, -1] == shape[1] - 1
            del prob, labels

    def test_the_plain_path_gives_the_same_labels(self, gpu: torch.device, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(module, "FUSED", 2**62)
        prob = random_map(2, 21, 120, 130)
        compare_levels(prob, prob.to(gpu))
        compare_levels(prob, prob.to(gpu), allow_overlap=True, valid=random_valid(prob))
