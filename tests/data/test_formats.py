"""What image files can be besides 8-bit pictures: told, turned or taken as they are, in every format."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from exp.data.decode import read_image, read_label
from exp.data.registry import build_dataset
from exp.data.verify import check_sample
from exp.predict_images import list_sources
from exp.runtime.errors import InputError
from tests.data.test_data_sets import data_config
from tests.program.test_predict_script import volume_predictor

GREY = np.arange(48 * 64).reshape(48, 64)
LABEL = ((GREY // 64 < 20) + 2 * (GREY % 64 < 30) > 1).astype(np.uint8)  # no symmetry
COLOURS = np.stack([GREY % 256, GREY // 12, 255 - GREY % 200], 2).astype(np.uint8)


def save_turned(path: Path, values: np.ndarray, orientation: int, **options: object) -> None:
    """Values as they are to be seen -> a file that stores them otherwise, and EXIF that says how to turn it back."""
    stored = values.swapaxes(0, 1) if orientation >= 5 else values
    mirrored = {2: (1,), 3: (0, 1), 4: (0,), 6: (0,), 7: (0, 1), 8: (1,)}.get(orientation, ())
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(np.ascontiguousarray(np.flip(stored, mirrored))).save(path, exif=exif, **options)


def write_folder(data_dir: Path, write_image: Callable, write_label: Callable, image: str, label: str) -> None:
    for kind, write, name in (("images", write_image, image), ("labels", write_label, label)):
        (data_dir / "val" / kind).mkdir(parents=True, exist_ok=True)
        write(data_dir / "val" / kind / name)


def open_folder(data_dir: Path):
    return build_dataset(data_config("folder"), str(data_dir), "val")


def png(values: np.ndarray) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(values).save(path)


DEEP = {
    "grey16.tif": png((GREY * 20).astype(np.uint16)),
    "grey16.png": png((GREY * 20).astype(np.uint16)),
    "rgb16.png": lambda path: cv2.imwrite(str(path), COLOURS.astype(np.uint16) * 257),
    "rgb16.tif": lambda path: cv2.imwrite(str(path), COLOURS.astype(np.uint16) * 257),
    "int32.tif": png(GREY.astype(np.int32)),
    "float.tif": png((GREY / GREY.max()).astype(np.float32)),
    "int8.tif": lambda path: Image.fromarray(COLOURS[..., 0]).save(path, tiffinfo={339: 2}),
    "int16.tif": lambda path: Image.fromarray((GREY * 20).astype(np.uint16)).save(path, tiffinfo={339: 2}),
}


@pytest.mark.parametrize("name", DEEP)
def test_samples_other_than_8_bits_are_told_everywhere(tmp_path: Path, name: str):
    write_folder(tmp_path, DEEP[name], png(LABEL), name, f"{Path(name).stem}.png")
    path, dataset = tmp_path / "val" / "images" / name, open_folder(tmp_path)
    for channels in (1, 3):
        with pytest.raises(InputError, match=rf"{name}: got .*(8|16|32) bits a channel, expected 8"):
            read_image(path, channels)
    assert [(f.kind, f.path) for f in check_sample(dataset, 0)] == [("unreadable", path)]
    (source,) = list_sources(path, tmp_path / "out")
    predictor = volume_predictor()
    object.__setattr__(predictor, "volumes", None)
    with pytest.raises(InputError, match="bits a channel, expected 8"):
        predictor.read(source)


PAGES = {
    "pages.tif": lambda path, pages: pages[0].save(path, save_all=True, append_images=pages[1:]),
    "frames.png": lambda path, pages: pages[0].save(path, save_all=True, append_images=pages[1:]),
    "frames.webp": lambda path, pages: pages[0].save(path, save_all=True, append_images=pages[1:], lossless=True),
}


@pytest.mark.parametrize("name", PAGES)
def test_files_of_several_images_are_told_with_their_number(tmp_path: Path, name: str):
    images, labels = ([Image.fromarray(v ^ np.uint8(i)) for i in range(4)] for v in (COLOURS, LABEL))
    write_folder(tmp_path, lambda p: PAGES[name](p, images), lambda p: PAGES[name](p, labels), name, name)
    for read, kind in ((read_image, "images"), (read_label, "labels")):
        with pytest.raises(InputError, match=rf"{name}: got a \w+ of 4 images, expected one"):
            read(tmp_path / "val" / kind / name)
    assert {f.kind for f in check_sample(open_folder(tmp_path), 0)} == {"unreadable"}


def test_smaller_copies_and_previews_are_no_further_images(tmp_path: Path):
    small = Image.fromarray(COLOURS).resize((16, 12))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(COLOURS).save(tmp_path / "a.tif", save_all=True, append_images=[small])
    with Image.open(tmp_path / "a.tif") as image:
        assert image.n_frames == 2
    assert (read_image(tmp_path / "a.tif") == COLOURS).all()
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[small], quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    assert read_image(tmp_path / "a.jpg").shape == COLOURS.shape


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_viewers_show_them(tmp_path: Path, orientation: int, suffix: str):
    options = {"jpg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    write_folder(
        tmp_path,
        lambda path: save_turned(path, COLOURS, orientation, **options),
        png(LABEL),
        f"a.{suffix}",
        "a.png",
    )
    dataset = open_folder(tmp_path)
    image, label = dataset.read(0)
    tolerance = 6 if suffix == "jpg" else 0
    assert image.flags.c_contiguous
    assert abs(image.astype(int) - COLOURS).max() <= tolerance
    assert (label == LABEL).all()
    expected = set() if orientation == 1 or suffix == "tif" else {"turned"}
    assert {f.kind for f in check_sample(dataset, 0)} == expected
    save_turned(tmp_path / "mask.png", LABEL, orientation)
    assert (read_label(tmp_path / "mask.png") == LABEL).all(), "a mask that was saved with its photograph's EXIF"


def test_masks_on_the_pixels_as_stored_keep_their_images(tmp_path: Path):
    """What fits the stored image alone was drawn on it."""
    stored = np.ascontiguousarray(np.rot90(LABEL))
    write_folder(
        tmp_path, lambda path: save_turned(path, COLOURS, 6, quality=98, subsampling=0), png(stored), "a.jpg", "a.png"
    )
    image, label = open_folder(tmp_path).read(0)
    assert abs(image.astype(int) - np.rot90(COLOURS)).max() <= 6
    assert (label == stored).all()
    assert {f.kind for f in check_sample(open_folder(tmp_path), 0)} == {"turned"}
    png(LABEL[:20])(tmp_path / "val" / "labels" / "a.png")
    _, size = check_sample(open_folder(tmp_path), 0)
    assert size.text == "got 64x20 pixels, expected 64x48 (48x64 before EXIF turns it)"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_none(tmp_path: Path):
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", quality=98)
    assert read_image(tmp_path / "a.jpg").shape == COLOURS.shape


LOSSY = {
    "a.jpg": lambda path: Image.fromarray(LABEL).save(path, quality=95),
    "a.webp": lambda path: Image.fromarray(COLOURS).save(path, quality=95),
    "alpha.webp": lambda path: Image.fromarray(COLOURS).convert("RGBA").save(path, quality=95, exif=b"Exif\0\0MM"),
    "a.tif": lambda path: Image.fromarray(LABEL).save(path, compression="jpeg"),
    "named.png": lambda path: Image.fromarray(LABEL).save(path, "JPEG"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_masks_are_refused(tmp_path: Path, name: str):
    write_folder(tmp_path, png(COLOURS), LOSSY[name], f"{Path(name).stem}.png", name)
    with pytest.raises(InputError, match=rf"{name}: got a .*, which changes label values, expected a lossless"):
        open_folder(tmp_path).read(0)
    assert "lossy" in {f.kind for f in check_sample(open_folder(tmp_path), 0)}


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "lzw.tif", "a.webp"])
def test_lossless_masks_are_taken(tmp_path: Path, name: str):
    options = {"lzw.tif": {"compression": "tiff_lzw"}, "a.webp": {"lossless": True}}.get(name, {})
    Image.fromarray(LABEL).save(tmp_path / name, **options)
    values = read_label(tmp_path / name)
    assert ((values[..., 0] if name == "a.webp" else values) == LABEL).all()  # WebP has no grey


def grey_png(path: Path, values: np.ndarray, bits: int) -> None:
    """A grey PNG of so many bits a sample, which Pillow does not write itself."""
    import struct
    import zlib

    height, width = values.shape
    rows = np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(height, -1)
    packed = np.packbits(rows, axis=1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_are_their_samples(tmp_path: Path, bits: int):
    values = (GREY % 2**bits).astype(np.uint8)
    grey_png(tmp_path / "a.png", values, bits)
    got = read_label(tmp_path / "a.png")
    assert got.dtype == np.uint8
    assert (got == values).all()
    spread = read_image(tmp_path / "a.png", 1)[..., 0]
    assert (spread == values * (255 // (2**bits - 1))).all(), "an image's white is white"
    for suffix in ("tif", "bmp"):
        Image.fromarray(values.astype(bool)).save(tmp_path / f"a.{suffix}")
        assert (read_label(tmp_path / f"a.{suffix}") == (values > 0)).all()


def test_signed_masks_are_not_taken_for_ignored_pixels(tmp_path: Path):
    Image.fromarray(np.where(LABEL, 255, 0).astype(np.uint8)).save(tmp_path / "a.tif", tiffinfo={339: 2})  # -1 and 0
    with pytest.raises(InputError, match=r"a\.tif: got signed numbers of 8 bits a channel, expected 8"):
        read_label(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("label_map", "values", "message"),
    [
        (
            {1: 0, 2: 1},
            (0, 1, 2),
            r"got label value 0, expected 1\.\.2 or 255 \(label_map makes class 0 of others: name",
        ),
        ({1: 0, 2: 1, 5: 1}, (0, 1, 3, 4), r"got label value 0, 3\.\.4, expected 1\.\.2 or 5 or 255"),
        ({3: 0}, (0, 1, 3), "name the value 0, too"),
        ({1: 0, 2: 1}, (1, 2, 255), None),
        ({0: 0, 3: 0}, (0, 1, 3), None),
        ({11: 255}, (0, 1, 11), None),
    ],
)
def test_no_value_is_merged_unasked(tmp_path: Path, label_map: dict, values: tuple, message: str | None):
    label = np.resize(np.array(values, np.uint8), LABEL.shape)
    write_folder(tmp_path, png(COLOURS), png(label), "a.png", "a.png")
    dataset = build_dataset(data_config("folder", label_map=label_map), str(tmp_path), "val")
    if message is None:
        assert set(np.unique(dataset.read(0)[1])) <= {0, 1, 255}
        return
    with pytest.raises(InputError, match=message):
        dataset.read(0)
    assert "label value" in {f.kind for f in check_sample(dataset, 0)}
