"""The network and its training criterion: configs/model and configs/loss."""

import re
from dataclasses import dataclass
from typing import Literal

from exp.config.checks import MAX_WIDTH, require, require_at_most, require_positive


@dataclass(frozen=True)
class ModelConfig:
    """Encoder -> decoder -> head; the names are those of timm and segmentation_models_pytorch.

    A key that the decoder does not read is refused.
    """

    name: str
    decoder: Literal[
        "deeplabv3",
        "deeplabv3plus",
        "dpt",
        "fpn",
        "linknet",
        "manet",
        "pan",
        "pspnet",
        "segformer",
        "unet",
        "unetplusplus",
        "upernet",
    ]
    encoder: str  # any of timm, and segmentation_models_pytorch's own (mit_b0 ... mit_b5)
    decoder_channels: int | tuple[int, ...] | None = None  # the width, or one a block; null with linknet alone
    output_stride: Literal[8, 16, 32] = 32  # of the encoder's last feature map
    atrous_rates: tuple[int, int, int] | None = None  # deeplabv3, deeplabv3plus
    low_level_channels: int | None = None  # deeplabv3plus: the branch at stride 4
    pretrained: bool | str = True  # true: by name from the hub; false: random; text: a local file
    dropout: float = 0.1  # before the classifier of either head
    aux_channels: int = 256  # of the auxiliary head, on the encoder's last feature map but one

    def __post_init__(self) -> None:
        require_positive(self, "decoder_channels", "atrous_rates", "low_level_channels", "aux_channels")
        require_at_most(self, MAX_WIDTH, "decoder_channels", "atrous_rates", "low_level_channels", "aux_channels")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a value in [0, 1)")
        fits = re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.encoder, re.ASCII)
        require(bool(fits), "encoder", self.encoder, "a name of timm or segmentation_models_pytorch")
        require(self.pretrained != "", "pretrained", self.pretrained, "true, false or a file")
        reads = DECODERS[self.decoder]
        kind = {0: "no such key", 1: "one whole number"}.get(reads.widths, f"a list of {reads.widths} whole numbers")
        given = self.decoder_channels
        widths = len(given) if isinstance(given, tuple) else int(given is not None)
        fits = widths == reads.widths and isinstance(given, tuple) == (reads.widths > 1)
        require(fits, "decoder_channels", given, f"{kind} with decoder {self.decoder}")
        strides = " or ".join(map(str, reads.strides))
        require(
            self.output_stride in reads.strides,
            "output_stride",
            self.output_stride,
            f"{strides} with decoder {self.decoder}",
        )
        for key in ("atrous_rates", "low_level_channels"):
            value = getattr(self, key)
            expected = "a value" if key in reads.keys else "no such key"
            require((value is not None) == (key in reads.keys), key, value, f"{expected} with decoder {self.decoder}")


@dataclass(frozen=True)
class DecoderKeys:
    """What a decoder reads: how many widths, which output strides it takes, and keys that not all have."""

    widths: int = 1
    strides: tuple[int, ...] = (32,)
    keys: tuple[str, ...] = ()


DECODERS = {
    "deeplabv3": DecoderKeys(strides=(8, 16), keys=("atrous_rates",)),
    "deeplabv3plus": DecoderKeys(strides=(8, 16), keys=("atrous_rates", "low_level_channels")),
    "dpt": DecoderKeys(strides=(8, 16, 32)),  # that of the ViT's patches
    "fpn": DecoderKeys(),
    "linknet": DecoderKeys(widths=0),
    "manet": DecoderKeys(widths=5),
    "pan": DecoderKeys(strides=(16, 32)),
    "pspnet": DecoderKeys(strides=(8, 16, 32)),
    "segformer": DecoderKeys(),
    "unet": DecoderKeys(widths=5),
    "unetplusplus": DecoderKeys(widths=5),
    "upernet": DecoderKeys(),
}
