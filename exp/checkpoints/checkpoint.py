"""What a checkpoint holds; saving it, loading it without running code, and comparing it with the flags."""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from exp.checkpoints.checkpoint_files import PATTERN, facts_path, find_damage, remove_older, write_checked
from exp.checkpoints.states import find_difference
from exp.config.experiment import FREE_KEYS, GROUPS, LATER_KEYS, TRAINING_GROUPS, with_number_keys
from exp.config.strict_yaml import build_dataclass, show
from exp.files.nifti import is_orientation
from exp.files.tensors import MAX_METADATA, METADATA, find_tensors, load_tensor_file
from exp.runtime.errors import InputError

BEST, LAST = "best", "last"
EXPECTED = "a checkpoint of this program"
# What `training` of a checkpoint holds: what decides the steps to come, besides weights and averages.
TRAINING_STATE = ("optimizer", "scheduler", "scaler", "faults", "validations", "sampler", "world_size")
# Those of them that no network decides, as they are saved; the scores by iteration are looked at beside.
PLAIN_STATE = {
    "faults": {"in_row": 0, "steps": 0, "images": 0},
    "validations": {"name": "", "scores": {}},
    "sampler": {"epoch": 0, "position": 0, "images": 0, "names_sha256": ""},
    "world_size": 1,
}


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors, the iteration it was taken after, the config of its training, the classes.

    model: the state dict, None in a safetensors file of the averaged weights. ema: the averaged model's state dict, or
    None where none is kept. training: TRAINING_STATE, or None in files that are there to be evaluated.
    orientation: of slices of volumes, the one that they were in; None for images, and in older files.
    """

    path: Path
    iteration: int
    model: dict[str, Any] | None
    ema: dict[str, Any] | None
    training: dict[str, Any] | None
    config: dict[str, Any]
    classes: list[str]
    orientation: str | None = None


@dataclass(frozen=True)
class Saver:
    """Writes the files of one run's checkpoints.

    facts: what the JSON beside each file says besides its checksum and iteration (config digest, versions).
    """

    folder: Path
    model: nn.Module
    ema: nn.Module | None
    config: dict[str, Any]
    classes: list[str]
    facts: Mapping[str, Any]
    orientation: str | None = None

    @property
    def _oriented(self) -> dict[str, str]:
        """What files of networks of volumes say besides."""
        return {} if self.orientation is None else {"orientation": self.orientation}

    def save(self, iteration: int, epoch: int, training: dict[str, Any], keep: int) -> Path:
        """Write <folder>/iter_<iteration>.pt, to resume from; of the older ones the last keep - 1 stay.

        InputError if there is no room for it on the disk.
        """
        path = self.folder / f"iter_{iteration:07d}.pt"
        self._write(path, iteration, epoch, training)
        remove_older(self.folder, keep)
        return path

    def save_best(self, iteration: int, epoch: int) -> None:
        """Write <folder>/best.pt, which --model_checkpoint best evaluates, and its weights for other programs."""
        self._write(self.folder / f"{BEST}.pt", iteration, epoch, None)
        self.export(BEST, iteration, epoch)

    def export(self, name: str, iteration: int, epoch: int) -> None:
        """Write the weights alone to <folder>/<name>.safetensors, the config in its metadata, for other programs.

        The averaged ones to <name>.ema.safetensors, where they are kept.
        """
        averages = None if self.ema is None else averaged_weights(self.ema.state_dict())
        for kind, suffix, state in (("raw", "", self.model.state_dict()), ("ema", ".ema", averages)):
            if state is None:
                continue
            described = {"iteration": iteration, "weights": kind, "config": self.config, "classes": self.classes}
            described |= self._oriented
            metadata = {"format": "pt", METADATA: json.dumps(described)}
            tensors = {key: value.cpu().contiguous() for key, value in state.items()}
            write = partial(safetensors.torch.save_file, tensors, metadata=metadata)
            self._write_checked(self.folder / f"{name}{suffix}.safetensors", write, iteration, epoch, tensors)

    def _write(self, path: Path, iteration: int, epoch: int, training: dict[str, Any] | None) -> None:
        content = {
            "iteration": iteration,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "training": training,
            "config": self.config,
            "classes": self.classes,
            **self._oriented,
        }

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                torch.save(content, file)

        self._write_checked(path, write, iteration, epoch, content)

    def _write_checked(self, path: Path, write: Any, iteration: int, epoch: int, content: Any) -> None:
        facts = {"iteration": iteration, "epoch": epoch, **self.facts}
        write_checked(path, write, facts, needed=count_bytes(content))


def count_bytes(content: Any) -> int:
    """Nested dicts and lists -> the bytes of the tensors in them, each once."""
    storages = [tensor.untyped_storage() for tensor in find_tensors(content)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a file of Saver, .pt or .safetensors; InputError if it is damaged or anything else. Runs no code of it."""
    damage = find_damage(path) if facts_path(path).exists() else None
    if damage:
        raise InputError(f"{path}: got a damaged file ({damage}), expected {EXPECTED}")
    content = _load_safetensors(path) if path.suffix == ".safetensors" else load_tensor_file(path, EXPECTED)
    try:
        checkpoint = Checkpoint(path=path, **content)
        _check_kinds(checkpoint)
    except TypeError:
        raise InputError(f"{path}: got other content, expected {EXPECTED}") from None
    return replace(checkpoint, config=_checked_config(checkpoint))


def _load_safetensors(path: Path) -> dict[str, Any]:
    """A file of export -> the fields of Checkpoint but for its path."""
    tensors = load_tensor_file(path, EXPECTED)
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {})[METADATA]
        if len(text) > MAX_METADATA:
            raise ValueError
        described = json.loads(text)
        raw = described.pop("weights") == "raw"
        described["config"] = with_number_keys(described["config"])
        ema = None if raw else {f"module.{name}": value for name, value in tensors.items()}
        return {"model": tensors if raw else None, "ema": ema, "training": None, **described}
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError, SafetensorError):
        raise InputError(f"{path}: got weights without the config of a run of this program beside them") from None


def _check_kinds(checkpoint: Checkpoint) -> None:
    """TypeError for a file whose fields are not of their kinds; what `training` holds is looked at by who resumes."""
    for state in (checkpoint.model, checkpoint.ema):
        named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
        if state is not None and not (named and all(isinstance(value, Tensor) for value in state.values())):
            raise TypeError
    fits = (
        type(checkpoint.iteration) is int
        and isinstance(checkpoint.training, dict | None)
        and isinstance(checkpoint.config, dict)
        and isinstance(checkpoint.classes, list)
        and all(isinstance(name, str) for name in checkpoint.classes)
        and (checkpoint.orientation is None or is_orientation(checkpoint.orientation))
    )
    if not fits:
        raise TypeError


def _checked_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The groups of a checkpoint's config that decided its weights, and how they were evaluated, as plain values.

    InputError for what no YAML could say. What else the file has in its config is left aside.
    """
    checked = {}
    for group in (*TRAINING_GROUPS, "test"):
        values = checkpoint.config.get(group)
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise InputError(f"{checkpoint.path}: got no {group} settings, expected {EXPECTED}")
        build_dataclass(GROUPS[group], values, checkpoint.path, {})
        checked[group] = values
    seed = checkpoint.config.get("seed")
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise InputError(f"{checkpoint.path}: got the seed {show(seed)}, expected {EXPECTED}")
    return {**checked, "seed": seed}


def check_name(checkpoint: Checkpoint) -> None:
    """InputError for a file iter_<number>.pt of another iteration: the number says which is the newest."""
    match = PATTERN.match(checkpoint.path.name)
    if match and int(match[1]) != checkpoint.iteration:
        raise InputError(
            f"{checkpoint.path}: got the weights of iteration {checkpoint.iteration}, expected those that the name "
            "says: remove or rename it (a copy of another?)"
        )


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    model_config: dict[str, Any],
    classes: list[str],
    weights: Literal["raw", "ema"] = "raw",
) -> None:
    """Fill the raw model from a checkpoint of the same architecture and classes; else InputError with what differs."""
    if weights == "ema" and checkpoint.ema is None:
        raise InputError(
            f"{checkpoint.path}: got no moving average of the weights, expected one for test.weights=ema: train with "
            "optim.ema_decay"
        )
    if weights == "raw" and checkpoint.model is None:
        raise InputError(f"{checkpoint.path}: got the moving average alone, expected test.weights=ema with it")
    differences = _differences({"model": checkpoint.config["model"]}, {"model": model_config})
    if checkpoint.classes != classes:
        differences.append(f"classes {checkpoint.classes} -> {classes}")
    if differences:
        raise InputError(
            f"{checkpoint.path}: got a checkpoint of another model, expected that of the flags "
            f"(checkpoint -> flags: {'; '.join(differences)})"
        )
    state = checkpoint.model if weights == "raw" else averaged_weights(checkpoint.ema)
    own = model.state_dict()
    # Floating-point numbers of another width are taken, in files that somebody has made smaller.
    state = {
        name: value.to(own[name].dtype) if name in own and _are_floats(value, own[name]) else value
        for name, value in state.items()
    }
    if difference := find_difference(state, dict(own), "weights"):
        raise InputError(f"{checkpoint.path}: got other parameters than the model's ({difference})")
    model.load_state_dict(state)


def _are_floats(*tensors: Tensor) -> bool:
    return all(tensor.is_floating_point() for tensor in tensors)


def check_orientation(checkpoint: Checkpoint, orientations: Sequence[str]) -> None:
    """InputError where slices of volumes are in another orientation than those that the network was trained on."""
    if checkpoint.orientation is not None and orientations not in ((), (checkpoint.orientation,)):
        raise InputError(
            f"{checkpoint.path}: got a network of slices in {checkpoint.orientation}, expected one of slices in "
            f"{', '.join(orientations)}, as the data set's are: prepare it again (DATA.md)"
        )


def weights_checksum(model: nn.Module) -> str:
    """CRC-32 of the parameters and buffers, to tell the weights of two models apart."""
    crc = 0
    for value in model.state_dict().values():
        flat = value.detach().cpu().contiguous().reshape(-1)
        crc = zlib.crc32(flat.view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def averaged_weights(ema: dict[str, Any]) -> dict[str, Any]:
    """The state dict of an AveragedModel -> that of the model inside it."""
    return {name.removeprefix("module."): value for name, value in ema.items() if name.startswith("module.")}


def check_resumable(checkpoint: Checkpoint, config: dict[str, Any], images: dict[str, Any]) -> None:
    """InputError with what differs if a run under `config` is not the continuation of the checkpoint's.

    images: how many training images there are now, and the checksum of their names (describe_images).
    """
    if checkpoint.training is None or not set(TRAINING_STATE) <= checkpoint.training.keys():
        raise InputError(
            f"{checkpoint.path}: got a checkpoint without the whole state of a training (of an earlier version?), "
            "expected one to resume from; --test-only evaluates it"
        )
    if difference := _find_odd_state(checkpoint):
        raise unlike(checkpoint, difference)
    names = (*TRAINING_GROUPS, "seed")
    differences = _differences({n: checkpoint.config[n] for n in names}, {n: config[n] for n in names})
    before, after = (c["schedule"].get("val_iters") for c in (checkpoint.config, config))
    if config["schedule"].get("early_stop") is not None and before != after:  # validations decide what comes
        differences.append(f"schedule.val_iters {before} -> {after}")
    before, after = (c["model"].get("init_from") for c in (checkpoint.config, config))
    if before != after:
        differences.append(f"model.init_from {before} -> {after}")
    stored = {name: checkpoint.training["sampler"][name] for name in images}
    differences += [f"{name} {stored[name]} -> {images[name]}" for name in images if stored[name] != images[name]]
    if differences:
        raise InputError(
            f"{checkpoint.path}: got a run trained with other settings (checkpoint -> flags: "
            f"{'; '.join(differences)}), expected the same ones, or another --output_dir"
        )


def _find_odd_state(checkpoint: Checkpoint) -> str | None:
    """Where what no network decides of a training's state is not as it is saved; None: nowhere."""
    plain = {name: checkpoint.training[name] for name in PLAIN_STATE}
    validations = plain["validations"]
    scores = validations.get("scores") if isinstance(validations, dict) else None
    if isinstance(scores, dict):
        for at, score in scores.items():
            number = type(at) is int and type(score) in (int, float) and 0 < at <= checkpoint.iteration
            if not number or math.isnan(score) or score == math.inf:
                return f"validations.scores: got {show(score)} for iteration {show(at)}"
        plain["validations"] = {**validations, "scores": {}}
    return find_difference(plain, PLAIN_STATE, "training")


def unlike(checkpoint: Checkpoint, difference: str) -> InputError:
    return InputError(
        f"{checkpoint.path}: got another state than this run would save ({difference}), expected one to resume from"
    )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """'group.key old -> new' for every key that matters."""
    rows = []
    for group, values in new.items():
        if not isinstance(values, dict):
            rows += [f"{group} {old[group]} -> {values}"] if old[group] != values else []
            continue
        for key in sorted((values.keys() | old[group].keys()) - {"name", *FREE_KEYS.get(group, ())}):
            absent = LATER_KEYS.get(group, {}).get(key)
            before, after = old[group].get(key, absent), values.get(key, absent)
            rows += [f"{group}.{key} {before} -> {after}"] if before != after else []
    return rows
