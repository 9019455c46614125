"""The network: configs/model."""

import re
from dataclasses import dataclass
from typing import Literal

from exp.config.checks import MAX_WIDTH, require, require_entry, require_positive
from exp.config.families import DECODER_TABLE


@dataclass(frozen=True)
class ModelConfig:
    """Encoder -> decoder -> head. A key that the decoder does not read is refused."""

    name: str
    decoder: str  # a name of DECODER_TABLE
    encoder: str  # any of timm, and segmentation_models_pytorch's own (mit_b0 ... mit_b5)
    decoder_channels: int | tuple[int, ...] | None = None  # the width, or one a block; null with linknet alone
    output_stride: Literal[8, 16, 32] = 32  # of the encoder's last feature map
    atrous_rates: tuple[int, int, int] | None = None  # deeplabv3, deeplabv3plus
    low_level_channels: int | None = None  # deeplabv3plus: the branch at stride 4
    variant: Literal["library", "paper"] = "library"  # whose decoder: segmentation_models_pytorch's, or the paper's
    pretrained: bool | str = True  # true: by name from the hub; false: random; text: a local file
    init_from: str | None = None  # a local file of a whole network, which training starts from in place of pretrained
    dropout: float = 0.1  # before the classifier of either head
    # Of the auxiliary head, on the encoder's last feature map but one; null: no such head.
    aux_channels: int | None = 256

    def __post_init__(self) -> None:
        widths = ("decoder_channels", "atrous_rates", "low_level_channels", "aux_channels")
        require_positive(self, *widths, most=MAX_WIDTH)
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a value in [0, 1)")
        fits = re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.encoder, re.ASCII)
        require(bool(fits), "encoder", self.encoder, "a name of timm or segmentation_models_pytorch")
        require_entry(self, "decoder", DECODER_TABLE)
        entry = DECODER_TABLE[self.decoder]
        variants = " or ".join(entry.variants)
        fits = self.variant in entry.variants
        require(fits, "variant", self.variant, f"{variants} with the decoder {self.decoder}")
        given, num = self.decoder_channels, entry.num_widths
        kind = {0: "no such key", 1: "one whole number"}.get(num, f"a list of {num} whole numbers")
        widths = len(given) if isinstance(given, tuple) else int(given is not None)
        fits = widths == num and isinstance(given, tuple) == (num > 1)
        require(fits, "decoder_channels", given, f"{kind} with the decoder {self.decoder}")
        strides = " or ".join(map(str, entry.strides))
        fits = self.output_stride in entry.strides
        require(fits, "output_stride", self.output_stride, f"{strides} with the decoder {self.decoder}")
