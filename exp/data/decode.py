"""Image files -> arrays; what cannot be read to its end is an InputError that names the file."""

from pathlib import Path

import cv2
import numpy as np

from exp.files.images import JPEG, PILLOW_ERRORS, PNG, check_size, open_image, read_bytes, unreadable
from exp.runtime.errors import InputError

PNG_BIT_DEPTH = 24  # the byte of a PNG's header that holds it


def read_image(path: Path, channels: int = 3) -> np.ndarray:
    """A path -> (H, W, channels) uint8, RGB or grey, as the file stores it (an EXIF orientation is not applied).

    Whole PNGs and JPEGs are decoded by OpenCV, twice as fast as Pillow on JPEGs. All else goes through Pillow, which
    never takes a truncated file for a whole one as some versions of OpenCV do.
    """
    data = read_bytes(path)
    if data.startswith(PNG[0]) and data[PNG_BIT_DEPTH : PNG_BIT_DEPTH + 1] == b"\x10":
        raise InputError(f"{path}: got 16 bits a channel, expected 8")
    colour = channels == 3
    pixels = None
    if check_size(data, path):
        pixels = _decode_whole(data, cv2.IMREAD_COLOR if colour else cv2.IMREAD_GRAYSCALE)
    if pixels is None:
        return np.atleast_3d(_decode_pillow(data, path, "RGB" if colour else "L"))
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels) if colour else pixels[..., None]


def read_label(path: Path) -> np.ndarray:
    """A path -> the file's values as they are: (H, W) grey values or palette indices, (H, W, channels) otherwise.

    Through Pillow: OpenCV turns the indices of a palette PNG into colours.
    """
    return _decode_pillow(read_bytes(path), path)


def _decode_whole(data: bytes, flag: int) -> np.ndarray | None:
    """A PNG or JPEG with its end in place -> OpenCV's pixels; None for anything else."""
    if not any(data.startswith(start) and data.endswith(end) for start, end in (PNG, JPEG)):
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


def _decode_pillow(data: bytes, path: Path, mode: str | None = None) -> np.ndarray:
    with open_image(data, path) as image:
        try:
            return np.array(image if mode is None else image.convert(mode))
        except PILLOW_ERRORS as error:
            raise unreadable(path, error) from None
