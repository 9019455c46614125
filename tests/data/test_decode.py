"""Images as Pillow, a second decoder, reads them; damaged files in one line that names them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from exp.data import decode
from exp.data.decode import read_image, read_label
from exp.runtime.errors import InputError
from tests.conftest import write_png


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def turned_jpeg(path: Path) -> None:
    """A JPEG whose EXIF says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(path, exif=exif, quality=95)


WRITERS = {
    "rgb.png": lambda p: Image.fromarray(picture()).save(p),
    "rgb.jpg": lambda p: Image.fromarray(picture()).save(p, quality=95),
    "grey.jpg": lambda p: Image.fromarray(picture()[..., 0]).save(p, quality=95),
    "grey.png": lambda p: Image.fromarray(picture()[..., 0]).save(p),
    "rgba.png": lambda p: Image.fromarray(picture()).convert("RGBA").save(p),
    "palette.png": lambda p: Image.fromarray(picture()).quantize(64).save(p),
    "turned.jpg": turned_jpeg,
    "rgb.bmp": lambda p: Image.fromarray(picture()).save(p),
    "rgb.tif": lambda p: Image.fromarray(picture()).save(p),
    "rgb.webp": lambda p: Image.fromarray(picture()).save(p, lossless=True),
}


@pytest.mark.parametrize("name", WRITERS)
def test_images_are_what_pillow_reads(tmp_path: Path, name: str):
    WRITERS[name](tmp_path / name)
    with Image.open(tmp_path / name) as stored:
        image = ImageOps.exif_transpose(stored)
        expected = np.asarray(image.convert("RGB")).astype(int)
        grey = np.asarray(image.convert("RGB").convert("L")).astype(int)
    got = read_image(tmp_path / name)
    assert got.shape == ((60, 40, 3) if name == "turned.jpg" else (40, 60, 3))
    assert got.dtype == np.uint8
    assert abs(got - expected).max() <= (3 if name.endswith("jpg") else 0)
    one = read_image(tmp_path / name, channels=1)
    assert one.shape == (*got.shape[:2], 1)
    assert abs(one[..., 0] - grey).max() <= 3


def test_a_jpeg_with_something_behind_its_end_is_read(tmp_path: Path):
    path = tmp_path / "a.jpg"
    Image.fromarray(picture()).save(path, quality=95)
    whole = read_image(path)
    path.write_bytes(path.read_bytes() + b"maker's notes")
    assert abs(read_image(path).astype(int) - whole).max() <= 3


def damages(data: bytes) -> dict[str, bytes]:
    middle = len(data) // 2
    return {
        "half": data[:middle],
        "all but the last 20 bytes": data[:-20],
        "all but the last byte of the pixels": data[:-13],
        "zeros behind the middle": data[:middle] + bytes(len(data) - middle),
        "empty": b"",
        "text": b"no image at all",
    }


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("damage", damages(bytes(100)))
def test_damaged_images_are_refused_by_name(tmp_path: Path, capfd, suffix: str, damage: str):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(picture(200, 300)).save(path)
    path.write_bytes(damages(path.read_bytes())[damage])
    with pytest.raises(InputError, match=rf"a\{suffix}: got a file that cannot be read"):
        read_image(path)
    expected = "a file that cannot be read" if suffix == ".png" else "(a file that cannot be read|a JPEG)"
    with pytest.raises(InputError, match=rf"a\{suffix}: got {expected}"):
        read_label(path)


def test_bits_that_flip_in_a_png_are_noticed(tmp_path: Path, capfd):
    path = tmp_path / "a.png"
    Image.fromarray(picture(200, 300)).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.png: got a file that cannot be read"):
        read_image(path)


def test_what_lacks_its_end_never_reaches_opencv(tmp_path: Path, monkeypatch):
    """Some versions of OpenCV fill up a truncated JPEG with grey."""
    path = tmp_path / "a.jpg"
    Image.fromarray(picture(200, 300)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    monkeypatch.setattr(decode.cv2, "imdecode", lambda data, flag: np.zeros((200, 300, 3), np.uint8))
    with pytest.raises(InputError, match="truncated"):
        read_image(path)


def test_a_missing_file_and_16_bits(tmp_path: Path):
    with pytest.raises(InputError, match=r"nothing\.png: no such file"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(InputError, match=r"nothing\.png: no such file"):
        read_label(tmp_path / "nothing.png")
    write_png(tmp_path / "deep.png", np.full((4, 5), 4000, np.uint16))
    with pytest.raises(InputError, match=r"deep\.png: got 16 bits a channel, expected 8"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_labels_are_the_indices_of_a_palette(tmp_path: Path, bits: int):
    label = np.random.default_rng(0).integers(0, 2**bits, (9, 11)).astype(np.uint8)
    indexed = Image.fromarray(label)
    indexed.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes())
    indexed.save(tmp_path / "a.png", bits=bits)
    got = read_label(tmp_path / "a.png")
    assert got.dtype == np.uint8
    assert (got == label).all()
    write_png(tmp_path / "grey.png", label)
    assert (read_label(tmp_path / "grey.png") == label).all()


def test_real_photographs_are_what_pillow_reads(real_data: Path):
    paths = [*(real_data / "ade_sample" / "images").iterdir(), *sorted((real_data / "camvid" / "val").iterdir())[:5]]
    for path in paths:
        difference = abs(read_image(path).astype(int) - np.asarray(Image.open(path).convert("RGB")))
        assert difference.mean() < 0.5
        assert path.suffix == ".jpg" or difference.max() == 0
