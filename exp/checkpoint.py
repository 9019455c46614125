"""Checkpoints: written to a temporary file and renamed, found by their iteration, loaded without unpickling code."""

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from exp.config import FREE_KEYS, TRAINING_GROUPS
from exp.errors import InputError
from exp.tensor_files import load_tensor_file

PATTERN = re.compile(r"iter_(\d+)\.pt$")
BEST = "best.pt"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors, the iteration it was taken after, the config that it belongs to, the classes.

    ema: the averaged model's state dict, or None where none is kept. training: what else decides the steps to come
    (optimiser, schedule, scaler, validations so far), or None in best.pt, which is there to be evaluated.
    """

    path: Path
    iteration: int
    model: dict[str, Any]
    ema: dict[str, Any] | None
    training: dict[str, Any] | None
    config: dict[str, Any]
    classes: list[str]


def save_checkpoint(
    folder: Path,
    iteration: int,
    *,
    model: nn.Module,
    ema: nn.Module | None,
    training: dict[str, Any],
    config: dict[str, Any],
    classes: list[str],
    keep: int,
) -> Path:
    """Write folder/iter_<iteration>.pt; of the older ones the last keep - 1 stay."""
    path = folder / f"iter_{iteration:07d}.pt"
    _write(path, _content(iteration, model, ema, training, config, classes))
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def save_best(
    folder: Path, iteration: int, *, model: nn.Module, ema: nn.Module | None, config: dict, classes: list[str]
) -> Path:
    """Write folder/best.pt: the weights alone, to be evaluated."""
    path = folder / BEST
    _write(path, _content(iteration, model, ema, None, config, classes))
    return path


def _content(
    iteration: int,
    model: nn.Module,
    ema: nn.Module | None,
    training: dict[str, Any] | None,
    config: dict[str, Any],
    classes: list[str],
) -> dict[str, Any]:
    """The fields of Checkpoint but for its path."""
    return {
        "iteration": iteration,
        "model": model.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
        "training": training,
        "config": config,
        "classes": classes,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a temporary file and rename it: `path` is the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".pt.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("iter_*.pt") if (match := PATTERN.match(path.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return (list_checkpoints(folder) or [None])[-1]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a file written by save_checkpoint; InputError if it is anything else."""
    content = load_tensor_file(path, "a checkpoint of this program")
    try:
        return Checkpoint(path=path, **content)
    except TypeError:
        raise InputError(f"{path}: got other content, expected a checkpoint of this program") from None


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
    differences = _differences({"model": checkpoint.config["model"]}, {"model": model_config})
    if checkpoint.classes != classes:
        same_number = len(checkpoint.classes) == len(classes)
        differences.append(
            f"classes {checkpoint.classes} -> {classes}"
            if same_number
            else f"{len(checkpoint.classes)} classes -> {len(classes)}"
        )
    if differences:
        raise InputError(
            f"{checkpoint.path}: got a checkpoint of another model, expected that of the flags "
            f"(checkpoint -> flags: {'; '.join(differences)})"
        )
    try:
        model.load_state_dict(checkpoint.model if weights == "raw" else averaged_weights(checkpoint.ema))
    except RuntimeError as error:  # the libraries' names of parameters changed between their versions
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{checkpoint.path}: got other parameters than the model's ({reason})") from None


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


def check_resumable(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """InputError with what differs if a run under `config` is not the continuation of the checkpoint's."""
    names = (*TRAINING_GROUPS, "seed")
    differences = _differences({n: checkpoint.config[n] for n in names}, {n: config[n] for n in names})
    before, after = (c["schedule"].get("val_iters") for c in (checkpoint.config, config))
    if config["schedule"].get("early_stop") is not None and before != after:  # validations decide what comes
        differences.append(f"schedule.val_iters {before} -> {after}")
    if differences:
        raise InputError(
            f"{checkpoint.path}: got a run trained with other settings (checkpoint -> flags: "
            f"{'; '.join(differences)}), expected the same ones, or another --output_dir"
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """'group.key old -> new' for every key that matters."""
    rows = []
    for group, values in new.items():
        if not isinstance(values, dict):
            rows += [f"{group} {old[group]} -> {values}"] if old[group] != values else []
            continue
        for key in sorted((values.keys() | old[group].keys()) - {"name", *FREE_KEYS.get(group, ())}):
            before, after = old[group].get(key), values.get(key)
            rows += [f"{group}.{key} {before} -> {after}"] if before != after else []
    return rows
