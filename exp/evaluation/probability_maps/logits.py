"""Stored logits -> probabilities: storage, resizing, a letterbox, a temperature, then softmax or sigmoid."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from exp.evaluation.inference import softmax_
from exp.evaluation.probability_maps.files import read_array, read_further
from exp.files.nifti import MAX_VOXELS
from exp.runtime.errors import InputError

LOGITS_KEY = "logits"
OWN_KEYS = ("scale", "offset", "input_size", "inside", "align_corners")  # what an .npz file can say of itself


@dataclass(frozen=True)
class Decoding:
    """How stored logits become probabilities. An .npz file with an array of a field's name is decoded by that.

    scale, offset: logits = stored x scale + offset. Whole numbers need a scale; the offset is 0 without one.
    input_size: height and width to which logits are resized first, the network's input. None: the label's.
    inside: height and width of its upper left part that the image fills (a letterbox), which is then resized to the
        label's size. None: all of it.
    align_corners: of the first resizing, as PyTorch has it; the second one is without. Both are bilinear.
    temperature: divides the logits.
    """

    scale: float | None = None
    offset: float | None = None
    input_size: tuple[int, int] | None = None
    inside: tuple[int, int] | None = None
    align_corners: bool = False
    temperature: float = 1.0

    def read(self, path: Path, key: str | None) -> tuple[np.ndarray, "Decoding"]:
        """A file -> (C, H, W) or (C, D, H, W) values as they are stored, and how they are decoded."""
        stored, found = read_array(path, key, (LOGITS_KEY,)), read_further(path, OWN_KEYS)
        return stored, replace(self, **{name: _as_fact(path, name, values) for name, values in found.items()})

    def decode(self, stored: np.ndarray, size: tuple[int, ...], overlapping: bool, path: Path) -> np.ndarray:
        """(C, H, W) stored values and the label's (H, W) -> (C, H, W) float32 probabilities.

        (C, D, H, W) are not resized. overlapping: every class has its own, by a sigmoid. path: for messages.
        """
        logits = torch.from_numpy(self._unpack(stored, path))
        if not torch.isfinite(logits).all():
            raise InputError(f"{path}: got logits that are non-finite, expected finite ones")
        if logits.ndim == 3:
            logits = self._resize(logits[None], size, path)[0]
        if overlapping:
            return logits.div_(self.temperature).sigmoid_().numpy()
        flat = logits.reshape(1, len(logits), -1, logits.shape[-1])
        return softmax_(flat, self.temperature).reshape(logits.shape).numpy()

    def _unpack(self, stored: np.ndarray, path: Path) -> np.ndarray:
        if stored.dtype.kind not in "iuf":
            raise InputError(f"{path}: got {stored.dtype} values, expected logits as whole numbers or floats")
        if stored.dtype.kind in "iu" and self.scale is None:
            raise InputError(f"{path}: got {stored.dtype} values, expected their scale: an array 'scale', or --scale")
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is told by decode()
            logits = stored.astype(np.float32)
            logits *= np.float32(1 if self.scale is None else self.scale)
            logits += np.float32(0 if self.offset is None else self.offset)
        return logits

    def _resize(self, logits: torch.Tensor, size: tuple[int, ...], path: Path) -> torch.Tensor:
        """(1, C, h, w) -> (1, C, *size)."""
        first = self.input_size or size
        inside = self.inside or self.input_size or size
        if self.inside and not (self.input_size and all(a <= b for a, b in zip(inside, first))):
            got = f"inside {_times(inside)} of an input of {_times(self.input_size) if self.input_size else 'no size'}"
            raise InputError(f"{path}: got {got}, expected a part of the network's input (--input_size)")
        if logits.shape[2:] != first:
            logits = F.interpolate(logits, first, mode="bilinear", align_corners=self.align_corners)
        if inside != first:
            logits = logits[:, :, : inside[0], : inside[1]]
        return logits if inside == size else F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _as_fact(path: Path, name: str, values: np.ndarray) -> float | bool | tuple[int, int]:
    """An array beside the logits -> the value of that field of Decoding."""
    if name in ("input_size", "inside"):
        size = tuple(values.ravel()[:3].tolist())
        if values.dtype.kind in "iu" and len(size) == 2 and min(size) >= 1 and math.prod(size) <= MAX_VOXELS:
            return size
        raise InputError(f"{path}: got '{name}' {values.ravel()[:4].tolist()}, expected a height and a width")
    if values.size == 1 and values.dtype.kind in "biuf" and math.isfinite(values.item()):
        return bool(values.item()) if name == "align_corners" else float(values.item())
    raise InputError(f"{path}: got '{name}' of {values.dtype} and shape {values.shape}, expected a single number")


def _times(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
