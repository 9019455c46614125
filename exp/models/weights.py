"""A file of encoder weights -> the encoder, by name or, where the names differ, by order and shape."""

import logging
from pathlib import Path

from timm.models import adapt_input_conv
from torch import Tensor, nn

from exp.files.tensors import load_tensor_file
from exp.runtime.errors import InputError

COUNTER = "num_batches_tracked"


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Fill an encoder from a local state dict (.pt, .pth, .safetensors).

    Every tensor of the encoder must be found: under its own name, or else (a file of another library's naming) at
    its place in the file with the same shape. Tensors after the encoder's last, of a classifier, are left aside.
    """
    weights = load_tensor_file(Path(path), "a state dict")
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise InputError(f"{path}: got {type(weights).__name__}, expected a state dict of tensors by name")
    model = getattr(encoder, "model", encoder)  # timm's network inside smp's wrapper
    # Old files lack the batch counters, which the network does not need.
    own = {name: value for name, value in model.state_dict().items() if not name.endswith(COUNTER)}
    given = {name: value for name, value in weights.items() if not name.endswith(COUNTER)}
    matched = given if own.keys() <= given.keys() else _match_by_order(own, given, path)
    stem = next((name for name in own if own[name].dim() == 4), None)
    if stem and matched[stem].shape[1:2] == (3,) != own[stem].shape[1:2]:  # for RGB: summed (repeated) as timm does it
        matched = matched | {stem: adapt_input_conv(own[stem].shape[1], matched[stem])}
    for name, value in own.items():
        if matched[name].shape != value.shape:
            got, expected = tuple(matched[name].shape), tuple(value.shape)
            raise InputError(f"{path}: got shape {got} for the encoder's '{name}', expected {expected}")
    model.load_state_dict({name: matched[name] for name in own}, strict=False)


def _match_by_order(own: dict[str, Tensor], given: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The encoder's tensors and a file's, under other names -> the file's first ones under the encoder's names."""
    if len(given) < len(own):
        raise InputError(f"{path}: got {len(given)} tensors, expected the encoder's {len(own)}")
    for name, other in zip(own, given):
        if name.rpartition(".")[2] != other.rpartition(".")[2]:  # weight, bias, running_mean, running_var
            raise InputError(f"{path}: got '{other}' in the place of the encoder's '{name}', expected the same order")
    logging.getLogger("exp").warning(
        "%s: other names than the encoder's; its first %d tensors are matched by order and shape", path, len(own)
    )
    return dict(zip(own, given.values()))
