import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from exp.checkpoints.checkpoint import TRAINING_STATE, Saver, check_resumable, load_checkpoint, load_weights
from exp.checkpoints.checkpoint_files import find_checkpoint, list_checkpoints
from exp.files.tensors import load_tensor_file
from exp.runtime.errors import InputError

CONFIG = {
    "model": {"name": "m", "decoder": "unet", "pretrained": True},
    "data": {"name": "d", "crop_size": [4, 4]},
    "loss": {"name": "l"},
    "schedule": {"name": "s", "batch_size": 4, "num_workers": 2, "channels_last": True},
    "optim": {"name": "o", "lr": 0.1},
    "test": {"name": "t"},
    "seed": 0,
}


def linear(value: float) -> nn.Linear:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    return model


IMAGES = {"images": 10, "names_sha256": "0a"}


def saver(folder: Path, value: float = 1.0, averaged: float | None = None) -> Saver:
    ema = None if averaged is None else AveragedModel(linear(averaged))
    return Saver(folder, linear(value), ema, CONFIG, ["a", "b"], {"config_digest": "d"})


def save(folder: Path, iteration: int, keep: int = 2, value: float = 1.0, averaged: float | None = None) -> Path:
    writer = saver(folder, value, averaged)
    training = {
        **dict.fromkeys(TRAINING_STATE),
        "optimizer": torch.optim.AdamW(writer.model.parameters()).state_dict(),
        "validations": {10: 0.5, 20: -math.inf},
        "sampler": {"epoch": 3, "position": 4, **IMAGES},
    }
    return writer.save(iteration, 3, training, keep)


def test_what_is_saved_is_loaded(tmp_path: Path):
    loaded = load_checkpoint(save(tmp_path, 7))
    assert loaded.iteration == 7
    assert loaded.config == CONFIG
    assert loaded.classes == ["a", "b"]
    assert (loaded.model["weight"] == 1).all()
    assert loaded.ema is None
    assert loaded.training["validations"] == {10: 0.5, 20: -math.inf}
    assert loaded.training["optimizer"]["param_groups"][0]["params"] == [0, 1]


def test_raw_or_averaged_weights_are_loaded(tmp_path: Path):
    both, raw = load_checkpoint(save(tmp_path, 7, averaged=3.0)), load_checkpoint(save(tmp_path, 8))
    model = nn.Linear(2, 2)
    load_weights(model, both, CONFIG["model"], ["a", "b"])
    assert (model.weight == 1).all()
    load_weights(model, both, CONFIG["model"], ["a", "b"], "ema")
    assert (model.weight == 3).all()
    with pytest.raises(InputError, match=r"iter_0000008\.pt: got no moving average of the weights"):
        load_weights(model, raw, CONFIG["model"], ["a", "b"], "ema")


def test_the_best_is_no_checkpoint_to_go_on_from(tmp_path: Path):
    saver(tmp_path, 2.0).save_best(5, 0)
    assert find_checkpoint(tmp_path) is None
    best = load_checkpoint(tmp_path / "best.pt")
    assert best.training is None
    assert best.iteration == 5
    assert (best.model["weight"] == 2).all()


def test_the_newest_is_found_and_the_last_are_kept(tmp_path: Path):
    assert find_checkpoint(tmp_path) is None
    for iteration in (5, 900, 10_000_000, 70):
        save(tmp_path, iteration, keep=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["iter_0000070.pt", "iter_0000900.pt", "iter_10000000.pt"]
    assert find_checkpoint(tmp_path).name == "iter_10000000.pt"


def test_other_files_are_no_checkpoints_and_stay(tmp_path: Path):
    (tmp_path / "iter_best.pt").write_text("mine")
    (tmp_path / ".tmp-host-77-iter_0000001.pt.part").write_text("half")
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1)
    names = [".tmp-host-77-iter_0000001.pt.part", "iter_0000002.pt", "iter_0000002.pt.json", "iter_best.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"a: 1\nb: 2\n", b"hello world", None])
def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "iter_0000001.pt"
    torch.save({"weights": torch.zeros(2)}, path) if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"iter_0000001\.pt: got .* expected a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(InputError, match=r"iter_0000002\.pt: no such file, expected a checkpoint"):
        load_checkpoint(tmp_path / "iter_0000002.pt")


def test_resuming_under_other_settings_says_what_differs(tmp_path: Path):
    loaded = load_checkpoint(save(tmp_path, 1))
    free = {
        **CONFIG,
        "schedule": {**CONFIG["schedule"], "num_workers": 9},
        "model": {**CONFIG["model"], "pretrained": False},
    }
    check_resumable(loaded, free, IMAGES)
    later = {**CONFIG["schedule"], "tf32": "conv", "cudnn_benchmark": False}  # keys that the checkpoint does not have
    check_resumable(loaded, {**CONFIG, "schedule": later}, IMAGES)
    with pytest.raises(InputError, match=r"schedule\.tf32 conv -> all"):
        check_resumable(loaded, {**CONFIG, "schedule": {**later, "tf32": "all"}}, IMAGES)
    variants = [{**CONFIG, "model": {**CONFIG["model"], "variant": variant}} for variant in ("library", "paper")]
    check_resumable(loaded, variants[0], IMAGES)
    with pytest.raises(InputError, match=r"model\.variant library -> paper"):
        check_resumable(loaded, variants[1], IMAGES)
    other = {**CONFIG, "optim": {"name": "o", "lr": 0.2}, "seed": 5}
    with pytest.raises(InputError, match=r"optim\.lr 0\.1 -> 0\.2; seed 0 -> 5"):
        check_resumable(loaded, other, IMAGES)


def test_validations_are_free_unless_they_decide_when_to_stop(tmp_path: Path):
    loaded = load_checkpoint(save(tmp_path, 1))
    check_resumable(loaded, {**CONFIG, "schedule": {**CONFIG["schedule"], "val_iters": 5}}, IMAGES)
    stopping = {**CONFIG["schedule"], "early_stop": 2, "val_iters": 5}
    with pytest.raises(InputError, match=r"schedule\.early_stop None -> 2; schedule\.val_iters None -> 5"):
        check_resumable(loaded, {**CONFIG, "schedule": stopping}, IMAGES)


def test_flipped_bits_and_cut_files_are_noticed(tmp_path: Path):
    path = save(tmp_path, 1)
    data = path.read_bytes()
    weights = data.index(torch.ones(4).numpy().tobytes())
    for damaged in (
        data[: weights + 5] + bytes([data[weights + 5] ^ 16]) + data[weights + 6 :],
        data[:-100],
        data[:200],
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"iter_0000001\.pt: got a damaged file \(its SHA-256 is"):
            load_checkpoint(path)
        facts = path.with_name("iter_0000001.pt.json")
        facts.rename(tmp_path / "away")  # without it, the checksums inside the file remain
        with pytest.raises(InputError, match=r"iter_0000001\.pt: got a file that cannot be read"):
            load_checkpoint(path)
        (tmp_path / "away").rename(facts)


def test_a_safetensors_file_that_is_none_is_refused(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header")
    with pytest.raises(InputError, match=r"weights\.safetensors: got a file that cannot be read"):
        load_tensor_file(path, "a state dict")


def test_other_parameters_of_the_same_yaml_are_refused(tmp_path: Path):
    loaded = load_checkpoint(save(tmp_path, 1))
    with pytest.raises(InputError, match=r"iter_0000001\.pt: got other parameters than the model's"):
        load_weights(nn.Linear(3, 3), loaded, CONFIG["model"], ["a", "b"])


def test_other_training_images_are_refused(tmp_path: Path):
    loaded = load_checkpoint(save(tmp_path, 1))
    with pytest.raises(InputError, match="images 10 -> 11; names_sha256 0a -> 0b"):
        check_resumable(loaded, CONFIG, {"images": 11, "names_sha256": "0b"})


def test_weights_alone_are_nothing_to_go_on_from(tmp_path: Path):
    saver(tmp_path).save_best(5, 0)
    with pytest.raises(InputError, match=r"best\.pt: got a checkpoint without the whole state of a training"):
        check_resumable(load_checkpoint(tmp_path / "best.pt"), CONFIG, IMAGES)


def test_exported_weights_are_read_back_and_by_other_programs(tmp_path: Path):
    saver(tmp_path, 1.0, averaged=3.0).export("last", 7, 2)
    model = nn.Linear(2, 2)
    for name, weights, value in (("last", "raw", 1), ("last.ema", "ema", 3)):
        path = tmp_path / f"{name}.safetensors"
        assert (load_file(path)["weight"] == value).all()
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["rankseg_rma"])["config"]["model"]["decoder"] == "unet"
        loaded = load_checkpoint(path)
        assert (loaded.iteration, loaded.classes, loaded.config) == (7, ["a", "b"], CONFIG)
        load_weights(model, loaded, CONFIG["model"], ["a", "b"], weights)
        assert (model.weight == value).all()
        other = "raw" if weights == "ema" else "ema"
        with pytest.raises(InputError, match=rf"{name}\.safetensors: got (no|the) moving average"):
            load_weights(model, loaded, CONFIG["model"], ["a", "b"], other)


def test_safetensors_of_other_programs_are_no_checkpoint(tmp_path: Path):
    path = tmp_path / "theirs.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"theirs\.safetensors: got weights without the config of a run"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [{"iteration": "7"}, {"model": {"w": "text"}}, {"config": {}}, {"classes": [1]}, {"config": CONFIG | {"data": {}}}],
)
def test_fields_of_another_kind_are_refused(tmp_path: Path, change: dict):
    content = {"iteration": 7, "model": {}, "ema": None, "training": None, "config": CONFIG, "classes": ["a"]}
    torch.save({**content, **change}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"odd\.pt: got other content, expected a checkpoint"):
        load_checkpoint(tmp_path / "odd.pt")
