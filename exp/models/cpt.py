"""CPT's decoder, of Table 1's last row: every class has prototypes, which the pixels of finer maps look up.

Written after a description of the authors' code, which it equals in parameters to the digit but for an auxiliary head
that their loss never reads (1,786,154 with 21 classes); it is left out.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from exp.models.paper_decoders import resize
from exp.runtime.distributed import mean_over_processes

HEADS = 4
MOMENTUM = 0.2  # of the memory's update, and the memory's share in the prototypes
EXPANSION = 4  # of the convolutions behind the attention
POOL_WIDTH = 48


class CPT(nn.Module):
    """Four features of strides 4 to 32 -> (B, width + 48, h, w) at stride 4."""

    def __init__(self, channels: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__()
        levels = channels[2:]
        self.lateral = nn.ModuleList(nn.Conv2d(level, width, 1) for level in reversed(levels))
        self.blocks = nn.ModuleList(Block(width, num_classes) for _ in levels[1:])
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.blocks)
        self.fuse = conv_norm_gelu(len(levels) * width, width, 3)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_norm_gelu(levels[-1], POOL_WIDTH, 1))
        self.width = width + POOL_WIDTH

    def forward(self, features: list[Tensor]) -> Tensor:
        high, *finer = (conv(feature) for conv, feature in zip(self.lateral, reversed(features[2:])))
        maps = [high]
        for block, smooth, low in zip(self.blocks, self.smooth, finer):
            high = block(low, high)
            maps.append(smooth(high))
        fused = self.fuse(torch.cat([resize(x, maps[-1]) for x in maps], dim=1))
        return torch.cat([fused, resize(self.pool(features[-1]), fused)], dim=1)


class Block(nn.Module):
    """A finer and a coarser map, (B, width, h, w) and (B, width, h', w') -> (B, width, h, w).

    The coarser map gives each class a prototype, which is mixed with a memory of the prototypes seen in training. The
    finer map's pixels attend to them, and most to those that are least like them: the authors' code reverses the sign.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm_low, self.norm_high = LayerNorm2d(width, eps=1e-6), LayerNorm2d(width, eps=1e-6)
        self.scores = nn.Sequential(
            nn.Conv2d(width, width, 1, groups=HEADS, bias=False), nn.Conv2d(width, num_classes, 1, bias=False)
        )
        self.values = nn.Conv2d(width, width, 1, groups=HEADS, bias=False)
        self.register_buffer("memory", F.normalize(torch.randn(1, num_classes, width), dim=-1))
        self.keys_values = nn.Linear(width, 2 * width)
        self.queries = nn.Sequential(depthwise(width), nn.Conv2d(width, width, 1))
        self.project = nn.Conv2d(width, width, 1)
        self.expand = nn.Sequential(
            LayerNorm2d(width, eps=1e-6),
            nn.Conv2d(width, EXPANSION * width, 1),
            depthwise(EXPANSION * width),
            nn.GELU(),
            nn.Conv2d(EXPANSION * width, width, 1),
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        keys, values = self.keys_values(self.prototypes(self.norm_high(high))).chunk(2, dim=-1)
        queries = self.queries(self.norm_low(low)).flatten(2).transpose(1, 2)
        queries, keys, values = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (queries, keys, values))
        attended = F.scaled_dot_product_attention(-queries, keys, values)  # (B, heads, h w, width / heads)
        attended = attended.transpose(-1, -2).reshape(low.shape)
        out = self.project(attended) + low
        return self.expand(out) + out

    def prototypes(self, feature: Tensor) -> Tensor:
        """(B, width, h', w') -> (B, C, width); in training the memory takes them up."""
        weights = self.scores(feature).flatten(2).softmax(dim=-1)
        found = weights @ self.values(feature).flatten(2).transpose(1, 2)
        mixed = (1 - MOMENTUM) * found + MOMENTUM * self.memory
        if self.training:
            self._remember(found)
        return mixed

    @torch.no_grad()
    def _remember(self, found: Tensor) -> None:
        """Move the memory towards the prototypes' mean over the batch and all processes, of length 1."""
        mean = mean_over_processes(found.detach().float().mean(dim=0, keepdim=True))
        self.memory.mul_(1 - MOMENTUM).add_(F.normalize(mean, dim=-1), alpha=MOMENTUM)


def depthwise(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1, groups=width)


def conv_norm_gelu(in_channels: int, width: int, size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, width, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.GELU())
