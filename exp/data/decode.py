"""Image files -> arrays; what cannot be read to its end is an InputError that names the file."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from exp.errors import InputError

# (how a whole file begins, how it ends)
JPEG, PNG = (b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")
PNG_BIT_DEPTH = 24  # the byte of a PNG's header that holds it


def read_image(path: Path, channels: int = 3) -> np.ndarray:
    """A path -> (H, W, channels) uint8, RGB or grey, as the file stores it (an EXIF orientation is not applied).

    Whole PNGs and JPEGs are decoded by OpenCV, twice as fast as Pillow on JPEGs. All else goes through Pillow, which
    never takes a truncated file for a whole one as some versions of OpenCV do.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {_reason(error)}") from None
    if data.startswith(PNG[0]) and data[PNG_BIT_DEPTH : PNG_BIT_DEPTH + 1] == b"\x10":
        raise InputError(f"{path}: got 16 bits a channel, expected 8")
    colour = channels == 3
    pixels = _decode_whole(data, cv2.IMREAD_COLOR if colour else cv2.IMREAD_GRAYSCALE)
    if pixels is None:
        return np.atleast_3d(_decode_pillow(path, "RGB" if colour else "L"))
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels) if colour else pixels[..., None]


def read_label(path: Path) -> np.ndarray:
    """A path -> the file's values as they are: (H, W) grey values or palette indices, (H, W, channels) otherwise.

    Through Pillow: OpenCV turns the indices of a palette PNG into colours.
    """
    return _decode_pillow(path)


def _decode_whole(data: bytes, flag: int) -> np.ndarray | None:
    """A PNG or JPEG with its end in place -> OpenCV's pixels; None for anything else."""
    if not any(data.startswith(start) and data.endswith(end) for start, end in (PNG, JPEG)):
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


def _decode_pillow(path: Path, mode: str | None = None) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.array(image if mode is None else image.convert(mode))
    # Pillow raises each of these on damaged files
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"got a file that cannot be read ({error}), expected a PNG or JPEG image"
