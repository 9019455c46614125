"""A checkpoint whose state is not what this run would have saved is refused before any of it is loaded."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exp.checkpoints.checkpoint import Checkpoint, check_resumable, load_checkpoint
from exp.checkpoints.checkpoint_files import facts_path
from exp.config.cli import DEFAULT_YAMLS
from exp.config.experiment import load_experiment
from exp.data.registry import build_dataset
from exp.models import build_model
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.training.saving import Saving, restore
from exp.training.step import TrainStep, build_step
from exp.training.validation import ScoreHistory
from tests.conftest import TINY, TINY_RUN, TINY_SETTINGS

YAMLS = {group: [name] if isinstance(name, str) else name for group, name in DEFAULT_YAMLS.items()}
CONFIG = load_experiment(YAMLS, [*TINY_SETTINGS, "optim.ema_decay=0.9"], 0)
CPU = Dist(0, 1, torch.device("cpu"))


def new_step() -> TrainStep:
    model = build_model(CONFIG.model, 7, 3, pretrained=False).to(memory_format=torch.channels_last)
    return build_step(CONFIG, model, lambda image: image.float() / 255, 3, CPU)


@pytest.fixture(scope="module")
def untouched() -> TrainStep:
    return new_step()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint after one step."""
    folder, step = tmp_path_factory.mktemp("saved"), new_step()
    for parameter in step.raw_model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    step._update(torch.tensor(False))
    dataset = build_dataset(CONFIG.data, None, "train", 0)
    Saving(CONFIG, folder, step, ScoreHistory("m", None, {1: 0.5}), dataset)(1)
    return load_checkpoint(folder / "iter_0000001.pt")


def images(training: dict[str, Any]) -> dict[str, Any]:
    return {name: training["sampler"][name] for name in ("images", "names_sha256")}


def resume(step: TrainStep, checkpoint: Checkpoint, known: dict[str, Any]) -> None:
    check_resumable(checkpoint, CONFIG.to_dict(), known)
    restore(step, checkpoint, CPU)


def first(state: dict[int, dict]) -> dict[str, torch.Tensor]:
    return state[min(state)]


def of_optimizer(**values: object) -> Callable[[dict], None]:
    return lambda training: first(training["optimizer"]["state"]).update(values)


CHANGES: dict[str, Callable[[dict], object]] = {
    "another shape": of_optimizer(exp_avg=torch.zeros(3)),
    "one value for all": of_optimizer(exp_avg_sq=torch.zeros(())),
    "another dtype": of_optimizer(exp_avg=torch.zeros(16, 3, 3, 3, dtype=torch.float64)),
    "a number for a tensor": of_optimizer(exp_avg=0.0),
    "steps by parameter": of_optimizer(step=torch.zeros(2)),
    "unknown tensor": of_optimizer(max_exp_avg_sq=torch.zeros(16, 3, 3, 3)),
    "no average": lambda t: first(t["optimizer"]["state"]).pop("exp_avg"),
    "more parameters": lambda t: t["optimizer"]["state"].update({10**6: first(t["optimizer"]["state"])}),
    "names for numbers": lambda t: t["optimizer"].update(state={"a": first(t["optimizer"]["state"])}),
    "no states": lambda t: t["optimizer"].update(state=None),
    "fewer groups": lambda t: t["optimizer"]["param_groups"].pop(),
    "a rate that is none": lambda t: t["optimizer"]["param_groups"][0].update(lr=math.nan),
    "a rate in words": lambda t: t["optimizer"]["param_groups"][0].update(lr="fast"),
    "a rate for all": lambda t: t["optimizer"]["param_groups"][0].update(lr=torch.ones(10)),
    "optimizer": lambda t: t.update(optimizer=[1]),
    "scheduler": lambda t: t.update(scheduler=None),
    "last rates": lambda t: t["scheduler"].update(_last_lr=[1.0]),
    "another iteration's rate": lambda t: t["scheduler"].update(last_epoch=7),
    "half an iteration": lambda t: t["scheduler"].update(last_epoch=1.0),
    "scaler": lambda t: t.update(scaler={"scale": 1.0}),
    "faults in words": lambda t: t["faults"].update(steps="many"),
    "other faults": lambda t: t["faults"].update(others=1),
    "faults": lambda t: t.update(faults=3),
    "scores by name": lambda t: t["validations"]["scores"].update(last=1.0),
    "scores to come": lambda t: t["validations"]["scores"].update({9: 1.0}),
    "a score that is none": lambda t: t["validations"]["scores"].update({1: math.nan}),
    "scores": lambda t: t["validations"].update(scores=[1.0]),
    "validations": lambda t: t.update(validations={}),
    "no sampler": lambda t: t.update(sampler=5),
    "images in words": lambda t: t["sampler"].update(images="8"),
    "processes": lambda t: t.update(world_size=None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_training_state_is_refused_before_it_is_loaded(saved: Checkpoint, untouched: TrainStep, name: str):
    checkpoint = copy.deepcopy(saved)
    known = images(checkpoint.training)
    CHANGES[name](checkpoint.training)
    before = copy.deepcopy(untouched.state_dict())
    with pytest.raises(InputError, match=r"iter_0000001\.pt: got another state than this run would save \(.+\), expec"):
        resume(untouched, checkpoint, known)
    assert untouched.state_dict() == before


@pytest.mark.parametrize("change", ["shape", "dtype", "surplus", "none"])
def test_another_average_is_refused(saved: Checkpoint, untouched: TrainStep, change: str):
    checkpoint = copy.deepcopy(saved)
    name = next(name for name, value in checkpoint.ema.items() if value.dim() == 4)
    changed = {
        "shape": {**checkpoint.ema, name: torch.zeros(1)},
        "dtype": {**checkpoint.ema, name: checkpoint.ema[name].to(torch.complex64)},
        "surplus": {**checkpoint.ema, "module.more": torch.zeros(1)},
        "none": None,
    }
    object.__setattr__(checkpoint, "ema", changed[change])
    with pytest.raises(InputError, match=r"another state than this run would save \(ema"):
        restore(untouched, checkpoint, CPU)


def test_what_was_saved_is_resumed_whatever_the_file_says_of_options_and_places(saved: Checkpoint):
    checkpoint, step, other = copy.deepcopy(saved), new_step(), new_step()
    restore(step, checkpoint, CPU)
    state = checkpoint.training["optimizer"]["state"]
    assert all(torch.equal(step.optimizer.state_dict()["state"][i]["exp_avg"], state[i]["exp_avg"]) for i in state)
    assert step.scheduler.state_dict() == checkpoint.training["scheduler"]
    whole = copy.deepcopy(step.state_dict())
    shared = copy.deepcopy(saved)
    for group in shared.training["optimizer"]["param_groups"]:
        group.update(betas="text", fused=False, amsgrad=True, foreach=True, later_option=1)
    shared.training["scheduler"].update(base_lrs=None, step="no method", lr_lambdas=[{}])
    for values in shared.training["optimizer"]["state"].values():  # at the end of their memory, the last axis first
        for name in ("exp_avg", "exp_avg_sq"):
            turned = values[name].permute(*reversed(range(values[name].dim()))).contiguous()
            values[name] = turned.permute(*reversed(range(turned.dim())))
    restore(other, shared, CPU)
    found = other.state_dict()
    assert found["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    assert found["scheduler"] == whole["scheduler"]
    for i, values in whole["optimizer"]["state"].items():
        for name, value in values.items():
            assert torch.equal(found["optimizer"]["state"][i][name], value)
            assert found["optimizer"]["state"][i][name].stride() == value.stride()


def test_a_state_that_the_fused_optimiser_would_crash_at_ends_in_one_line(program, tmp_path: Path):
    flags = (*TINY, "--output_dir", tmp_path)
    assert program(*flags, "--predict_yaml", "argmax")[0] == 0
    path = tmp_path / TINY_RUN / "checkpoints" / "iter_0000002.pt"
    for newer in path.parent.glob("iter_0000003.pt*"):
        newer.unlink()
    content = torch.load(path, weights_only=True)
    facts_path(path).unlink()
    for values in content["training"]["optimizer"]["state"].values():
        values["exp_avg"] = torch.zeros(())
    torch.save(content, path)
    status, _, err = program(*flags)
    assert status == 2
    assert "iter_0000002.pt: got another state than this run would save (training.optimizer.state." in err
    torch.save(content | {"iteration": 1}, path)
    status, _, err = program(*flags)
    assert status == 2
    assert "iter_0000002.pt: got the weights of iteration 1, expected those that the name says" in err
    assert path.exists()
