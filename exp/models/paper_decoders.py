"""The decoders that the paper's tables were measured with, each a list of features, fine to coarse -> (B, width, h, w).

They are written after a description of the authors' code and have its numbers of parameters to the digit
(tests/models/test_paper_decoders.py). features[0] is the image and features[1] has stride 2; resizing is bilinear with
align_corners=False. U-Net is not here: the library's is the authors' own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BINS = (1, 2, 3, 6)  # of the pyramid, a side


class ConvNormReLU(nn.Sequential):
    """Convolution without bias, batch norm, ReLU; height and width stay."""

    def __init__(self, in_channels: int, width: int, size: int = 1, *, dilation: int = 1, groups: int = 1) -> None:
        padding = dilation * (size // 2)
        super().__init__(
            nn.Conv2d(in_channels, width, size, padding=padding, dilation=dilation, groups=groups, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )


class Separable(nn.Sequential):
    """A depthwise, then a 1x1 convolution, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, width: int, size: int = 3, *, dilation: int = 1) -> None:
        super().__init__(
            ConvNormReLU(in_channels, in_channels, size, dilation=dilation, groups=in_channels),
            ConvNormReLU(in_channels, width),
        )


def resize(feature: Tensor, like: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W) of another map."""
    return F.interpolate(feature, like.shape[-2:], mode="bilinear", align_corners=False)


class Pooled(nn.Sequential):
    """The map's mean in bins x bins cells, 1x1 convolution, and back to the map's size."""

    def __init__(self, in_channels: int, width: int, bins: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(bins), ConvNormReLU(in_channels, width))

    def forward(self, feature: Tensor) -> Tensor:
        return resize(super().forward(feature), feature)


class PyramidPooling(nn.Module):
    """The coarsest map and its means in 1, 2, 3 and 6 cells a side, concatenated, then a 3x3 convolution."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Pooled(in_channels, width, bins) for bins in BINS)
        self.fuse = ConvNormReLU(in_channels + len(BINS) * width, width, 3)

    def forward(self, feature: Tensor) -> Tensor:
        return self.fuse(torch.cat([feature, *(branch(feature) for branch in self.branches)], dim=1))


class PSPNet(nn.Module):
    """Pyramid pooling of the coarsest map (Zhao et al., CVPR 2017)."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.pyramid = PyramidPooling(channels[-1], width)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.pyramid(features[-1])


class AtrousPyramid(nn.Module):
    """ASPP: the mean of the map, a 1x1 and three atrous 3x3 convolutions, concatenated, then a full 3x3 convolution.

    conv: of the 1x1 and atrous branches, ConvNormReLU or Separable.
    """

    def __init__(self, in_channels: int, width: int, rates: Sequence[int], conv: type[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                Pooled(in_channels, width, 1),
                conv(in_channels, width, 1),
                *(conv(in_channels, width, 3, dilation=rate) for rate in rates),
            ]
        )
        self.fuse = ConvNormReLU(len(self.branches) * width, width, 3)

    def forward(self, feature: Tensor) -> Tensor:
        return self.fuse(torch.cat([branch(feature) for branch in self.branches], dim=1))


class DeepLabV3(nn.Module):
    """ASPP of the coarsest map (Chen et al., arXiv 1706.05587)."""

    def __init__(self, channels: Sequence[int], width: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.aspp = AtrousPyramid(channels[-1], width, rates, ConvNormReLU)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.aspp(features[-1])


class DeepLabV3Plus(nn.Module):
    """Separable ASPP, resized to stride 4, beside a narrow map of that stride; then two separable 3x3 convolutions.

    Chen et al., ECCV 2018.
    """

    def __init__(self, channels: Sequence[int], width: int, rates: Sequence[int], low_width: int) -> None:
        super().__init__()
        self.aspp = AtrousPyramid(channels[-1], width, rates, Separable)
        self.low = ConvNormReLU(channels[2], low_width)
        self.fuse = nn.Sequential(Separable(width + low_width, width), Separable(width, width))

    def forward(self, features: list[Tensor]) -> Tensor:
        low = self.low(features[2])
        return self.fuse(torch.cat([resize(self.aspp(features[-1]), low), low], dim=1))


class SegFormer(nn.Module):
    """A 1x1 convolution with norm and activation a level, resized to stride 4; then one over all (Xie et al., 2021)."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(ConvNormReLU(level, width) for level in channels[2:])
        self.fuse = ConvNormReLU(len(self.levels) * width, width)

    def forward(self, features: list[Tensor]) -> Tensor:
        maps = [level(feature) for level, feature in zip(self.levels, features[2:], strict=True)]
        return self.fuse(torch.cat([resize(x, maps[0]) for x in reversed(maps)], dim=1))


class UPerNet(nn.Module):
    """Pyramid pooling, then a feature pyramid, whose levels are concatenated at its finest (Xiao et al., ECCV 2018).

    finest: the index of the finest feature that is read: 2 has stride 4, 3 has stride 8.
    """

    def __init__(self, channels: Sequence[int], width: int, finest: int) -> None:
        super().__init__()
        self.finest = finest
        self.pyramid = PyramidPooling(channels[-1], width)
        self.lateral = nn.ModuleList(ConvNormReLU(level, width) for level in reversed(channels[finest:-1]))
        self.smooth = nn.ModuleList(ConvNormReLU(width, width, 3) for _ in self.lateral)
        self.fuse = ConvNormReLU((len(self.lateral) + 1) * width, width, 3)

    def forward(self, features: list[Tensor]) -> Tensor:
        state = self.pyramid(features[-1])
        maps = [state]
        for lateral, smooth, feature in zip(self.lateral, self.smooth, reversed(features[self.finest : -1])):
            feature = lateral(feature)
            state = resize(state, feature) + feature
            maps.append(smooth(state))
        return self.fuse(torch.cat([resize(x, maps[-1]) for x in reversed(maps)], dim=1))
