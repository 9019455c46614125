"""Every rule on a CUDA device: the CPU's labels, but for pixels that rounding decides."""

import pytest
import torch
from torch import Tensor

from exp.config.experiment import CONFIG_DIR
from exp.config.families import RULE_TABLE
from exp.rules.pooled import PooledRule
from exp.rules.registry import build_rule
from rankseg_rma import rankseg_rma
from tests.config.test_config import compose

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
