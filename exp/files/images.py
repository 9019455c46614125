"""Image files -> pictures that are not decoded yet, none larger than what an image can sensibly be."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from exp.files.text import require_file
from exp.runtime.errors import InputError, decoding

# Above it Pillow warns of a decompression bomb: a quarter of a GiB as RGB, 9459 x 9459.
MAX_PIXELS = 2**30 // 4 // 3
MAX_BYTES = 8 * MAX_PIXELS + 2**20  # of a file: not compressed, four channels of 16 bits
# Suffixes and Pillow's formats. No other format is tried, whatever Pillow knows: for some it starts other programs.
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
EXPECTED = "an image, such as PNG or JPEG"


def read_bytes(path: Path) -> bytes:
    """A file's content; InputError if there is none, or a PNG without its end, which Pillow lets pass."""
    require_file(path, EXPECTED, MAX_BYTES)
    with decoding(path, EXPECTED):
        data = path.read_bytes()
        if data.startswith(PNG_START) and PNG_END not in data:
            raise ValueError("the file is truncated")
    return data


@contextmanager
def open_image(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """A file, or its content -> Pillow's image, its pixels not decoded yet; InputError for another kind or too many.

    What decoding it inside raises on damaged files is an InputError too.
    """
    content = io.BytesIO(read_bytes(path) if data is None else data)
    with decoding(path, EXPECTED), Image.open(content, formats=sorted(set(FORMATS.values()))) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise InputError(f"{path}: got {width}x{height} pixels, expected {MAX_PIXELS} at most")
        yield image
