import math

import pytest
import torch
import torch.nn.functional as F

from exp.config import LossConfig
from exp.losses import CrossEntropy, build_criterion


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (2, 5, 6), generator=generator, dtype=torch.uint8)
    label[0, :3] = 255
    return torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64), label


def alone(value: torch.Tensor) -> torch.Tensor:
    return value


def test_cross_entropy_is_the_mean_over_counted_pixels():
    logits, label = example()
    total, counted = 0.0, 0
    for b, y, x in torch.nonzero(label != 255).tolist():
        row = logits[b, :, y, x]
        total += math.log(row.exp().sum()) - row[int(label[b, y, x])].item()
        counted += 1
    assert CrossEntropy(alone)(logits, label).item() == pytest.approx(total / counted, rel=1e-12)
    torch.testing.assert_close(
        CrossEntropy(alone)(logits, label), F.cross_entropy(logits, label.long(), ignore_index=255)
    )


def test_no_counted_pixel_gives_zero_and_a_finite_gradient():
    logits, label = example()
    logits.requires_grad_()
    loss = CrossEntropy(alone)(logits, torch.full_like(label, 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0


def test_uneven_shares_average_to_the_global_mean():
    """Two processes with one image each: the mean of their losses is the loss of the batch of two."""
    logits, label = example()
    counted = (label != 255).sum((1, 2)).double()
    losses = [CrossEntropy(lambda value: counted.mean())(logits[i : i + 1], label[i : i + 1]) for i in range(2)]
    torch.testing.assert_close((losses[0] + losses[1]) / 2, CrossEntropy(alone)(logits, label))


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.3])
def test_the_yaml_weighs_main_and_auxiliary(weight: float):
    logits, label = example()
    other = logits.flip(1)
    criterion = build_criterion(LossConfig("x", "ce", aux_weight=weight), alone)
    ce = CrossEntropy(alone)
    torch.testing.assert_close(
        criterion((logits, other), label), (1 - weight) * ce(logits, label) + weight * ce(other, label)
    )
