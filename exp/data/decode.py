"""Image files -> arrays; what cannot be read to its end is an InputError that names the file."""

from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from exp.files.images import PNG_END, PNG_START, open_image, read_bytes
from exp.runtime.errors import InputError

WHOLE = ((PNG_START, PNG_END), (b"\xff\xd8", b"\xff\xd9"))  # how a PNG or JPEG begins and ends
PNG_BIT_DEPTH = 24  # the byte of a PNG's header that holds it


def read_image(path: Path, channels: int = 3) -> np.ndarray:
    """A path -> (H, W, channels) uint8, RGB or grey, as the file stores it (an EXIF orientation is not applied).

    Whole PNGs and JPEGs are decoded by OpenCV, twice as fast as Pillow on JPEGs. All else goes through Pillow, which
    never takes a truncated file for a whole one as some versions of OpenCV do.
    """
    data = read_bytes(path)
    if data.startswith(PNG_START) and data[PNG_BIT_DEPTH : PNG_BIT_DEPTH + 1] == b"\x10":
        raise InputError(f"{path}: got 16 bits a channel, expected 8")
    colour, pixels = channels == 3, None
    with open_image(path, data) as image:  # which compares the number of pixels with the limit
        if any(data.startswith(start) and data.endswith(end) for start, end in WHOLE):
            flag = cv2.IMREAD_COLOR if colour else cv2.IMREAD_GRAYSCALE
            with suppress(cv2.error):
                pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            return np.atleast_3d(np.array(image.convert("RGB" if colour else "L")))
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels) if colour else pixels[..., None]


def read_label(path: Path) -> np.ndarray:
    """A path -> the file's values as they are: (H, W) grey values or palette indices, (H, W, channels) otherwise.

    Through Pillow: OpenCV turns the indices of a palette PNG into colours.
    """
    with open_image(path) as image:
        return np.array(image)
