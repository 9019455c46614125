"""Image files -> bytes and pictures that are not decoded yet, none larger than what an image can sensibly be."""

import io
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from exp.runtime.errors import InputError

# Above it Pillow warns of a decompression bomb: a quarter of a GiB as RGB, 9459 x 9459.
MAX_PIXELS = 2**30 // 4 // 3
MAX_BYTES = 8 * MAX_PIXELS + 2**20  # of a file: not compressed, four channels of 16 bits
# How a whole PNG or JPEG begins and how it ends.
JPEG, PNG = (b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")
# By how a file begins. No other kind is tried, whatever Pillow knows: for some it starts other programs.
OPENERS: dict[bytes, Callable[[io.BytesIO], Image.Image]] = {
    PNG[0]: PngImagePlugin.PngImageFile,
    JPEG[0]: JpegImagePlugin.JpegImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"II": TiffImagePlugin.TiffImageFile,
    b"MM": TiffImagePlugin.TiffImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF tags
FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG's SOF markers: frame sizes
PILLOW_ERRORS = (  # what Pillow raises on damaged files
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RuntimeError,
    ZeroDivisionError,
    Image.DecompressionBombError,
    struct.error,
    zlib.error,
)


def read_bytes(path: Path) -> bytes:
    """A file's content; InputError if there is none, or a PNG without its end, which Pillow lets pass."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device would be read for ever
            raise unreadable(path, "no file")
        if found.st_size > MAX_BYTES:
            raise unreadable(path, f"{found.st_size} bytes, more than any of {MAX_PIXELS} pixels has")
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if data.startswith(PNG[0]) and not data.endswith(PNG[1]) and PNG[1] not in data:
        raise unreadable(path, "the file is truncated")
    return data


def open_image(data: bytes, path: Path) -> Image.Image:
    """A file's content -> Pillow's image, its pixels not decoded yet; InputError for another kind or too many pixels.

    What decoding it raises on damaged files is in PILLOW_ERRORS.
    """
    check_size(data, path)
    opener = next((opener for start, opener in OPENERS.items() if data.startswith(start)), None)
    if opener is None:
        raise unreadable(path, "of no known kind")
    try:
        image = opener(io.BytesIO(data))
    except PILLOW_ERRORS as error:
        raise unreadable(path, error) from None
    _require_pixels(*image.size, path)
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # a tile is decoded as a whole, however small the image is
        _require_pixels(*(int(image.tag_v2.get(tag, 1)) for tag in (TILE_WIDTH, TILE_LENGTH)), path)
    return image


def check_size(data: bytes, path: Path) -> bool:
    """Whether the size stands in front of the pixels (PNG, most JPEGs, some WebPs); InputError if it is too large."""
    size = _declared_size(data)
    if size is not None:
        _require_pixels(*size, path)
    return size is not None


def unreadable(path: Path, reason: object) -> InputError:
    return InputError(f"{path}: got a file that cannot be read ({reason}), expected an image, such as PNG or JPEG")


def _require_pixels(width: int, height: int, path: Path) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"{path}: got an image of {width}x{height} pixels, expected {MAX_PIXELS} pixels at most")


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) as a PNG, JPEG or extended WebP says in front of its pixels; None: not told there."""
    if data.startswith(PNG[0]) and data[12:16] == b"IHDR":
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data.startswith(b"RIFF") and data[8:16] == b"WEBPVP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return _jpeg_size(data) if data.startswith(JPEG[0]) else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """As _declared_size: from segment to segment up to the frame header; None where anything else is in between."""
    place = len(JPEG[0])
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in FRAME_HEADERS:
            height, width = (int.from_bytes(data[place + at : place + at + 2], "big") for at in (5, 7))
            return width, height
        if not 0xC0 <= marker < 0xFF or 0xD0 <= marker <= 0xD9 or length < 2:
            return None
        place += 2 + length
    return None
