"""Encoder -> decoder -> head, with the paper's auxiliary head, on segmentation_models_pytorch and timm."""

import difflib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch.nn.functional as F
from torch import Tensor, nn

from exp.config import ModelConfig
from exp.errors import InputError
from exp.models.weights import cache_alone_without_network, load_encoder_weights


class Segmentor(nn.Module):
    """(B, channels, H, W) normalised images -> (B, C, H, W) logits; in training also the auxiliary head's logits.

    H and W are arbitrary: the input is padded with zeros (the mean colour) to a multiple of `stride`, and the
    logits are cut back. Both heads are resized to the input bilinearly, align_corners=False.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        decoder_width: int,
        num_classes: int,
        dropout: float,
        aux_channels: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.stride = encoder, decoder, stride
        self.head = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(decoder_width, num_classes, kernel_size=1))
        self.aux_head = nn.Sequential(
            nn.Conv2d(encoder.out_channels[-2], aux_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(aux_channels),
            nn.ReLU(inplace=True),
            nn.Dropout2d(dropout),
            nn.Conv2d(aux_channels, num_classes, kernel_size=1),
        )

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % self.stride, 0, -height % self.stride))
        features = self.encoder(image)

        def resize(logits: Tensor) -> Tensor:
            return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)[..., :height, :width]

        logits = resize(self.head(self.decoder(features)))
        return (logits, resize(self.aux_head(features[-2]))) if self.training else logits

    @property
    def num_classes(self) -> int:
        return self.head[-1].out_channels


def _deeplabv3plus(config: ModelConfig, encoder: dict[str, Any]) -> smp.DeepLabV3Plus:
    return smp.DeepLabV3Plus(
        **encoder,
        encoder_output_stride=config.output_stride,
        decoder_channels=config.decoder_channels,
        decoder_atrous_rates=config.atrous_rates,
        decoder_aspp_dropout=0.0,  # the dropout stands before the classifier, as in the paper
    )


def _segformer(config: ModelConfig, encoder: dict[str, Any]) -> smp.Segformer:
    return smp.Segformer(**encoder, decoder_segmentation_channels=config.decoder_channels)


def _unet(config: ModelConfig, encoder: dict[str, Any]) -> smp.Unet:
    if len(config.decoder_channels) != 5:
        raise InputError(f"model.decoder_channels: got {len(config.decoder_channels)} widths, expected 5 with unet")
    return smp.Unet(
        **encoder,
        decoder_channels=config.decoder_channels,
        decoder_interpolation="bilinear",
    )


def _upernet(config: ModelConfig, encoder: dict[str, Any]) -> smp.UPerNet:
    return smp.UPerNet(**encoder, decoder_channels=config.decoder_channels)


DECODERS: dict[str, Callable[[ModelConfig, dict[str, Any]], nn.Module]] = {
    "deeplabv3plus": _deeplabv3plus,
    "segformer": _segformer,
    "unet": _unet,
    "upernet": _upernet,
}


def encoder_name(name: str) -> str:
    """A timm name, or one of segmentation_models_pytorch's own (mit_b0 ... mit_b5) -> the name that smp takes."""
    if timm.is_model(name.partition(".")[0]):
        return f"tu-{name}"
    own = [n for n in smp.encoders.get_encoder_names() if not n.startswith("timm-")]
    if name not in own:
        near = ", ".join(difflib.get_close_matches(name, [*timm.list_models(), *own], n=5)) or "no similar name"
        raise InputError(
            f"model.encoder: unknown name '{name}'; nearest: {near} (timm.list_models() and the encoders of "
            "segmentation_models_pytorch are known)"
        )
    return name


def build_network(config: ModelConfig, num_classes: int, in_channels: int, from_hub: bool) -> Segmentor:
    """The network with random weights, or (from_hub) with the encoder's published ones.

    The libraries fit published weights for RGB to other channels: one grey channel gets the sum over the three, so
    that it gives what the three equal channels would.
    """
    name = encoder_name(config.encoder)
    weights = ("imagenet" if not name.startswith("tu-") else True) if from_hub else None
    encoder = {"encoder_name": name, "encoder_weights": weights, "in_channels": in_channels}
    net = DECODERS[config.decoder](config, encoder)  # its own head, of one class, is not used
    for module in net.decoder.modules():
        if isinstance(module, nn.Upsample):
            module.align_corners = False if module.mode == "bilinear" else None
    return Segmentor(
        net.encoder,
        net.decoder,
        decoder_width=net.segmentation_head[0].in_channels,
        num_classes=num_classes,
        dropout=config.dropout,
        aux_channels=config.aux_channels,
        stride=config.output_stride,
    )


def build_model(config: ModelConfig, num_classes: int, in_channels: int = 3, *, pretrained: bool = True) -> Segmentor:
    """A YAML -> the network on the CPU; pretrained=False (a checkpoint follows) fetches and reads no weights.

    in_channels: 3 of a colour image, 1 of CT or MR (weights for RGB are then summed over their channels).

    Raises InputError if the weights cannot be had, with what to do about it.
    """
    source = config.pretrained if pretrained else False
    try:
        with cache_alone_without_network() if source is True else nullcontext():
            model = build_network(config, num_classes, in_channels, from_hub=source is True)
    except OSError as error:  # of the hub's client; nothing else here reads a file
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model.pretrained: got no weights of encoder {config.encoder} from the hub ({reason}); run once where "
            "there is a network (they are cached), or set model.pretrained to a local file, or to false"
        ) from None
    except (RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model.encoder: got {config.encoder}, which the libraries cannot combine with decoder {config.decoder}: "
            f"{reason}"
        ) from error
    if isinstance(source, str):
        load_encoder_weights(model.encoder, source)
    return model
