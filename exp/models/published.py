"""Networks that others trained, behind the interface of our own: normalised images -> logits at the images' size.

Weights are read as data (safetensors, or torch.load with weights_only); no code of a file or hub is run.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exp.config.experiment import load_published
from exp.config.families import DATASET_TABLE
from exp.config.published import PublishedConfig
from exp.config.strict_yaml import closest, show
from exp.data.registry import DATASETS
from exp.models.sources import SOURCES, Source, locate
from exp.runtime.errors import InputError, decoding

TINY = 1e-12  # below it a probability is taken as that: the logarithm of zero is no logit
PROBE = (64, 64)  # of an image that tells how many outputs a network has


class Published(nn.Module):
    """(B, 3, H, W) normalised images -> (B, C, H, W) logits of a data set's classes, of any height and width.

    places: of each class, the network's output. size: what every image is resized to before. files: where it was read.
    """

    def __init__(self, network: Source, places: Sequence[int], size: tuple[int, int] | None, files: Path) -> None:
        super().__init__()
        self.network, self.size, self.places, self.files = network, size, list(places), files

    def forward(self, image: Tensor) -> Tensor:
        outputs = raw_outputs(self.network, image, self.size)
        if self.places != list(range(outputs.shape[1])):
            outputs = outputs[:, self.places]
        return to_logits(outputs) if self.network.probabilities else outputs


def raw_outputs(network: Source, image: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(B, 3, H, W) images -> (B, N, H, W) of what the network gives."""
    outputs = network(image if size is None else resize(image, size))
    return resize(outputs, image.shape[-2:])


def resize(values: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear; an image that shrinks is smoothed."""
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    shrinks = any(new < old for new, old in zip(size, values.shape[-2:]))
    return F.interpolate(values, tuple(size), mode="bilinear", align_corners=False, antialias=shrinks)


def to_logits(prob: Tensor) -> Tensor:
    """(B, N, H, W) probabilities, of any sum -> their logarithms, whose softmax is the probabilities by their sum."""
    return prob.float().clamp(min=TINY).log()


def build_published(config: PublishedConfig, classes: Sequence[str] | None, channels: int = 3) -> Published:
    """A YAML -> the network with its weights, on the CPU, its outputs in the order of a data set's classes.

    classes: None for the network's own. What is downloaded, and what to beware of, is said as a warning. InputError
    where weights are missing or of another kind, and where the classes do not fit.
    """
    if channels != 3:
        raise InputError(f"--model_yaml {config.name}: got images of {channels} channel(s), expected RGB")
    files = locate(config)
    network = SOURCES[config.source](config, files).eval()
    own = class_names(config)
    with torch.inference_mode(), decoding(Path(config.weights), "a network that takes RGB images"):
        num_outputs = raw_outputs(network, torch.zeros(1, 3, *(config.size or PROBE)), config.size).shape[1]
    if num_outputs != len(own):
        raise InputError(
            f"key 'classes': got {len(own)} names ({show(own)}), expected {num_outputs} as {config.weights} has outputs"
        )
    if network.classes is not None:
        _check_names(config, own, network.classes)
    return Published(network, find_places(config, own, own if classes is None else classes), config.size, files)


def class_names(config: PublishedConfig) -> list[str]:
    """The names of a network's outputs, those of data sets written out, each under the data set's name for it."""
    names = []
    for name in config.classes:
        known = getattr(DATASETS[name], "classes", None) if name in DATASET_TABLE else None
        names += known or [name]
    return [(config.names or {}).get(name, name) for name in names]


def find_places(config: PublishedConfig, own: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The place of each class among a network's outputs; InputError for one that it does not have."""
    for name in classes:
        if own.count(name) != 1:
            raise InputError(
                f"--model_yaml {config.name}: got {own.count(name)} outputs of the class '{name}' of the data set, "
                f"expected one (key 'names' maps the network's names to the data set's){closest(name, own)}"
            )
    return [own.index(name) for name in classes]


def _check_names(config: PublishedConfig, own: Sequence[str], found: Sequence[str]) -> None:
    """InputError where the files name an output otherwise than the YAML, but for case and what stands around."""

    def plain(name: str) -> str:
        return name.replace("_", " ").strip().casefold()

    renamed = [(config.names or {}).get(name, name) for name in found]
    for place, (ours, theirs) in enumerate(zip(own, renamed)):
        if plain(ours) != plain(theirs):
            raise InputError(
                f"key 'classes': got '{ours}' for output {place}, expected '{theirs}', as {config.weights} has it "
                "(key 'names' says which names mean the same)"
            )


def network_weights(name: str) -> dict[str, Tensor]:
    """The name of a published network -> its tensors, for a training that starts from its encoder."""
    config = load_published(name)
    if config.source == "onnx":
        raise InputError(f"{name}: got an ONNX file, expected a network whose encoder has tensors by name")
    return SOURCES[config.source](config, locate(config)).state_dict()
