import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from exp.checkpoints.checkpoint import (
    PLAIN_STATE,
    TRAINING_STATE,
    Saver,
    check_name,
    check_resumable,
    load_checkpoint,
    load_weights,
)
from exp.checkpoints.checkpoint_files import find_checkpoint, find_damage, list_checkpoints
from exp.config.cli import DEFAULT_YAMLS
from exp.config.experiment import load_experiment
from exp.files.tensors import load_tensor_file
from exp.runtime.errors import InputError

YAMLS = {group: [name] if isinstance(name, str) else name for group, name in DEFAULT_YAMLS.items()}
CONFIG = load_experiment(YAMLS, [], 0).to_dict()
del CONFIG["predict"]  # which is not of the weights, and is left aside


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
        **PLAIN_STATE,
        "optimizer": torch.optim.AdamW(writer.model.parameters()).state_dict(),
        "validations": {"name": "m", "scores": {1: -math.inf}},
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
    assert loaded.training["validations"] == {"name": "m", "scores": {1: -math.inf}}
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
    for later in ("tf32", "cudnn_benchmark"):  # keys that an earlier version did not have
        del loaded.config["schedule"][later]
    check_resumable(loaded, CONFIG, IMAGES)
    with pytest.raises(InputError, match=r"schedule\.tf32 conv -> all"):
        check_resumable(loaded, {**CONFIG, "schedule": {**CONFIG["schedule"], "tf32": "all"}}, IMAGES)
    for model in (CONFIG["model"], {k: v for k, v in CONFIG["model"].items() if k != "variant"}):
        check_resumable(loaded, {**CONFIG, "model": model}, IMAGES)
    with pytest.raises(InputError, match=r"model\.variant library -> paper"):
        check_resumable(loaded, {**CONFIG, "model": {**CONFIG["model"], "variant": "paper"}}, IMAGES)
    other = {**CONFIG, "optim": {**CONFIG["optim"], "lr": 0.2}, "seed": 5}
    with pytest.raises(InputError, match=r"optim\.lr 0\.0006 -> 0\.2; seed 0 -> 5"):
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
    [
        {"iteration": "7"},
        {"iteration": True},
        {"model": {"w": "text"}},
        {"model": {3: torch.ones(1)}},
        {"ema": [1]},
        {"training": 5},
        {"config": [1]},
        {"classes": [1]},
        {"more": 1},
    ],
)
def test_fields_of_another_kind_are_refused(tmp_path: Path, change: dict):
    content = {"iteration": 7, "model": {}, "ema": None, "training": None, "config": CONFIG, "classes": ["a"]}
    torch.save({**content, **change}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"odd\.pt: got other content, expected a checkpoint"):
        load_checkpoint(tmp_path / "odd.pt")


def shared_leaves() -> list:
    """Some bytes that stand for 2^40 values."""
    value: list = [0]
    for _ in range(40):
        value = [value, value]
    return value


def nested() -> list:
    value: list = []
    for _ in range(150):
        value = [value]
    return value


ODD_CONFIGS = {  # group, key: a value that no YAML could have
    ("data", "dataset"): "../../etc",
    ("data", "crop_size"): [True, True],
    ("data", "train_split"): "../out",
    ("data", "mean"): [math.nan, 0.0, 0.0],
    ("data", "label_map"): {(1, (2, 3)): 0},
    ("data", "classes"): shared_leaves(),
    ("data", "palette"): nested(),
    ("test", "crop_size"): [16384, 16384],
    ("test", "scales"): [math.inf],
    ("test", "window_batch"): 10**12,
    ("test", "temperature"): torch.ones(2),
    ("test", "metrics"): shared_leaves(),
    ("model", "output_stride"): torch.ones(2),
    ("model", "encoder"): "resnet18/../x",
    ("model", "decoder_channels"): [10**6] * 5,
    ("loss", "smooth"): math.nan,
    ("optim", "lr"): -1.0,
    ("optim", "weight_decay"): "0",
    ("schedule", "batch_size"): 10**30,
    ("schedule", "num_workers"): -1,
    ("schedule", (1, 2)): [3],
    ("schedule", "unheard_of"): shared_leaves(),
}


IN_JSON = [key for key, value in ODD_CONFIGS.items() if isinstance(value, (str, int, float)) or key[1] == "crop_size"]


@pytest.mark.parametrize(
    ("place", "suffix"), [*((key, ".pt") for key in ODD_CONFIGS), *((key, ".safetensors") for key in IN_JSON)], ids=str
)
def test_a_config_that_no_yaml_could_have_is_refused(tmp_path: Path, place: tuple[str, str], suffix: str):
    group, key = place
    content = {"iteration": 7, "model": {}, "ema": None, "training": None, "classes": ["a"]}
    content["config"] = {**CONFIG, group: {**CONFIG[group], key: ODD_CONFIGS[place]}}
    path = tmp_path / f"odd{suffix}"
    if suffix == ".pt":
        torch.save(content, path)
    else:
        described = {"iteration": 7, "weights": "raw", "config": content["config"], "classes": ["a"]}
        save_file({"w": torch.ones(1)}, path, {"rankseg_rma": json.dumps(described)})
    with pytest.raises(InputError, match=rf"odd{re.escape(suffix)}: ") as refused:
        load_checkpoint(path)
    assert len(str(refused.value)) < 1000
    assert str(key) in str(refused.value) or isinstance(key, tuple)


@pytest.mark.parametrize("change", [{"seed": None}, {"seed": 2**40}, {"data": []}, {"test": {}}, {"model": None}])
def test_a_config_without_its_groups_is_refused(tmp_path: Path, change: dict):
    content = {"iteration": 7, "model": {}, "ema": None, "training": None, "classes": ["a"]}
    torch.save({**content, "config": CONFIG | change}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"odd\.pt: .*expected"):
        load_checkpoint(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, " " * 2**21 + "{}", '{"weights": "raw"}', "[]", '{"config": {}}', "NaN"]
)
def test_metadata_that_are_no_config_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "odd.safetensors"
    save_file({"w": torch.ones(1)}, path, {"rankseg_rma": text})
    with pytest.raises(InputError, match=r"odd\.safetensors: got weights without the config of a run"):
        load_checkpoint(path)


def test_a_label_map_comes_back_from_json_with_numbers(tmp_path: Path):
    folder = {"images": "i", "labels": "l", "classes": ["a", "b"], "palette": [[0, 0, 0], [1, 1, 1]]}
    data = {**CONFIG["data"], **folder, "dataset": "folder", "label_map": {0: 0, 7: 1}}
    Saver(tmp_path, linear(1.0), None, {**CONFIG, "data": data}, ["a", "b"], {}).export("last", 7, 2)
    assert load_checkpoint(tmp_path / "last.safetensors").config["data"]["label_map"] == {0: 0, 7: 1}


def test_files_that_never_end_are_no_checkpoints(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo.pt")
    os.mkfifo(tmp_path / "fifo.safetensors")
    for name in ("zero.pt", "zero.safetensors"):
        (tmp_path / name).symlink_to("/dev/zero")
    for path in sorted(tmp_path.iterdir()):
        assert find_damage(path) == "it is no file"
        with pytest.raises(InputError, match=rf"{path.name}: got something that is no file, expected a checkpoint"):
            load_checkpoint(path)
    save(tmp_path, 1)
    for number, name in enumerate(("fifo.pt", "zero.pt"), start=2):
        (tmp_path / name).rename(tmp_path / f"iter_{number:07d}.pt")
        (tmp_path / f"iter_{number:07d}.pt.json").write_bytes((tmp_path / "iter_0000001.pt.json").read_bytes())
    assert find_checkpoint(tmp_path).name == "iter_0000001.pt"


def test_a_file_of_another_iteration_than_its_name_says_is_refused(tmp_path: Path):
    whole = save(tmp_path, 7)
    check_name(load_checkpoint(whole))
    copied = tmp_path / "iter_9999999.pt"
    copied.write_bytes(whole.read_bytes())
    assert find_checkpoint(tmp_path) == copied
    with pytest.raises(InputError, match=r"iter_9999999\.pt: got the weights of iteration 7"):
        check_name(load_checkpoint(copied))
    copied.rename(tmp_path / "mine.pt")
    check_name(load_checkpoint(tmp_path / "mine.pt"))
