"""Image -> probabilities: a sliding window over the whole image, at several scales and flips, with a temperature."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exp.config.evaluation import TestConfig
from exp.runtime.errors import InputError, sizes_named

CHUNK = 2**20  # elements of a piece of the map that is worked on at a time: temporaries stay small
DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Inference:
    """(1, channels, H, W) normalised image -> (1, C, H, W) float32 probabilities, a fresh tensor.

    A view of the image is one scale, flipped or not; with `flip` every scale comes both ways. In each view, windows of
    crop_size step by stride over the resized image, the last of a row or column moved back to end with it, and their
    logits are averaged. An image smaller than the window is padded with zeros (the mean colour): at the right and
    below or, centred, half of it above and at the left. The logits go back to the image's size (bilinear) and
    orientation; their softmax, of logits / temperature, is computed in float32, and the probabilities of the views are
    averaged, as mmsegmentation does. amp: 'off', 'bf16' or 'fp16', of the network alone.

    One view at scale 1 keeps one map of the image's size, which logits and probabilities share. Several views keep a
    second one, and a resized view a third. InputError where they are non-finite: a network in half precision overflows.

    keep_padding, of one scale: the map is that of the padded image, and inside() cuts the image's own out of it.
    whole: the window is each (resized) image itself, whatever crop_size is. short_side: of the image at scale 1.
    """

    crop_size: tuple[int, int]
    stride: tuple[int, int]
    window_batch: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    temperature: float | None = 1.0  # None: not fitted yet
    amp: str = "off"
    padding: str = "corner"  # or centred
    keep_padding: bool = False
    whole: bool = False
    short_side: int | None = None

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        (prob,) = self.unchecked(model, [image])
        require_finite(prob.sum().item())
        return prob

    @torch.inference_mode()
    def unchecked(self, model: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
        """Images, of one size or several, whose windows share forward passes -> the same for each of them.

        For callers that look at the sums later (require_finite): a GPU is not waited for.
        """
        assert self.temperature is not None
        totals: list[Tensor] = []
        for views in self._views(model, images):
            probs = [softmax_(logits, self.temperature) for logits in views]
            totals = [total.add_(prob) for total, prob in zip(totals, probs)] or probs
            del views, probs  # of a large image there is room for one map
        return [total.div_(self.num_views) for total in totals] if self.num_views > 1 else totals

    @property
    def num_views(self) -> int:
        return len(self.scales) * (1 + self.flip)

    @torch.inference_mode()
    def logits(self, model: nn.Module, image: Tensor) -> Iterator[Tensor]:
        """(1, channels, H, W) -> the views' (1, C, H, W) float32 logits before the temperature, one after the other."""
        for (view,) in replace(self, keep_padding=False)._views(model, [image]):
            yield view

    def place(self, height: int, width: int, flipped: bool = False) -> tuple[slice, slice]:
        """Image size -> the rows and columns where the image lies in its padded map, or in the view of it flipped."""
        rows, columns = (max(0, crop - side) for crop, side in zip(self.crop_size, (height, width)))
        above, left = (rows // 2, columns // 2) if self.padding == "centred" else (0, 0)
        if flipped and (self.padding == "centred" or self.keep_padding):
            left = columns - left
        return slice(above, above + height), slice(left, left + width)

    def inside(self, prob: Tensor, height: int, width: int) -> Tensor:
        """A map of this inference and the image's size -> (1, C, height, width), without a padding that was kept."""
        return prob[(..., *self.place(height, width))].contiguous() if self.keep_padding else prob

    def _views(self, model: nn.Module, images: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """View by view, the (1, C, H, W) float32 logits of every image."""
        sizes = [image.shape[-2:] for image in images]
        if self.keep_padding:
            sizes = [tuple(map(max, size, self.crop_size)) for size in sizes]
        for scale in self.scales:
            resized = [self._resize(image, scale) for image in images]
            for flipped in (False, True) if self.flip else (False,):
                views = self._slide(model, [image.flip(-1) for image in resized] if flipped else resized, flipped)
                views = [v if v.shape[-2:] == size else resize(v, size) for v, size in zip(views, sizes)]
                yield [view.flip(-1) for view in views] if flipped else views

    def _slide(self, model: nn.Module, images: Sequence[Tensor], flipped: bool) -> list[Tensor]:
        """(1, channels, H, W) images -> (1, C, H, W) logits each, the mean over the windows that hold the pixel.

        flipped: they are mirrored.
        """
        if self.whole:
            sizes = [tuple(image.shape[-2:]) for image in images]
            windows = [replace(self, whole=False, crop_size=size, stride=size) for size in sizes]
            return [w._slide(model, [image], flipped)[0] for w, image in zip(windows, images)]
        crop_h, crop_w = self.crop_size
        boxes = [self.place(image.shape[-2], image.shape[-1], flipped) for image in images]
        images = [self._pad(image, box) for image, box in zip(images, boxes)]
        places = [(i, *place) for i, image in enumerate(images) for place in self.windows(*image.shape[-2:])]
        totals: dict[int, Tensor] = {}
        visits = [torch.zeros(image.shape[-2:], device=image.device) for image in images]
        for first in range(0, len(places), self.window_batch):
            group = places[first : first + self.window_batch]
            crops = torch.cat([images[i][..., top : top + crop_h, left : left + crop_w] for i, top, left in group])
            with sizes_named(crops), autocast(self.amp, crops.device):
                logits = model(crops)
            for (i, top, left), window in zip(group, logits):
                if i not in totals:
                    totals[i] = window.new_zeros((1, len(window), *visits[i].shape), dtype=torch.float32)
                inside = (slice(top, top + crop_h), slice(left, left + crop_w))
                totals[i][(0, slice(None), *inside)] += window
                visits[i][inside] += 1
        several = [sum(place[0] == i for place in places) > 1 for i in range(len(images))]
        views = [totals.pop(i).div_(visits[i]) if several[i] else totals.pop(i) for i in range(len(images))]
        return views if self.keep_padding else [view[(..., *box)].contiguous() for view, box in zip(views, boxes)]

    def _resize(self, image: Tensor, scale: float) -> Tensor:
        """(1, channels, H, W) -> the same in the size of a view."""
        if self.short_side is not None:
            scale *= self.short_side / min(image.shape[-2:])
        size = scaled(image, scale)
        return image if size == image.shape[-2:] else resize(image, size)

    def _pad(self, image: Tensor, box: tuple[slice, slice]) -> Tensor:
        """(1, channels, H, W) and its place in the padded map -> the latter, at least of the window's size."""
        rows, columns = (max(0, crop - side) for crop, side in zip(self.crop_size, image.shape[-2:]))
        above, left = box[0].start, box[1].start
        return F.pad(image, (left, columns - left, above, rows - above))

    def windows(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """Image size (at least the window's) -> (top, left) of every window."""
        for top in starts(height, self.crop_size[0], self.stride[0]):
            for left in starts(width, self.crop_size[1], self.stride[1]):
                yield top, left


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """'off', 'bf16' or 'fp16' -> the context in which a forward pass runs."""
    return nullcontext() if DTYPES[amp] is None else torch.autocast(device.type, DTYPES[amp])


def require_finite(total: float) -> None:
    """InputError for a map whose sum is non-finite: a rule would decide for class 0 there, and nobody would know."""
    if not math.isfinite(total):
        raise InputError(
            "test.amp: got an image whose logits are non-finite, expected finite ones (fp16 overflows where bf16 and "
            "off do not; if it is off already, the weights are broken)"
        )


def softmax_(logits: Tensor, temperature: float) -> Tensor:
    """(1, C, H, W) float32 -> softmax of logits / temperature over the classes, in their place, by rows."""
    rows = max(1, CHUNK // (logits.shape[1] * logits.shape[3]))
    for piece in logits.split(rows, dim=2):
        if temperature != 1:
            piece = piece.div_(temperature)
        piece.copy_(piece.softmax(dim=1))
    return logits


def scaled(image: Tensor, scale: float) -> tuple[int, int]:
    """The height and width of an image at a scale."""
    return tuple(max(1, round(side * scale)) for side in image.shape[-2:])


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, C, H, W) -> (1, C, *size), bilinear; smoothed where it shrinks, or fine lines would come and go."""
    shrinks = size[0] < image.shape[-2] or size[1] < image.shape[-1]
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=shrinks)


def starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along an axis: every stride, the last one flush with the end."""
    steps = math.ceil((length - crop) / stride)
    return [min(i * stride, length - crop) for i in range(steps + 1)]


def build_inference(config: TestConfig, keep_padding: bool = False) -> Inference:
    """A resolved YAML -> the way from an image to probabilities, without the temperature where that is to be fitted.

    keep_padding: of the window, for rules that see it.
    """
    short = config.short_side
    is_never_padded = config.whole or (short is not None and max(config.crop_size) <= round(short * min(config.scales)))
    keep_padding = keep_padding and not is_never_padded
    if keep_padding and (config.scales != (1,) or short is not None):
        key, value, expected = (
            ("scales", list(config.scales), "[1]") if short is None else ("short_side", short, "null")
        )
        raise InputError(
            f"test.{key}: got {value}, expected {expected} with a rule that sees the padding of the window "
            "(predict.sees_padding=false turns that off)"
        )
    temperature = None if config.temperature == "fitted" else config.temperature
    return Inference(
        crop_size=(1, 1) if config.whole else config.crop_size,
        stride=(1, 1) if config.whole else config.stride,
        window_batch=config.window_batch,
        scales=config.scales,
        flip=config.flip,
        temperature=temperature,
        amp=config.amp,
        padding="corner" if is_never_padded else config.padding,  # of maps that have none
        keep_padding=keep_padding,
        whole=config.whole,
        short_side=config.short_side,
    )
