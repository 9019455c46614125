"""The decoders of segmentation_models_pytorch by name, each with its encoder, set up as in the papers.

The library resizes with align_corners=True here and there, fixes one width, and puts dropout inside some decoders; here
all is align_corners=False, and the one dropout stands before the classifier.
"""

import inspect
from collections.abc import Callable
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.deeplabv3.decoder import SeparableConv2d
from torch import Tensor, nn

from exp.config.model import ModelConfig
from exp.runtime.errors import InputError


def build_decoder(config: ModelConfig, encoder: str, from_hub: bool, in_channels: int) -> nn.Module:
    """-> the library's network, of which `encoder` and `decoder` are used; its own head, of one class, is not.

    encoder: the name that smp takes. The libraries fit published weights for RGB to other channels: one grey channel
    gets the sum over the three, so that it gives what three equal channels would.
    """
    of_timm = encoder.startswith("tu-")
    weights = (True if of_timm else "imagenet") if from_hub else None
    keys = {"encoder_name": encoder, "encoder_weights": weights, "in_channels": in_channels}
    net = BUILDERS[config.decoder](config, keys | (_any_image_size(encoder.removeprefix("tu-")) if of_timm else {}))
    for module in net.decoder.modules():
        if isinstance(module, nn.Upsample):
            module.align_corners = False if module.mode == "bilinear" else None
    return net


def decoder_width(net: nn.Module) -> int:
    """The channels that the library's head would read."""
    return next(module for module in net.segmentation_head.modules() if isinstance(module, nn.Conv2d)).in_channels


def _sketch(encoder: str) -> nn.Module:
    """timm's network by name, without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(encoder)


def _any_image_size(encoder: str) -> dict[str, bool]:
    """timm's switch by which a network that is made for one image size (Swin, ViT) takes any."""
    if not getattr(timm.get_pretrained_cfg(encoder), "fixed_input_size", False):
        return {}
    switch = "dynamic_img_size" in inspect.signature(type(_sketch(encoder))).parameters
    return {"dynamic_img_size": True} if switch else {}


def _deeplabv3(config: ModelConfig, encoder: dict[str, Any]) -> smp.DeepLabV3:
    return smp.DeepLabV3(
        **encoder,
        encoder_output_stride=config.output_stride,
        decoder_channels=config.decoder_channels,
        decoder_atrous_rates=config.atrous_rates,
        decoder_aspp_dropout=0.0,
    )


def _deeplabv3plus(config: ModelConfig, encoder: dict[str, Any]) -> smp.DeepLabV3Plus:
    net = smp.DeepLabV3Plus(
        **encoder,
        encoder_output_stride=config.output_stride,
        decoder_channels=config.decoder_channels,
        decoder_atrous_rates=config.atrous_rates,
        decoder_aspp_dropout=0.0,
    )
    low, width = config.low_level_channels, config.decoder_channels
    in_channels = net.decoder.block1[0].in_channels
    net.decoder.block1 = nn.Sequential(nn.Conv2d(in_channels, low, 1, bias=False), nn.BatchNorm2d(low), nn.ReLU())
    net.decoder.block2[0] = SeparableConv2d(low + width, width, kernel_size=3, padding=1, bias=False)
    return net


def _dpt(config: ModelConfig, encoder: dict[str, Any]) -> smp.DPT:
    name = encoder["encoder_name"].removeprefix("tu-")
    vit = _sketch(name) if timm.is_model(name.partition(".")[0]) else None
    if not (hasattr(vit, "blocks") and hasattr(vit, "prune_intermediate_layers")):
        raise InputError(f"model.encoder: got {name}, expected a ViT of timm with decoder dpt")
    readout = "cat" if getattr(vit, "num_prefix_tokens", 0) else "ignore"
    net = smp.DPT(**encoder, decoder_readout=readout, decoder_fusion_channels=config.decoder_channels)
    if net.encoder.output_stride != config.output_stride:
        raise InputError(
            f"model.output_stride: got {config.output_stride}, expected {name}'s {net.encoder.output_stride}"
        )
    # The norm and the classifier behind the last block are not run; DDP wants a gradient for every parameter.
    net.encoder.model.prune_intermediate_layers(len(vit.blocks), prune_norm=True, prune_head=True)
    net.decoder.fusion_blocks = nn.ModuleList(Fusion(block) for block in net.decoder.fusion_blocks)
    return net


class Fusion(nn.Module):
    """DPT's fusion block, resized with align_corners=False."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, feature: Tensor, previous: Tensor | None = None) -> Tensor:
        feature = self.block.residual_conv_block1(feature)
        feature = self.block.residual_conv_block2(feature if previous is None else feature + previous)
        return self.block.project(F.interpolate(feature, scale_factor=2, mode="bilinear", align_corners=False))


def _fpn(config: ModelConfig, encoder: dict[str, Any]) -> smp.FPN:
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
    return net


def _linknet(config: ModelConfig, encoder: dict[str, Any]) -> smp.Linknet:
    return smp.Linknet(**encoder)


def _manet(config: ModelConfig, encoder: dict[str, Any]) -> smp.MAnet:
    return smp.MAnet(**encoder, decoder_channels=config.decoder_channels, decoder_interpolation="bilinear")


def _pan(config: ModelConfig, encoder: dict[str, Any]) -> smp.PAN:
    net = smp.PAN(**encoder, encoder_output_stride=config.output_stride, decoder_channels=config.decoder_channels)
    for module in net.decoder.modules():
        if hasattr(module, "align_corners"):
            module.align_corners = False
    return net


def _pspnet(config: ModelConfig, encoder: dict[str, Any]) -> smp.PSPNet:
    net = smp.PSPNet(
        **encoder,
        encoder_depth=5,  # the library's default stops at stride 8 of an undilated network
        output_stride=config.output_stride,
        psp_out_channels=config.decoder_channels,
        psp_dropout=0.0,
    )
    net.decoder.psp.blocks = nn.ModuleList(PyramidBranch(block.pool) for block in net.decoder.psp.blocks)
    return net


class PyramidBranch(nn.Module):
    """One bin size of PSPNet's pyramid, resized with align_corners=False."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, feature: Tensor) -> Tensor:
        return F.interpolate(self.pool(feature), feature.shape[-2:], mode="bilinear", align_corners=False)


def _segformer(config: ModelConfig, encoder: dict[str, Any]) -> smp.Segformer:
    return smp.Segformer(**encoder, decoder_segmentation_channels=config.decoder_channels)


def _unet(config: ModelConfig, encoder: dict[str, Any]) -> smp.Unet:
    return smp.Unet(**encoder, decoder_channels=config.decoder_channels, decoder_interpolation="bilinear")


def _unetplusplus(config: ModelConfig, encoder: dict[str, Any]) -> smp.UnetPlusPlus:
    return smp.UnetPlusPlus(**encoder, decoder_channels=config.decoder_channels, decoder_interpolation="bilinear")


def _upernet(config: ModelConfig, encoder: dict[str, Any]) -> smp.UPerNet:
    return smp.UPerNet(**encoder, decoder_channels=config.decoder_channels)


POOLING_DECODERS = ("deeplabv3", "deeplabv3plus", "pan", "upernet")  # batch norm over what is pooled to one pixel
BUILDERS: dict[str, Callable[[ModelConfig, dict[str, Any]], nn.Module]] = {
    "deeplabv3": _deeplabv3,
    "deeplabv3plus": _deeplabv3plus,
    "dpt": _dpt,
    "fpn": _fpn,
    "linknet": _linknet,
    "manet": _manet,
    "pan": _pan,
    "pspnet": _pspnet,
    "segformer": _segformer,
    "unet": _unet,
    "unetplusplus": _unetplusplus,
    "upernet": _upernet,
}
