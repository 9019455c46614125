import pytest
import torch
from test_models import tiny

from exp.config import OptimConfig
from exp.models import build_model
from exp.optim import WarmupPoly, build_optimizer, build_scheduler


def config(**changes: object) -> OptimConfig:
    return OptimConfig(
        **{"name": "o", "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "start_lr": 1e-5, **changes}
    )


def test_every_parameter_is_in_one_group_with_its_rate_and_decay():
    model = build_model(tiny(), 3)
    optimizer = build_optimizer(config(), model)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        lr, decay = rates[id(parameter)]
        assert lr == (1e-3 if name.startswith("encoder.") else 1e-2), name
        assert decay == (0.01 if parameter.ndim > 1 else 0.0), name


def test_sgd():
    optimizer = build_optimizer(config(optimizer="sgd", momentum=0.9), build_model(tiny(), 3))
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 1e-5),
        (1, 1e-5 + 0.99e-3 / 10),
        (5, 1e-5 + 0.99e-3 / 2),
        (9, 1e-5 + 0.99e-3 * 0.9),
        (10, 1e-3),
        (109, 1e-3 * 0.9**0.9),
        (505, 1e-3 * 0.5**0.9),
        (802, 1e-3 * 0.2**0.9),
        (901, 1e-3 * 0.1**0.9),
        (1000, 0.0),
    ],
)
def test_learning_rate_against_its_closed_form(iteration: int, expected: float):
    """1,000 iterations, warm-up over the first 10, power 0.9."""
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in (1e-3, 1e-2)]
    optimizer = torch.optim.SGD(parameters)
    scheduler = build_scheduler(config(power=0.9), optimizer, 1000)
    for _ in range(iteration):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(10 * expected, rel=1e-9, abs=1e-15)


def test_short_schedules_have_no_warmup():
    factor = WarmupPoly(0.01, 0, 3, 1.0)
    assert [factor(i) for i in range(4)] == pytest.approx([1, 2 / 3, 1 / 3, 0])
