"""Training augmentation of the paper, on the crop alone and in the file's own values; normalisation on the device."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from exp.data.base import IGNORE_INDEX


@dataclass(frozen=True)
class RandomCrop:
    """Random scale, horizontal flip and crop of an image and its label; what lies outside is `fill` / ignore.

    The distribution is that of "resize by a factor uniform in scale_range, flip, pad at the right and below to the
    crop, cut out a crop at a uniform place"; only the pixels of the crop are resampled, by one warp (bilinear; labels
    nearest). Every random choice is a function of (seed, draw), so it does not depend on workers or processes.
    """

    crop_size: tuple[int, int]  # height, width
    scale_range: tuple[float, float]
    flip_prob: float
    fill: tuple[int, ...]  # a value per channel
    seed: int

    def __call__(self, image: np.ndarray, label: np.ndarray, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, channels) uint8 or int16 and (H, W) uint8 -> the same in the size of the crop."""
        rng = np.random.default_rng((self.seed, draw))
        scale = rng.uniform(*self.scale_range)
        flip = rng.random() < self.flip_prob
        across = Span.draw(rng, label.shape[1], scale, self.crop_size[1])
        down = Span.draw(rng, label.shape[0], scale, self.crop_size[0])
        rows, columns = down.nearest(), across.nearest()[:: -1 if flip else 1]
        label = label.take(rows, axis=0).take(columns, axis=1)
        return self._pad(_warp(image, down, across, flip), self.fill), self._pad(label, (IGNORE_INDEX,))

    def _pad(self, values: np.ndarray, fill: tuple[int, ...]) -> np.ndarray:
        """(h, w[, channels]) -> the same in the size of the crop, filled at the right and below."""
        below, right = (crop - side for crop, side in zip(self.crop_size, values.shape))
        if below == right == 0:
            return values
        padded = cv2.copyMakeBorder(values, 0, below, 0, right, cv2.BORDER_CONSTANT, value=fill)
        return padded.reshape(*self.crop_size, *values.shape[2:])  # OpenCV drops a single channel's axis


@dataclass(frozen=True)
class Span:
    """Along one axis: the pixels first .. first + size - 1 of an image resized from `source` pixels to `scaled`."""

    source: int
    scaled: int
    first: int
    size: int

    @classmethod
    def draw(cls, rng: np.random.Generator, source: int, scale: float, crop: int) -> "Span":
        scaled = max(1, round(source * scale))
        return cls(source, scaled, int(rng.integers(max(scaled - crop, 0) + 1)), min(crop, scaled))

    def needed(self) -> slice:
        """The source pixels that resampling reads."""
        ratio = self.source / self.scaled
        first, last = self.first * ratio - 0.5, (self.first + self.size) * ratio - 0.5
        return slice(max(0, math.floor(first)), min(self.source, math.ceil(last) + 1))

    def line(self, flip: bool) -> tuple[float, float]:
        """(a, b): pixel x of the span lies at a x + b among the needed source pixels (pixel centres map to centres)."""
        ratio = self.source / self.scaled
        start = (self.first + 0.5) * ratio - 0.5 - self.needed().start
        return (-ratio, start + (self.size - 1) * ratio) if flip else (ratio, start)

    def nearest(self) -> np.ndarray:
        """The source pixel in which the centre of each pixel of the span lies."""
        return (2 * np.arange(self.first, self.first + self.size) + 1) * self.source // (2 * self.scaled)


def _warp(image: np.ndarray, down: Span, across: Span, flip: bool) -> np.ndarray:
    """(H, W, channels) -> the spans' pixels, (down.size, across.size, channels), bilinear; mirrored if `flip`."""
    box = image[down.needed(), across.needed()]
    colour = box.shape[2] == 3
    if colour:  # OpenCV 5 warps four channels three times as fast as three
        box = cv2.cvtColor(box, cv2.COLOR_RGB2RGBA)
    (step_x, start_x), (step_y, start_y) = across.line(flip), down.line(flip=False)
    pixels = cv2.warpAffine(
        box,
        np.array([[step_x, 0, start_x], [0, step_y, start_y]]),
        (across.size, down.size),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,  # the matrix maps a pixel of the crop to its place in the box
        borderMode=cv2.BORDER_REPLICATE,
    )
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB) if colour else pixels[..., None]


@dataclass(frozen=True)
class CenterCrop:
    """The middle of an image and its label; an image that is smaller along an axis keeps all of it."""

    crop_size: tuple[int, int]  # height, width

    def __call__(self, image: np.ndarray, label: np.ndarray, draw: int) -> tuple[np.ndarray, np.ndarray]:
        tops = [max(0, (side - crop) // 2) for side, crop in zip(label.shape, self.crop_size)]
        rows, columns = (slice(top, top + crop) for top, crop in zip(tops, self.crop_size))
        return image[rows, columns], label[rows, columns]


@dataclass(frozen=True)
class Normalize:
    """(B, channels, H, W) uint8 or int16 -> float32 (value - mean) / std per channel, on the tensor's device."""

    mean: tuple[float, ...]  # in the units of the values
    std: tuple[float, ...]

    def __call__(self, image: Tensor) -> Tensor:
        scale = _by_channel([1 / s for s in self.std], image.device)
        shift = _by_channel([-m / s for m, s in zip(self.mean, self.std)], image.device)
        return image.float() * scale + shift


def _by_channel(values: list[float], device: torch.device) -> Tensor:
    """Numbers -> (channels, 1, 1) float32, filled in on the device: a copy from the host would wait for it."""
    return torch.cat([torch.full((1, 1, 1), value, device=device) for value in values])
