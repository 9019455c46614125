import pytest
import torch

from exp.config.experiment import CONFIG_DIR
from exp.config.strict_yaml import build_dataclass, load_mapping
from exp.config.training import OptimConfig, ScheduleConfig
from exp.data.loader import count_iterations
from exp.models import build_model
from exp.training.optim import WarmupPoly, build_optimizer, build_scheduler
from tests.models.test_models import tiny


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
        (1, 1e-4),
        (5, 5e-4),
        (9, 9e-4),
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


def test_a_checkpoint_from_before_the_warm_up_had_a_name_goes_on_as_it_began():
    """It rises from start_lr, over a whole number of iterations."""
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 1e-3}])
    scheduler = build_scheduler(config(power=0.9, warmup="from_start"), optimizer, 1040)
    factor = scheduler.lr_lambdas[0]
    assert [factor(i) for i in (0, 1, 9, 10)] == pytest.approx([0.01, 0.01 + 0.99 / 10, 0.01 + 0.99 * 0.9, 1])


def test_short_schedules_have_no_warmup():
    factor = WarmupPoly(0.01, 0, 3, 1.0)
    assert [factor(i) for i in range(4)] == pytest.approx([1, 2 / 3, 1 / 3, 0])


@pytest.mark.parametrize(
    ("name", "start", "lr", "power"),
    [("adamw_lr6e-5", 1e-6, 6e-5, 1.0), ("adamw_lr6e-4", 1e-6, 6e-4, 1.0), ("sgd_lr1e-2", 1e-6, 1e-2, 0.9)],
)
def test_the_shipped_recipes_over_40000_iterations(name: str, start: float, lr: float, power: float):
    """Warm-up over the first 400; the encoder's rate at ten points, decoder and heads ten times as high."""
    expected = {0: start, 100: lr / 4, 200: lr / 2, 300: 3 * lr / 4, 400: lr}
    expected |= {400 + round(39600 * t): lr * (1 - t) ** power for t in (0.1, 0.5, 0.75, 0.9, 1.0)}
    path = CONFIG_DIR / "optim" / f"{name}.yaml"
    recipe = build_dataclass(OptimConfig, {"name": name, **load_mapping(path)}, path, {})
    optimizer = build_optimizer(recipe, build_model(tiny(), 3))
    scheduler = build_scheduler(recipe, optimizer, 40_000)
    assert len(expected) == 10
    for iteration, rate in expected.items():
        factors = [factor(iteration) for factor in scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        assert rates == pytest.approx([rate, rate, 10 * rate, 10 * rate], rel=1e-9, abs=1e-18), iteration


@pytest.mark.parametrize(
    ("name", "images", "iterations"),
    [
        ("40k_iters", 10_582, 40_000),
        ("80k_iters", 2_975, 80_000),
        ("160k_iters", 20_210, 160_000),
        ("60_epochs", 5_870, 60 * 733),
        ("150_epochs", 367, 150 * 45),
    ],
)
def test_the_shipped_schedules_lengths(name: str, images: int, iterations: int):
    path = CONFIG_DIR / "schedule" / f"{name}.yaml"
    schedule = build_dataclass(ScheduleConfig, {"name": name, **load_mapping(path)}, path, {})
    assert count_iterations(schedule, images) == iterations
