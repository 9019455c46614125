"""Image -> probabilities: a sliding window over the whole image."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exp.config import TestConfig


@dataclass(frozen=True)
class SlidingWindow:
    """(1, channels, H, W) normalised image -> (1, C, H, W) float32 probabilities.

    Windows of crop_size step by stride, the last of a row or column moved back to end with the image; their logits
    are averaged before the softmax, which is computed in float32. An image smaller than the crop is padded at the
    right and below with zeros (the mean colour), and the result is cut back.
    """

    crop_size: tuple[int, int]
    stride: tuple[int, int]
    window_batch: int

    @torch.inference_mode()
    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        crop_h, crop_w = self.crop_size
        image = F.pad(image, (0, max(0, crop_w - width), 0, max(0, crop_h - height)))
        places = list(self.windows(*image.shape[-2:]))
        logits, visits = None, torch.zeros(image.shape[-2:], device=image.device)
        for first in range(0, len(places), self.window_batch):
            group = places[first : first + self.window_batch]
            crops = torch.cat([image[..., top : top + crop_h, left : left + crop_w] for top, left in group])
            for (top, left), crop_logits in zip(group, model(crops).float()):
                if logits is None:
                    logits = crop_logits.new_zeros((1, crop_logits.shape[0], *image.shape[-2:]))
                logits[0, :, top : top + crop_h, left : left + crop_w] += crop_logits
                visits[top : top + crop_h, left : left + crop_w] += 1
        return (logits / visits)[..., :height, :width].softmax(dim=1)

    def windows(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """Image size (at least the crop's) -> (top, left) of every window."""
        for top in starts(height, self.crop_size[0], self.stride[0]):
            for left in starts(width, self.crop_size[1], self.stride[1]):
                yield top, left


def starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along an axis: every stride, the last one flush with the end."""
    steps = math.ceil((length - crop) / stride)
    return [min(i * stride, length - crop) for i in range(steps + 1)]


Inference = Callable[[nn.Module, Tensor], Tensor]


def build_inference(config: TestConfig) -> Inference:
    """A resolved YAML -> the sliding window."""
    return SlidingWindow(config.crop_size, config.stride, config.window_batch)
