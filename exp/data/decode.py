"""Image files -> arrays; what cannot be read to its end is an InputError that names the file."""

from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from exp.files.images import (
    PNG_COLOUR_TYPE,
    PNG_END,
    PNG_START,
    describe_loss,
    describe_samples,
    exif_orientation,
    open_image,
    read_bytes,
    sample_bits,
)
from exp.runtime.errors import InputError

WHOLE = ((PNG_START, PNG_END), (b"\xff\xd8", b"\xff\xd9"))  # how a PNG or JPEG begins and ends
# EXIF orientations whose rows and columns change places; then whose rows, and whose columns, are mirrored.
TRANSPOSED, ROWS, COLUMNS = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)


def read_image(path: Path, channels: int = 3, *, as_stored: bool = False) -> np.ndarray:
    """A path -> (H, W, channels) uint8, RGB or grey, as viewers show it: turned as its EXIF says.

    as_stored: not turned. InputError for channels of more than 8 bits and for floating-point or signed ones.
    Whole PNGs and JPEGs are decoded by OpenCV, twice as fast as Pillow on JPEGs. All else goes through Pillow, which
    never takes a truncated file for a whole one as some versions of OpenCV do.
    """
    data = read_bytes(path)
    colour, pixels = channels == 3, None
    with open_image(path, data) as image:  # which compares the number of pixels with the limit
        if samples := describe_samples(image, data):
            raise InputError(f"{path}: got {samples}, expected 8")
        orientation = 1 if as_stored else exif_orientation(image, data)
        if any(data.startswith(start) and data.endswith(end) for start, end in WHOLE):
            flag = cv2.IMREAD_COLOR if colour else cv2.IMREAD_GRAYSCALE
            with suppress(cv2.error):
                pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            pixels = np.atleast_3d(np.array(image.convert("RGB" if colour else "L")))
        else:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels) if colour else pixels[..., None]
    return turn(pixels, orientation)


def read_label(path: Path) -> np.ndarray:
    """A path -> the file's values as they are: (H, W) grey samples or palette indices, (H, W, channels) otherwise.

    Turned as read_image turns. InputError for a format that changes values. Through Pillow: OpenCV turns the indices
    of a palette PNG into colours.
    """
    data = read_bytes(path)
    with open_image(path, data) as image:
        if loss := describe_loss(image, data):
            raise InputError(
                f"{path}: got a {loss}, which changes label values, expected a lossless format such as PNG"
            )
        return label_values(path, image, data)


def label_values(path: Path, image: Image.Image, data: bytes) -> np.ndarray:
    """A path, its open image and its content -> the values as read_label gives them, of a lossy format, too."""
    bits, orientation = sample_bits(image, data), exif_orientation(image, data)
    is_grey = image.format != "PNG" or data[PNG_COLOUR_TYPE] == 0
    values = np.array(image)
    if values.dtype == np.uint8 and (samples := describe_samples(image, data)):
        raise InputError(f"{path}: got {samples}, expected 8")
    if values.dtype == bool:
        values = values.astype(np.uint8)
    elif image.mode == "L" and is_grey and bits in (2, 4):  # which Pillow spreads over 0..255
        values //= 255 // (2**bits - 1)
    return turn(values, orientation)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) as stored -> as EXIF's orientation 1 to 8 says that it is shown, contiguous."""
    if orientation == 1:
        return pixels
    shown = pixels.swapaxes(0, 1) if orientation in TRANSPOSED else pixels
    rows, columns = (-1 if orientation in mirrored else 1 for mirrored in (ROWS, COLUMNS))
    return np.ascontiguousarray(shown[::rows, ::columns])
