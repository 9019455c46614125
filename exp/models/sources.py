"""Libraries whose trained networks are evaluated here: a published YAML -> the library's network with its weights.

A hub gives files alone, and of these no code is run.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from exp.config.published import IN_FOLDERS, WEIGHTS, PublishedConfig
from exp.config.strict_yaml import closest, show
from exp.files.tensors import load_tensor_file
from exp.files.text import read_json
from exp.models.mmseg import load_mmseg
from exp.models.weights import HUB
from exp.runtime.errors import InputError, decoding

PACKAGES = {"transformers": "transformers", "onnx": "onnxruntime"}  # optional ones, by source
QUERIES = ("eomt", "mask2former", "maskformer")  # of transformers: masks and their classes, not classes of pixels
SMP = ("DPT", "DeepLabV3", "DeepLabV3Plus", "FPN", "Linknet", "MAnet", "PAN", "PSPNet", "Segformer", "UPerNet", "Unet",
       "UnetPlusPlus")  # fmt: skip


class Source(nn.Module):
    """A network of a library. classes: as its files have them, None where they have none.

    probabilities: forward gives these, (B, N, h, w) of any size and not necessarily adding up to 1, in place of logits.
    """

    classes: Sequence[str] | None = None
    probabilities = False


# Where files come from


def fetch(address: str) -> Path:
    """An address -> the file in PyTorch's cache, downloaded if it is not there; InputError says where to put it."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    if path.is_file():
        return path
    logging.getLogger("exp").warning("downloading %s", address)
    path.parent.mkdir(parents=True, exist_ok=True)
    checksum = torch.hub.HASH_REGEX.search(path.name)  # its first digits end the name
    try:
        torch.hub.download_url_to_file(address, str(path), checksum and checksum[1], progress=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"model.weights: {address}: got no file ({_short(error)}); fetch it to {path}, or --set model.weights=FILE"
        ) from None
    return path


def locate(config: PublishedConfig) -> Path:
    """Where a network's files are, fetched if need be: one file, or the folder with config.json and the weights."""
    if config.source in PACKAGES:  # before anything is downloaded
        require_package(PACKAGES[config.source], config.source)
    if config.source in IN_FOLDERS:
        return local_folder(config.weights, config.revision)
    weights = config.weights
    if config.source == "torchvision" and weights in (choices := torchvision_weights(config.architecture)):
        weights = choices[weights].url
    return fetch(weights) if weights.startswith("https://") else require_file(Path(weights))


def local_folder(name: str, revision: str | None) -> Path:
    """A folder, or a name at the hub -> the folder with config.json and the weights, of the hub's copy in its cache."""
    if Path(name).is_dir():
        return require_file(Path(name) / "config.json").parent
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"model.weights: {name}: no such folder, expected one, or a name at {HUB}")
    import huggingface_hub

    page = f"{HUB}/{name}/tree/{revision or 'main'}"
    logging.getLogger("exp").warning("looking for %s", page)
    reason = "without weights"
    try:
        for pattern in WEIGHTS:
            patterns = ["config.json", pattern]
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
            if (folder / "config.json").is_file() and any(folder.glob(pattern)):
                return folder
    except (OSError, ValueError) as error:
        reason = _short(error)
    raise InputError(
        f"model.weights: {name}: got no files ({reason}); fetch config.json and model.safetensors (or "
        f"pytorch_model.bin) of {page} into a folder, and name it with --set model.weights=FOLDER"
    )


def require_file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected one of a trained network")
    return path


def _short(error: Exception) -> str:
    return str(error).partition("\n")[0][:120] or type(error).__name__


def require_package(name: str, source: str) -> ModuleType:
    """An optional package, imported; InputError says how to install it."""
    try:
        return import_module(name)
    except ImportError:
        raise InputError(
            f"key 'source': got {source}, which needs the package {name}, expected it installed: pip install {name}"
        ) from None


# segmentation_models_pytorch


class SmpNetwork(Source):
    """A whole network of the library; images are padded to a multiple of its stride where it asks for that."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.multiple = net, net.encoder.output_stride if net.requires_divisible_input_shape else 1

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        padded = F.pad(image, (0, -width % self.multiple, 0, -height % self.multiple))
        return self.net(padded)[..., :height, :width]


def _smp(config: PublishedConfig, folder: Path) -> Source:
    """What save_pretrained of the library writes: config.json with the network's class and keywords, and weights."""
    path = folder / "config.json"
    keywords = read_json(path, "the config of a network of segmentation_models_pytorch")
    name = keywords.pop("_model_class", None)
    if name not in SMP:
        raise InputError(f"{path}: got the network {show(name)}, expected one of {', '.join(SMP)}")
    if keywords.get("activation") is not None or keywords.get("aux_params") is not None:
        raise InputError(f"{path}: got an activation or a classifier of images, expected a network that gives logits")
    with decoding(path, "the config of a network of segmentation_models_pytorch"):
        net = getattr(smp, name)(**{**keywords, "encoder_weights": None})
    _load_strictly(net, path.with_name("model.safetensors"))
    return SmpNetwork(net)


def _load_strictly(net: nn.Module, path: Path) -> None:
    expected = "the weights of the network that its config names"
    with decoding(path, expected):
        net.load_state_dict(load_tensor_file(require_file(path), expected), strict=True)


# torchvision


class TorchvisionNetwork(Source):
    """A segmentation network of torchvision, without its auxiliary classifier."""

    def __init__(self, net: nn.Module, classes: Sequence[str] | None) -> None:
        super().__init__()
        self.net, self.classes = net, classes

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)["out"]


def torchvision_weights(architecture: str | None) -> Mapping[str, torchvision.models.Weights]:
    """The library's weights of a segmentation network, by name; InputError for another network."""
    known = torchvision.models.list_models(module=torchvision.models.segmentation)
    if architecture not in known:
        raise InputError(f"key 'architecture': got {architecture}, expected a network of torchvision"
                         f"{closest(architecture, known)}")  # fmt: skip
    return torchvision.models.get_model_weights(architecture).__members__


def _torchvision(config: PublishedConfig, path: Path) -> Source:
    choices = torchvision_weights(config.architecture)
    classes = choices[config.weights].meta["categories"] if config.weights in choices else None
    expected = f"a state dict of torchvision's {config.architecture}"
    given = load_tensor_file(path, expected)
    if not isinstance(given, dict) or not all(isinstance(value, Tensor) for value in given.values()):
        raise InputError(f"{path}: got {type(given).__name__}, expected {expected}")
    given = {name: value for name, value in given.items() if not name.startswith("aux_classifier.")}
    last = [name for name in given if name.startswith("classifier.") and name.endswith(".weight")]
    if not last:
        raise InputError(f"{path}: got no tensor 'classifier. ... .weight', expected {expected}")
    keys = {} if config.architecture.startswith("lraspp") else {"aux_loss": False}
    num_outputs = len(given[last[-1]])
    net = torchvision.models.get_model(
        config.architecture, weights=None, weights_backbone=None, num_classes=num_outputs, **keys
    )
    with decoding(path, expected):
        net.load_state_dict(given, strict=True)
    return TorchvisionNetwork(net, classes)


# transformers


class TransformersNetwork(Source):
    """A network of transformers that gives logits of pixels."""

    def __init__(self, net: nn.Module, classes: Sequence[str] | None) -> None:
        super().__init__()
        self.net, self.classes = net, classes

    def forward(self, image: Tensor) -> Tensor:
        return self.net(pixel_values=image).logits


class QueryNetwork(TransformersNetwork):
    """Masks with classes: of each class, the masks' probabilities summed with their probabilities of being of it."""

    probabilities = True

    def forward(self, image: Tensor) -> Tensor:
        out = self.net(pixel_values=image)
        classes = out.class_queries_logits.softmax(dim=-1)[..., :-1]  # the last: no object
        return torch.einsum("bqc,bqhw->bchw", classes, out.masks_queries_logits.sigmoid())


def _transformers(config: PublishedConfig, folder: Path) -> Source:
    library = require_package(PACKAGES["transformers"], "transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    with decoding(folder, "a network of transformers for semantic segmentation"):
        kind = library.AutoConfig.from_pretrained(folder, **local)
        queries = kind.model_type in QUERIES
        auto = library.AutoModelForUniversalSegmentation if queries else library.AutoModelForSemanticSegmentation
        net, found = auto.from_pretrained(folder, output_loading_info=True, **local)
    lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lacking:
        raise InputError(f"{folder}: got no weights of {lacking[0]}, expected those of the whole network")
    names = [kind.id2label[place] for place in sorted(kind.id2label)]
    classes = None if all(name == f"LABEL_{place}" for place, name in enumerate(names)) else names
    if queries:
        logging.getLogger("exp").warning(
            "warning: %s: a network of mask queries; its probabilities are summed masks, not calibrated "
            "probabilities of pixels, which the rules other than argmax stand on",
            config.weights,
        )
    return (QueryNetwork if queries else TransformersNetwork)(net, classes)


# mmsegmentation


class MmsegNetwork(Source):
    def __init__(self, net: nn.Module, classes: Sequence[str] | None) -> None:
        super().__init__()
        self.net, self.classes = net, classes

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


def _mmseg(config: PublishedConfig, path: Path) -> Source:
    return MmsegNetwork(*load_mmseg(path, config.architecture))


# ONNX


class OnnxNetwork(Source):
    """A graph in onnxruntime, on the CPU, one image at a time; the session does not travel to another process."""

    def __init__(self, path: Path, config: PublishedConfig) -> None:
        super().__init__()
        library = require_package(PACKAGES["onnx"], "onnx")
        content = path.read_bytes()
        options = library.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with decoding(path, "an ONNX file with its weights inside"):
            self.session = library.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        inputs, outputs = self.session.get_inputs(), [output.name for output in self.session.get_outputs()]
        shape = inputs[0].shape
        free = [side for side in shape if not isinstance(side, int)]  # a name, or None
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(shape) != 4 or shape[1] not in (3, *free):
            raise InputError(f"{path}: got inputs of {[i.shape for i in inputs]}, expected one, (B, 3, H, W) float32")
        fixed = tuple(side for side in shape[2:] if isinstance(side, int))
        if fixed and fixed != config.size:
            raise InputError(f"key 'size': got {config.size}, expected {list(fixed)}, the input of {path}")
        name = config.output or outputs[0]
        if name not in outputs:
            raise InputError(f"key 'output': got {name}, expected an output of {path}{closest(name, outputs)}")
        self.input_name, self.output_name = inputs[0].name, name
        self.probabilities = config.outputs == "probabilities"
        digest = hashlib.sha256(content).digest()
        self.register_buffer("sha256", torch.frombuffer(bytearray(digest), dtype=torch.uint8))  # tells weights apart

    def forward(self, image: Tensor) -> Tensor:
        maps = []
        for single in image.float().cpu().numpy():
            (found,) = self.session.run([self.output_name], {self.input_name: single[None]})
            maps.append(torch.from_numpy(found).float().reshape(1, -1, *found.shape[-2:]))
        outputs = torch.cat(maps).to(image.device)
        if outputs.shape[1] > 1:
            return outputs
        return torch.cat([1 - outputs if self.probabilities else torch.zeros_like(outputs), outputs], dim=1)


SOURCES: dict[str, Callable[[PublishedConfig, Path], Source]] = {  # of the YAML and its files
    "smp": _smp,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "mmseg": _mmseg,
    "onnx": lambda config, path: OnnxNetwork(path, config),
}
