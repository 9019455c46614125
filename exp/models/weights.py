"""A file of encoder weights -> the encoder, by name or, where the names differ, by order and shape."""

import logging
import pickle
import socket
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor, nn

from exp.errors import InputError


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Fill an encoder from a local state dict (.pt, .pth, .safetensors).

    Every tensor of the encoder must be found: under its own name, or else (a file of another library's naming) at
    its place in the file with the same shape. Tensors after the encoder's last, of a classifier, are left aside.
    Raises InputError with the first tensor that does not fit.
    """
    weights = read_state_dict(Path(path))
    model = getattr(encoder, "model", encoder)  # timm's network inside smp's wrapper
    own = model.state_dict()
    if own.keys() <= weights.keys():
        matched = {name: weights[name] for name in own}
    else:
        # Old files lack the batch counters, which the network does not need.
        names = [name for name in own if not name.endswith("num_batches_tracked")]
        values = [(name, v) for name, v in weights.items() if not name.endswith("num_batches_tracked")]
        if len(values) < len(names):
            raise InputError(f"{path}: got {len(values)} tensors, expected the encoder's {len(names)}")
        matched = {name: value for name, (_, value) in zip(names, values)}
        logging.getLogger("exp").warning(
            "%s: other names than the encoder's; its first %d tensors are matched by order and shape", path, len(names)
        )
    for name, value in matched.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{path}: got shape {tuple(value.shape)} for the encoder's '{name}', expected {tuple(own[name].shape)}"
            )
    model.load_state_dict(matched, strict=False)


def use_cache_without_network() -> None:
    """Where the hub's name cannot be resolved, let its client look in the local cache alone: it retries for minutes."""
    if urllib.request.getproxies():
        return  # the proxy resolves names
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A file -> its tensors by name, without running any code that the file may hold."""
    if not path.is_file():
        raise InputError(f"model.pretrained: {path}: no such file")
    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: got a file that cannot be read ({reason}), expected a state dict") from None
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise InputError(f"{path}: got {type(weights).__name__}, expected a state dict of tensors by name")
    return weights
