"""Encoder -> decoder -> head, with the paper's auxiliary head, on segmentation_models_pytorch and timm."""

import difflib
import logging
from collections.abc import Callable

import segmentation_models_pytorch as smp
import timm
import torch.nn.functional as F
from torch import Tensor, nn

from exp.config.model import ModelConfig
from exp.models.decoders import Parts, build_parts, initialise
from exp.models.weights import HUB, load_encoder_weights
from exp.runtime.errors import InputError, one_line

# What smp's EfficientNets keep of their classifier and never call: DDP would wait for its gradients.
UNUSED = ("_conv_head", "_bn1")


class Segmentor(nn.Module):
    """(B, channels, H, W) normalised images -> (B, C, H, W) logits.

    In training a tuple of them: the head's and, where there is one, the auxiliary head's.
    H and W are arbitrary: the input is padded with zeros (the mean colour) to a multiple of `multiple`, and
    the logits are cut back. Both heads are resized to the input bilinearly, align_corners=False.
    """

    def __init__(self, parts: Parts, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.encoder, self.decoder = parts.encoder, parts.decoder
        self.multiple = parts.multiple or config.output_stride
        dropout, aux_channels = config.dropout, config.aux_channels
        self.head = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(parts.width, num_classes, kernel_size=1))
        self.aux_head = None
        if aux_channels is not None:
            self.aux_head = nn.Sequential(
                nn.Conv2d(parts.encoder.out_channels[-2], aux_channels, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(aux_channels),
                nn.ReLU(inplace=True),
                nn.Dropout2d(dropout),
                nn.Conv2d(aux_channels, num_classes, kernel_size=1),
            )
        if parts.init_classifier is not None:
            self._initialise_heads(parts.init_classifier)

    def _initialise_heads(self, init_classifier: Callable[[Tensor], object]) -> None:
        if self.aux_head is not None:
            initialise(self.aux_head)
        for head in (self.head, self.aux_head):
            if head is not None:
                init_classifier(head[-1].weight)
                nn.init.zeros_(head[-1].bias)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % self.multiple, 0, -height % self.multiple))
        outputs = self.encoder(image)
        features, *tokens = outputs if isinstance(outputs, tuple) else (outputs,)  # a ViT also gives its class tokens

        def resize(logits: Tensor) -> Tensor:
            return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)[..., :height, :width]

        logits = resize(self.head(self.decoder(features, *tokens)))
        if not self.training:
            return logits
        return (logits,) if self.aux_head is None else (logits, resize(self.aux_head(features[-2])))

    @property
    def num_classes(self) -> int:
        return self.head[-1].out_channels


def encoder_name(name: str) -> str:
    """A timm name, or one of segmentation_models_pytorch's own (mit_b0 ... mit_b5) -> the name that smp takes."""
    if timm.is_model(name.partition(".")[0]):
        return f"tu-{name}"
    own = [n for n in smp.encoders.get_encoder_names() if not n.startswith("timm-")]
    if name not in own:
        near = ", ".join(difflib.get_close_matches(name, [*timm.list_models(), *own], n=5)) or "no similar name"
        raise InputError(f"model.encoder: unknown name '{name}'; nearest: {near} (of timm or smp)")
    return name


def describe_origin(config: ModelConfig) -> str:
    """A YAML -> a line that says where the first weights of its network come from."""
    if config.init_from is not None:
        return f"first weights: {config.init_from}"
    if config.pretrained is not True:
        return f"encoder's first weights: {config.pretrained or 'random'}"
    return f"encoder's first weights: {_find_address(config.encoder)} (downloaded unless they are in the hub's cache)"


def _find_address(encoder: str) -> str:
    """Where the hub has the pretrained weights of an encoder; its name where it has none, which build_model refuses."""
    name = encoder_name(encoder)
    if name.startswith("tu-"):
        known = timm.get_pretrained_cfg(encoder) if timm.is_model_pretrained(encoder) else None
        repository = known and known.hf_hub_id
    else:
        repository = smp.encoders.encoders[name]["pretrained_settings"].get("imagenet", {}).get("repo_id")
    return f"{HUB}/{repository}" if repository else encoder


def build_model(config: ModelConfig, num_classes: int, in_channels: int = 3, *, pretrained: bool = True) -> Segmentor:
    """A YAML -> the network on the CPU; pretrained=False (a checkpoint follows) fetches and reads no weights.

    in_channels: 3 of a colour image, 1 of CT or MR (weights for RGB are then summed over their channels).
    """
    source = config.pretrained if pretrained else False
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # not a line for each of its attempts
    try:
        parts = build_parts(config, encoder_name(config.encoder), source is True, in_channels, num_classes)
        model = Segmentor(parts, config, num_classes)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        reason = one_line(error)
        if isinstance(error, OSError):  # of the hub's client; nothing else here reads a file
            raise InputError(
                f"model.pretrained: got no weights of encoder {config.encoder} from the hub ({reason}); run once where "
                "there is a network (they are cached), or set model.pretrained to a local file, or to false"
            ) from None
        combined = f"which the libraries cannot combine with decoder {config.decoder}"
        raise InputError(f"model.encoder: got {config.encoder}, {combined}: {reason}") from error
    for name in UNUSED:
        if (module := getattr(parts.encoder, name, None)) is not None:
            module.requires_grad_(False)
    if isinstance(source, str):
        load_encoder_weights(model.encoder, source)
    return model
