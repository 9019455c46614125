"""Files of weights -> an encoder, by name or, where the names differ, by order and shape; or a whole network."""

import logging
from collections.abc import Sequence
from pathlib import Path

from timm.models import adapt_input_conv
from torch import Tensor, nn

from exp.config.experiment import load_published, names_network
from exp.files.tensors import load_tensor_file, read_classes
from exp.runtime.errors import InputError

HUB = "https://huggingface.co"
COUNTER = "num_batches_tracked"
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which files have a state dict among other things
HEADS = ("head.", "aux_head.")
# Of a Segmentor: the layers with an output for each class; CPT has such tensors in its decoder, too.
CLASSIFIERS = ("head.", "aux_head.4.", "decoder.memory", "decoder.scores.1.")


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Fill an encoder from a local state dict (.pt, .pth, .safetensors), of the encoder alone or of a whole network, or
    from a published network (published/NAME).

    Every tensor of the encoder must be found: under its own name, with one prefix before all of them ("encoder.",
    say), or else (a file of another library's naming) at its place in the file with the same shape. Tensors after the
    encoder's last, of a classifier, are left aside.
    """
    weights, _ = _read_weights(path)
    model = getattr(encoder, "model", encoder)  # timm's network inside smp's wrapper
    own, given = _counted(model.state_dict()), _counted(weights)
    matched = _match_by_name(own, given)
    if matched is None:
        if names_network(path) or Path(path).suffix == ".safetensors":  # which sorts its names
            name = next(iter(own))
            raise InputError(f"{path}: got no tensor '{name}' of the encoder, expected all of its names")
        matched = _match_by_order(own, given, path)
    stem = next((name for name in own if own[name].dim() == 4), None)
    if stem and matched[stem].shape[1:2] == (3,) != own[stem].shape[1:2]:  # for RGB: summed (repeated) as timm does it
        matched = matched | {stem: adapt_input_conv(own[stem].shape[1], matched[stem])}
    for name, value in own.items():
        _check_shape(path, f"the encoder's '{name}'", matched[name], value)
    model.load_state_dict({name: matched[name] for name in own}, strict=False)


def load_network_weights(model: nn.Module, path: str | Path, classes: Sequence[str]) -> None:
    """Fill a Segmentor from a file of a network of the same encoder and decoder, such as a checkpoint of this program.

    A classifier of other classes (by number, and by name where the file has names) stays as it is. What is not taken,
    from the file or by the network, is told line by line. InputError for any other tensor that is not there.
    """
    weights, known = _read_weights(path)
    own, given = _counted(model.state_dict()), _counted(weights)
    body = {name: value for name, value in own.items() if not name.startswith(HEADS)}
    prefix = _find_prefix(body, given)
    if prefix is None:
        missing = next(name for name in body if name not in given)
        raise InputError(f"{path}: got no tensor '{missing}', expected a network of the same encoder and decoder")
    given = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    say, taken, others = logging.getLogger("exp").warning, {}, known is not None and list(known) != list(classes)
    for name, value in own.items():
        if name.startswith(HEADS) and name not in given:
            say("%s: got no %s: drawn at random", path, name)
            continue
        if name.startswith(CLASSIFIERS) and (others or given[name].shape != value.shape):
            say("%s: got %s of other classes: drawn at random", path, name)
            continue
        _check_shape(path, f"'{name}'", given[name], value)
        taken[name] = given[name]
    for name in sorted(given.keys() - own.keys()):
        say("%s: got %s, which the network does not have: left aside", path, name)
    model.load_state_dict(taken, strict=False)


def _read_weights(path: str | Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """A file, or the name of a published network -> its state dict, and the names of its classes where it has them."""
    if names_network(path):
        from exp.models.published import class_names, network_weights  # which build networks, with this file

        return network_weights(path), class_names(load_published(path))
    path = Path(path)
    content = load_tensor_file(path, "a state dict")
    classes = read_classes(path) if path.suffix == ".safetensors" else None
    for _ in range(2):  # {"model": {"state_dict": ...}}
        inner = next(
            (key for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)), None
        )
        if inner is None:
            break
        classes = content.get("classes", classes)
        content = content[inner]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path}: got {type(content).__name__}, expected a state dict of tensors by name")
    return content, classes if isinstance(classes, list) else None


def _counted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the batch counters, which old files lack, and which a network does not need."""
    return {name: value for name, value in weights.items() if not name.endswith(COUNTER)}


def _find_prefix(own: dict[str, Tensor], given: dict[str, Tensor]) -> str | None:
    """What stands before all of a network's names in a file, the shortest; None if it does not have all of them."""
    first = next(iter(own))
    prefixes = sorted((name.removesuffix(first) for name in given if name.endswith(first)), key=len)
    return next((prefix for prefix in prefixes if all(f"{prefix}{name}" in given for name in own)), None)


def _match_by_name(own: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor] | None:
    prefix = _find_prefix(own, given)
    return None if prefix is None else {name: given[f"{prefix}{name}"] for name in own}


def _check_shape(path: str | Path, name: str, found: Tensor, own: Tensor) -> None:
    if found.shape != own.shape:
        got, expected = tuple(found.shape), tuple(own.shape)
        raise InputError(f"{path}: got shape {got} for {name}, expected {expected}")


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
