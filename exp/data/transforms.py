"""Training augmentation of the paper, on the crop alone and in the file's own values; normalisation on the device."""

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from exp.data.base import IGNORE_INDEX


@dataclass(frozen=True)
class RandomCrop:
    """Random scale, horizontal flip and crop of an image and its label; what lies outside is `fill` / ignore.

    The distribution is that of "resize by a factor uniform in scale_range, flip, pad to the crop, cut out a crop at a
    uniform place"; only the pixels of the crop are resampled, by one warp (bilinear; labels nearest). Every random
    choice is a function of (seed, draw), so it does not depend on workers or processes.

    kind: where a pixel lies and what surrounds it. centred: half of the padding above and at the left; a label is that
    of the source pixel in which the centre of the pixel lies. letter: the same padding, and resampled as the paper's
    code does: pixel x lies at (x + 0.5) / scale - 0.5, its label is that of floor(x / scale). corner: all padding at
    the right and below, and values clipped to `limits` before they are resampled; for trainings that began so.
    """

    crop_size: tuple[int, int]  # height, width
    scale_range: tuple[float, float]
    flip_prob: float
    fill: tuple[int, ...]  # a value per channel
    seed: int
    kind: Literal["centred", "letter", "corner"] = "centred"
    limits: tuple[int, int] | None = None  # read by corner alone

    def __call__(self, image: np.ndarray, label: np.ndarray, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, channels) uint8 or int16 and (H, W) uint8 -> the same in the size of the crop."""
        rng = np.random.default_rng((self.seed, draw))
        scale = rng.uniform(*self.scale_range)
        flip = rng.random() < self.flip_prob
        across = Span.draw(rng, label.shape[1], scale, self.crop_size[1], self.kind == "letter")
        down = Span.draw(rng, label.shape[0], scale, self.crop_size[0], self.kind == "letter")
        if self.kind == "corner" and self.limits is not None:
            image = image.clip(*self.limits)
        rows, columns = down.nearest(), across.nearest()[:: -1 if flip else 1]
        label = label.take(rows, axis=0).take(columns, axis=1)
        return self._pad(_warp(image, down, across, flip), self.fill), self._pad(label, (IGNORE_INDEX,))

    def _pad(self, values: np.ndarray, fill: tuple[int, ...]) -> np.ndarray:
        """(h, w[, channels]) -> the same in the size of the crop, filled around, or at the right and below."""
        rows, columns = (crop - side for crop, side in zip(self.crop_size, values.shape))
        if rows == columns == 0:
            return values
        above, left = (0, 0) if self.kind == "corner" else (rows // 2, columns // 2)
        padded = cv2.copyMakeBorder(values, above, rows - above, left, columns - left, cv2.BORDER_CONSTANT, value=fill)
        return padded.reshape(*self.crop_size, *values.shape[2:])  # OpenCV drops a single channel's axis


@dataclass(frozen=True)
class Span:
    """Along one axis: the pixels first .. first + size - 1 of an image resized from `source` pixels to `scaled`.

    ratio: source pixels per pixel; source / scaled or, to the letter, 1 / scale, which is next to it.
    """

    source: int
    scaled: int
    first: int
    size: int
    ratio: float
    letter: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, source: int, scale: float, crop: int, letter: bool) -> "Span":
        scaled = max(1, round(source * scale))
        first, ratio = int(rng.integers(max(scaled - crop, 0) + 1)), 1 / scale if letter else source / scaled
        return cls(source, scaled, first, min(crop, scaled), ratio, letter)

    def needed(self) -> slice:
        """The source pixels that resampling reads."""
        first, last = self.first * self.ratio - 0.5, (self.first + self.size) * self.ratio - 0.5
        return slice(max(0, math.floor(first)), min(self.source, math.ceil(last) + 1))

    def line(self, flip: bool) -> tuple[float, float]:
        """(a, b): pixel x of the span lies at a x + b among the needed source pixels (pixel centres map to centres)."""
        start = (self.first + 0.5) * self.ratio - 0.5 - self.needed().start
        return (-self.ratio, start + (self.size - 1) * self.ratio) if flip else (self.ratio, start)

    def nearest(self) -> np.ndarray:
        """The source pixel whose label each pixel of the span gets."""
        pixels = np.arange(self.first, self.first + self.size)
        if self.letter:
            return np.minimum((pixels * self.ratio).astype(int), self.source - 1)
        return (2 * pixels + 1) * self.source // (2 * self.scaled)


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
