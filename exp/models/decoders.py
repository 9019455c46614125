"""The decoders by name, each with its encoder: the paper's (model.variant), and segmentation_models_pytorch's.

The library resizes with align_corners=True here and there, fixes one width, and puts dropout inside some decoders; here
all is align_corners=False, and the one dropout stands before the classifier.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.deeplabv3.decoder import SeparableConv2d
from torch import Tensor, nn

from exp.config.model import ModelConfig
from exp.models.cpt import CPT
from exp.models.paper_decoders import DeepLabV3, DeepLabV3Plus, PSPNet, SegFormer, UPerNet
from exp.runtime.errors import InputError


class Parts(NamedTuple):
    """A network without its heads: image -> encoder -> list of features -> decoder -> (B, width, h, w).

    The encoder's out_channels has the width of each feature, from fine to coarse. Images are padded to a multiple of so
    many pixels: the coarsest stride of encoder and decoder (None: model.output_stride). init_classifier: what fills the
    classifiers' weights in place (None: PyTorch's default).
    """

    encoder: nn.Module
    decoder: nn.Module
    width: int
    multiple: int | None = None
    init_classifier: Callable[[Tensor], object] | None = None


Builder = Callable[[ModelConfig, dict[str, Any]], Parts]


def build_parts(config: ModelConfig, encoder: str, from_hub: bool, in_channels: int, num_classes: int) -> Parts:
    """A YAML -> encoder (by the name that smp takes) and decoder, every resizing with align_corners=False."""
    of_timm = encoder.startswith("tu-")
    weights = (True if of_timm else "imagenet") if from_hub else None
    keys = {"encoder_name": encoder, "encoder_weights": weights, "in_channels": in_channels}
    if of_timm:
        keys |= _any_image_size(encoder.removeprefix("tu-"), config.variant)
    paper = config.variant == "paper"
    parts = _paper_parts(config, keys, num_classes) if paper else DECODERS[config.decoder](config, keys)
    for module in parts.decoder.modules():
        if isinstance(module, nn.Upsample):
            module.align_corners = False if module.mode == "bilinear" else None
    return parts


def _parts(net: nn.Module, multiple: int | None = None) -> Parts:
    """A network of the library -> its encoder and decoder; its own head, of one class, is left."""
    head = next(module for module in net.segmentation_head.modules() if isinstance(module, nn.Conv2d))
    return Parts(net.encoder, net.decoder, head.in_channels, multiple)


def _paper_parts(config: ModelConfig, encoder: dict[str, Any], num_classes: int) -> Parts:
    """Decoder and first weights as in the paper's code, which has the library's U-Net."""
    if config.decoder == "unet":
        return DECODERS["unet"](config, encoder)._replace(init_classifier=nn.init.xavier_uniform_)
    keys = {key.removeprefix("encoder_"): value for key, value in encoder.items()}
    net = smp.encoders.get_encoder(**keys, output_stride=config.output_stride)
    if config.decoder == "cpt":
        decoder = CPT(net.out_channels, config.decoder_channels, num_classes)
        parts = Parts(net, decoder, decoder.width, init_classifier=kaiming_uniform)
    else:
        decoder = PAPER_DECODERS[config.decoder](config, net.out_channels)
        parts = Parts(net, decoder, config.decoder_channels, init_classifier=nn.init.xavier_uniform_)
    initialise(decoder)
    return parts


def kaiming_uniform(weight: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(weight, mode="fan_in", nonlinearity="relu")


def initialise(module: nn.Module) -> None:
    """Fill convolutions and linear layers as the paper's code does; norm layers are left as they are."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            kaiming_uniform(layer.weight) if isinstance(layer, nn.Conv2d) else nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _sketch(encoder: str) -> nn.Module:
    """timm's network by name, without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(encoder)


def _any_image_size(encoder: str, variant: str) -> dict[str, bool]:
    """timm's switches by which a network that is made for one image size (Swin, ViT) takes any.

    The paper's code makes Swin for the crop, where all stages shift their windows. One that is made for less, as the
    weights are, does so with always_partition.
    """
    if not getattr(timm.get_pretrained_cfg(encoder), "fixed_input_size", False):
        return {}
    known = inspect.signature(type(_sketch(encoder))).parameters
    switches = {"dynamic_img_size": True, "strict_img_size": False}  # the second: Swin's in older timm
    if variant == "paper":
        switches["always_partition"] = True
    return {switch: value for switch, value in switches.items() if switch in known}


def _deeplab(network: type[nn.Module], config: ModelConfig, encoder: dict[str, Any]) -> nn.Module:
    return network(
        **encoder,
        encoder_output_stride=config.output_stride,
        decoder_channels=config.decoder_channels,
        decoder_atrous_rates=config.atrous_rates,
        decoder_aspp_dropout=0.0,
    )


def _deeplabv3plus(config: ModelConfig, encoder: dict[str, Any]) -> Parts:
    net = _deeplab(smp.DeepLabV3Plus, config, encoder)
    low, width = config.low_level_channels, config.decoder_channels
    in_channels = net.decoder.block1[0].in_channels
    net.decoder.block1 = nn.Sequential(nn.Conv2d(in_channels, low, 1, bias=False), nn.BatchNorm2d(low), nn.ReLU())
    net.decoder.block2[0] = SeparableConv2d(low + width, width, kernel_size=3, padding=1, bias=False)
    return _parts(net)


def _dpt(config: ModelConfig, encoder: dict[str, Any]) -> Parts:
    name = encoder["encoder_name"].removeprefix("tu-")
    vit = _sketch(name) if timm.is_model(name.partition(".")[0]) else None
    if not (hasattr(vit, "blocks") and hasattr(vit, "prune_intermediate_layers")):
        raise InputError(f"model.encoder: got {name}, expected a ViT of timm with decoder dpt")
    readout = "cat" if getattr(vit, "num_prefix_tokens", 0) else "ignore"
    net = smp.DPT(**encoder, decoder_readout=readout, decoder_fusion_channels=config.decoder_channels)
    if (stride := net.encoder.output_stride) != config.output_stride:
        raise InputError(f"model.output_stride: got {config.output_stride}, expected {name}'s {stride}")
    # The norm and the classifier behind the last block are not run; DDP wants a gradient for every parameter.
    net.encoder.model.prune_intermediate_layers(len(vit.blocks), prune_norm=True, prune_head=True)
    net.decoder.fusion_blocks = nn.ModuleList(Fusion(block) for block in net.decoder.fusion_blocks)
    return _parts(net, multiple=32)


class Fusion(nn.Module):
    """DPT's fusion block, resized with align_corners=False."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, feature: Tensor, previous: Tensor | None = None) -> Tensor:
        feature = self.block.residual_conv_block1(feature)
        feature = self.block.residual_conv_block2(feature if previous is None else feature + previous)
        return self.block.project(F.interpolate(feature, scale_factor=2, mode="bilinear", align_corners=False))


def _fpn(config: ModelConfig, encoder: dict[str, Any]) -> Parts:
    """decoder_channels: of the pyramid; the branches behind it have half of them, as in the paper."""
    net = smp.FPN(
        **encoder,
        decoder_pyramid_channels=config.decoder_channels,
        decoder_segmentation_channels=config.decoder_channels // 2,
        decoder_dropout=0.0,
    )
    for branch in net.decoder.seg_blocks:
        for index, conv in enumerate(branch.block):
            if conv.upsample:
                branch.block[index] = nn.Sequential(conv.block, nn.Upsample(scale_factor=2, mode="bilinear"))
    return _parts(net)


def _pan(config: ModelConfig, encoder: dict[str, Any]) -> Parts:
    net = smp.PAN(**encoder, encoder_output_stride=config.output_stride, decoder_channels=config.decoder_channels)
    for module in net.decoder.modules():
        if hasattr(module, "align_corners"):
            module.align_corners = False
    return _parts(net, multiple=8 * config.output_stride)


def _pspnet(config: ModelConfig, encoder: dict[str, Any]) -> Parts:
    net = smp.PSPNet(
        **encoder,
        encoder_depth=5,  # the library's default stops at stride 8 of an undilated network
        output_stride=config.output_stride,
        psp_out_channels=config.decoder_channels,
        psp_dropout=0.0,
    )
    net.decoder.psp.blocks = nn.ModuleList(PyramidBranch(block.pool) for block in net.decoder.psp.blocks)
    return _parts(net)


class PyramidBranch(nn.Module):
    """One bin size of PSPNet's pyramid, resized with align_corners=False."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, feature: Tensor) -> Tensor:
        return F.interpolate(self.pool(feature), feature.shape[-2:], mode="bilinear", align_corners=False)


def _unchanged(network: type[nn.Module], width: str = "decoder_channels", **keys: Any) -> Builder:
    """A network of the library that needs no change; width: what it calls the decoder's channels."""
    return lambda config, encoder: _parts(network(**encoder, **{width: config.decoder_channels}, **keys))


def _paper_upernet(config: ModelConfig, channels: Sequence[int]) -> nn.Module:
    """The paper's code skips the first two maps of any encoder: where timm has none of stride 2, that of stride 4."""
    of_timm = timm.is_model(config.encoder.partition(".")[0])
    return UPerNet(channels, config.decoder_channels, 3 if of_timm and not channels[1] else 2)


# Of the paper's code, but for U-Net, which is the library's, and CPT, which must know the classes.
PAPER_DECODERS: dict[str, Callable[[ModelConfig, Sequence[int]], nn.Module]] = {
    "deeplabv3": lambda config, channels: DeepLabV3(channels, config.decoder_channels, config.atrous_rates),
    "deeplabv3plus": lambda config, channels: DeepLabV3Plus(
        channels, config.decoder_channels, config.atrous_rates, config.low_level_channels
    ),
    "pspnet": lambda config, channels: PSPNet(channels, config.decoder_channels),
    "segformer": lambda config, channels: SegFormer(channels, config.decoder_channels),
    "upernet": _paper_upernet,
}
DECODERS: dict[str, Builder] = {  # of the library; the names of exp/config/families.py
    "deeplabv3": lambda config, encoder: _parts(_deeplab(smp.DeepLabV3, config, encoder)),
    "deeplabv3plus": _deeplabv3plus,
    "dpt": _dpt,
    "fpn": _fpn,
    "linknet": lambda config, encoder: _parts(smp.Linknet(**encoder)),
    "manet": _unchanged(smp.MAnet, decoder_interpolation="bilinear"),
    "pan": _pan,
    "pspnet": _pspnet,
    "segformer": _unchanged(smp.Segformer, "decoder_segmentation_channels"),
    "unet": _unchanged(smp.Unet, decoder_interpolation="bilinear"),
    "unetplusplus": _unchanged(smp.UnetPlusPlus, decoder_interpolation="bilinear"),
    "upernet": _unchanged(smp.UPerNet),
}
