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


def alone(loss: torch.nn.Module, logits: object, label: torch.Tensor) -> torch.Tensor:
    """The loss of one process, its whole batch at once."""
    return loss(logits, label, loss.count(label))


def test_cross_entropy_is_the_mean_over_counted_pixels():
    logits, label = example()
    total, counted = 0.0, 0
    for b, y, x in torch.nonzero(label != 255).tolist():
        row = logits[b, :, y, x]
        total += math.log(row.exp().sum()) - row[int(label[b, y, x])].item()
        counted += 1
    assert alone(CrossEntropy(), logits, label).item() == pytest.approx(total / counted, rel=1e-12)
    torch.testing.assert_close(
        alone(CrossEntropy(), logits, label), F.cross_entropy(logits, label.long(), ignore_index=255)
    )


def test_no_counted_pixel_gives_zero_and_a_finite_gradient():
    logits, label = example()
    logits.requires_grad_()
    loss = alone(CrossEntropy(), logits, torch.full_like(label, 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0


def test_uneven_shares_average_to_the_global_mean():
    """Two processes with one image each: the mean of their losses is the loss of the batch of two."""
    logits, label = example()
    ce = CrossEntropy()
    counted = sum(ce.count(label[i : i + 1]) for i in range(2)) / 2
    losses = [ce(logits[i : i + 1], label[i : i + 1], counted) for i in range(2)]
    torch.testing.assert_close((losses[0] + losses[1]) / 2, alone(ce, logits, label))


def test_uneven_micro_batches_add_up_to_the_whole():
    logits, label = example()
    ce = CrossEntropy()
    counted = ce.count(label)
    losses = [ce(logits[i : i + 1], label[i : i + 1], counted) for i in range(2)]
    torch.testing.assert_close(losses[0] + losses[1], alone(ce, logits, label))


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.3])
def test_the_yaml_weighs_main_and_auxiliary(weight: float):
    logits, label = example()
    other = logits.flip(1)
    criterion = build_criterion(LossConfig("x", "ce", aux_weight=weight))
    main, auxiliary = (alone(CrossEntropy(), x, label) for x in (logits, other))
    torch.testing.assert_close(alone(criterion, (logits, other), label), (1 - weight) * main + weight * auxiliary)
