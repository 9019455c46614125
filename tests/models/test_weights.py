"""Training that starts from weights of one's own: a whole network, or an encoder out of one."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from exp.checkpoints.checkpoint import load_checkpoint
from exp.config.cli import DEFAULT_YAMLS
from exp.config.experiment import load_experiment, training_digest
from exp.models import Segmentor, build_model, load_network_weights
from exp.models.weights import load_encoder_weights
from exp.runtime.errors import InputError
from tests.conftest import TINY, TINY_RUN, TINY_SETTINGS

YAMLS = {group: [name] if isinstance(name, str) else name for group, name in DEFAULT_YAMLS.items()}
CONFIG = load_experiment(YAMLS, TINY_SETTINGS, 0)
CLASSES = ["a", "b", "c"]


def network(seed: int, classes: int = 3) -> Segmentor:
    torch.manual_seed(seed)
    return build_model(CONFIG.model, classes, pretrained=False)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return network(1).state_dict()


def test_a_whole_network_comes_out_of_every_wrapping(tmp_path: Path, weights: dict[str, Tensor], caplog):
    wrapped = {
        "plain": weights,
        "state_dict": {"state_dict": weights, "epoch": 3},
        "checkpoint": {"iteration": 3, "model": weights, "classes": CLASSES, "training": {"a": [1]}},
        "ddp": {"model_state_dict": {f"module.{name}": value for name, value in weights.items()}},
    }
    for name, content in wrapped.items():
        torch.save(content, tmp_path / f"{name}.pt")
    save_file(weights, tmp_path / "sorted.safetensors")
    target = network(2)
    start = {name: value.clone() for name, value in target.state_dict().items()}
    for path in sorted(tmp_path.iterdir()):
        target.load_state_dict(start)
        load_network_weights(target, path, CLASSES)
        found = target.state_dict()
        assert all(torch.equal(found[name], value) for name, value in weights.items() if "num_batches" not in name)
        target.load_state_dict(start)
        load_encoder_weights(target.encoder, path)
        found = target.state_dict()
        for name, value in weights.items():
            expected = value if name.startswith("encoder.") and "num_batches" not in name else start[name]
            assert torch.equal(found[name], expected), (path, name)
    assert caplog.records == []


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_classifiers_of_other_classes_are_left_out_line_by_line(
    tmp_path: Path, weights: dict[str, Tensor], suffix: str, caplog
):
    path, others = tmp_path / f"w{suffix}", ["a", "b", "other"]
    content = {**weights, "more": torch.ones(1)}
    if suffix == ".pt":
        torch.save({"model": content, "classes": others}, path)
    else:
        save_file(content, path, metadata={"rankseg_rma": json.dumps({"classes": others})})
    for target, classes in ((network(2, 5), list("abcde")), (network(2), CLASSES)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "exp"):
            before = {name: value.clone() for name, value in target.state_dict().items()}
            load_network_weights(target, path, classes)
        left = ["head.1.weight", "head.1.bias", "aux_head.4.weight", "aux_head.4.bias"]
        lines = [record.getMessage() for record in caplog.records]
        assert lines[:-1] == [f"{path}: got {name} of other classes: drawn at random" for name in left]
        assert lines[-1] == f"{path}: got more, which the network does not have: left aside"
        found = target.state_dict()
        assert all(torch.equal(found[name], before[name]) for name in left)
        assert torch.equal(found["aux_head.0.weight"], weights["aux_head.0.weight"])


def test_other_networks_are_refused(tmp_path: Path, weights: dict[str, Tensor]):
    first = next(iter(weights))
    torch.save({name: value for name, value in weights.items() if name != first}, tmp_path / "less.pt")
    torch.save({**weights, first: torch.ones(3)}, tmp_path / "shape.pt")
    save_file({f"other{i}": value for i, value in enumerate(weights.values())}, tmp_path / "names.safetensors")
    torch.save({"state_dict": [1]}, tmp_path / "list.pt")
    target = network(2)
    for name, text in (
        ("less.pt", f"got no tensor '{first}', expected a network of the same"),
        ("shape.pt", rf"got shape \(3,\) for '{first}', expected"),
        ("names.safetensors", f"got no tensor '{first}'"),
        ("list.pt", "got dict, expected a state dict of tensors"),
    ):
        with pytest.raises(InputError, match=rf"{name}: {text}"):
            load_network_weights(target, tmp_path / name, CLASSES)
    with pytest.raises(InputError, match=r"names\.safetensors: got no tensor 'conv_stem.weight' of the encoder"):
        load_encoder_weights(target.encoder, tmp_path / "names.safetensors")


def test_weights_to_start_from_decide_what_is_trained():
    plain, other = (load_experiment(YAMLS, values, 0) for values in ([], ["model.init_from=w.pt"]))
    assert "init_from" not in plain.to_dict()["model"]
    assert training_digest(plain.to_dict()) != training_digest(other.to_dict())


def test_a_training_starts_from_the_end_of_another(program, tmp_path: Path):
    flags = (*TINY, "--predict_yaml", "argmax", "--output_dir")
    assert program(*flags, tmp_path / "first")[0] == 0
    path = tmp_path / "first" / TINY_RUN / "checkpoints" / "iter_0000003.pt"
    more = ("--set", f"model.init_from={path}", "optim.lr=1e-12", "optim.start_lr=0", "schedule.save_iters=1")
    status, _, err = program(*flags, tmp_path / "second", *more)
    assert status == 0, err
    first, second = (
        load_checkpoint(tmp_path / run / TINY_RUN / path.parent.name / path.name) for run in ("first", "second")
    )
    name = "encoder.model.conv_stem.weight"
    assert torch.allclose(first.model[name], second.model[name], atol=1e-7)
    assert torch.allclose(first.model["head.1.weight"], second.model["head.1.weight"], atol=1e-7)
    (tmp_path / "second" / TINY_RUN / "checkpoints" / "iter_0000003.pt").unlink()
    status, _, err = program(*flags, tmp_path / "second", *more[:1], "model.init_from=none.pt", *more[2:])
    assert status == 2
    assert f"model.init_from {path} -> none.pt" in err
    status, _, err = program(*flags, tmp_path / "third", *more[:1], "model.init_from=none.pt")
    assert status == 2
    assert "key 'model.init_from': got 'none.pt', which is no file" in err
