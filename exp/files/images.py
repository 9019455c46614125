"""Image files -> pictures that are not decoded yet, none larger than what an image can sensibly be."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
MAX_PAGES = 1000  # that are counted
REDUCED_OR_MASK = 1 | 4  # TIFF's NewSubfileType: a page that is a smaller copy of another one, or its transparency
SUBFILE_TYPE, BITS_PER_SAMPLE, COMPRESSION, ORIENTATION, SAMPLE_FORMAT = 254, 258, 259, 274, 339  # tags of TIFF, EXIF
SIGNED, FLOAT = 2, 3  # of SAMPLE_FORMAT
PNG_BIT_DEPTH, PNG_COLOUR_TYPE = 24, 25  # the bytes of a PNG's header that hold them
EXIF_OF_PNG = (b"eXIf", b"Raw profile type")  # where a PNG has EXIF at all; Pillow decodes all of it to look for it


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

    What decoding it inside raises on damaged files is an InputError too, and so are several pages or frames.
    """
    data = read_bytes(path) if data is None else data
    with decoding(path, EXPECTED), Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values()))) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise InputError(f"{path}: got {width}x{height} pixels, expected {MAX_PIXELS} at most")
        if (pages := count_pages(image, data)) > 1:
            raise InputError(
                f"{path}: got a {image.format} of {pages} images, expected one: store each in its own file"
            )
        yield image


def count_pages(image: Image.Image, data: bytes) -> int:
    """An open image and its file's content -> the images in it, MAX_PAGES at most.

    The smaller copies of a TIFF and the previews that cameras put behind a JPEG do not count.
    """
    if image.format != "TIFF":
        return 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    count = 0
    with Image.open(io.BytesIO(data), formats=["TIFF"]) as pages, suppress(EOFError):
        for number in range(MAX_PAGES):
            pages.seek(number)
            count += not pages.tag_v2.get(SUBFILE_TYPE, 0) & REDUCED_OR_MASK
    return count


def sample_bits(image: Image.Image, data: bytes) -> int:
    """An open image and its file's content -> the bits of its widest channel."""
    if image.format == "PNG":
        return data[PNG_BIT_DEPTH]
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    return 8


def describe_samples(image: Image.Image, data: bytes) -> str | None:
    """What the samples of an open image are, if they are no unsigned whole numbers of at most 8 bits."""
    bits, kinds = sample_bits(image, data), ()
    if image.format == "TIFF":
        kinds = image.tag_v2.get(SAMPLE_FORMAT, ())
    if FLOAT in kinds:
        return f"floating-point numbers of {bits} bits a channel"
    if SIGNED in kinds:
        return f"signed numbers of {bits} bits a channel"
    return f"{bits} bits a channel" if bits > 8 else None


def describe_loss(image: Image.Image, data: bytes) -> str | None:
    """The format of an open image, if it is one that changes the values of pixels; None if it keeps them."""
    if image.format in ("JPEG", "MPO"):
        return "JPEG"
    if image.format == "TIFF" and "jpeg" in image.info.get("compression", ""):
        return "TIFF of JPEG compression"
    is_lossy_webp = image.format == "WEBP" and b"VP8L" not in data  # the name of a lossless chunk
    return "WebP of lossy compression" if is_lossy_webp else None


def exif_orientation(image: Image.Image, data: bytes) -> int:
    """An open image and its file's content -> how EXIF says that viewers turn it, 1 (as stored) to 8.

    Of a TIFF 1: Pillow turns it as it decodes it.
    """
    if image.format == "TIFF" or (image.format == "PNG" and not any(sign in data for sign in EXIF_OF_PNG)):
        return 1
    found = None
    with suppress(Exception):  # damaged EXIF, whatever that raises: viewers show the image as it is stored
        found = image.getexif().get(ORIENTATION)
    return found if found in range(1, 9) else 1
