"""Training augmentation of the paper, on the crop alone and in uint8; normalisation, on the device and the batch."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from exp.data.base import IGNORE_INDEX


@dataclass(frozen=True)
class RandomCrop:
    """Random scale, horizontal flip and crop of an image and its label; what lies outside is mean colour / ignore.

    The distribution is that of "resize by a factor uniform in scale_range, flip, pad at the right and below to the
    crop, cut out a crop at a uniform place"; only the pixels of the crop are resampled (bilinear; labels nearest).
    Every random choice is a function of (seed, draw), so it does not depend on workers or processes.
    """

    crop_size: tuple[int, int]  # height, width
    scale_range: tuple[float, float]
    flip_prob: float
    mean: tuple[float, float, float]  # of RGB in 0..1
    seed: int

    def __call__(self, image: Image.Image, label: Image.Image, draw: int) -> tuple[Image.Image, Image.Image]:
        rng = np.random.default_rng((self.seed, draw))
        scale = rng.uniform(*self.scale_range)
        flip = rng.random() < self.flip_prob
        crop_h, crop_w = self.crop_size
        scaled_w, scaled_h = (max(1, round(side * scale)) for side in image.size)
        left = int(rng.integers(max(scaled_w - crop_w, 0) + 1))
        top = int(rng.integers(max(scaled_h - crop_h, 0) + 1))
        size = min(crop_w, scaled_w), min(crop_h, scaled_h)
        ratio_x, ratio_y = image.width / scaled_w, image.height / scaled_h
        box = (left * ratio_x, top * ratio_y, (left + size[0]) * ratio_x, (top + size[1]) * ratio_y)
        box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))  # rounding may step outside
        image = image.resize(size, Image.Resampling.BILINEAR, box=box)
        label = label.resize(size, Image.Resampling.NEAREST, box=box)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            label = label.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._pad(image, tuple(round(255 * m) for m in self.mean)), self._pad(label, IGNORE_INDEX)

    def _pad(self, image: Image.Image, fill: int | tuple[int, ...]) -> Image.Image:
        if image.size == self.crop_size[::-1]:
            return image
        padded = Image.new(image.mode, self.crop_size[::-1], fill)
        padded.paste(image)
        return padded


@dataclass(frozen=True)
class Normalize:
    """(B, 3, H, W) uint8 -> float32 (value / 255 - mean) / std per channel, on the tensor's device."""

    mean: tuple[float, float, float]  # of RGB in 0..1
    std: tuple[float, float, float]

    def __call__(self, image: Tensor) -> Tensor:
        scale = torch.tensor([1 / (255 * s) for s in self.std], device=image.device)
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std)], device=image.device)
        return image.float() * scale[:, None, None] + shift[:, None, None]
