"""Files that would run code, or take the machine's memory, if they were believed."""

import gzip
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from PIL import Image

GIB = 2**30


class Touch:
    """Unpickled, it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


class ManyBytes:
    """Unpickled, it takes 3 GB: torch.load(weights_only=True) lets it by."""

    def __reduce__(self) -> tuple:
        return bytearray, (3_000_000_000,)


def text(value: str) -> bytes:
    """The opcode that puts a text on the stack."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


PICKLES = {  # what torch.load(weights_only=True) lets by, some bytes each
    "encode": b"c_codecs\nencode\n" * 28 + text("a" * 64) + text("utf-16") + b"\x86R" + (text("hex") + b"\x86R") * 27,
    "by_size": b"ctorch\nTensor\n(J\x00\xca\x9a\x3btR",
    "hashed": b"}q\x01K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"h\x01h\x00K\x01s",
    "hashed_wide": b"}q\x01K\x01q\x00" + (b"(" + b"h\x00" * 100 + b"tq\x00") * 6 + b"h\x01h\x00K\x01s",
    "empty_lists": b"]" * (2**23 + 2**10),
}


def write_checkpoints(folder: Path, marker: Path) -> dict[str, Path]:
    """Hostile checkpoints by what they are."""
    folder.mkdir(parents=True)
    paths = {name: folder / f"{name}.pt" for name in ("zip", "legacy", "deflated", "bytearray", "expanded")}
    content = {"model": {"a": torch.zeros(4)}, "iteration": Touch(marker)}
    torch.save(content, paths["zip"])
    torch.save(content, paths["legacy"], _use_new_zipfile_serialization=False)
    torch.save({"model": ManyBytes()}, paths["bytearray"])
    torch.save({"a": torch.zeros(4)}, folder / "sound")
    with zipfile.ZipFile(folder / "sound") as sound:
        parts = {name: sound.read(name) for name in sound.namelist()}
    root = next(name for name in parts if name.endswith("/data.pkl")).partition("/")[0]
    with zipfile.ZipFile(paths["deflated"], "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in parts.items():
            packed.writestr(name, data)
        with packed.open(f"{root}/data/1", "w", force_zip64=True) as bomb:
            bomb.write(bytes(2**26))
    for name, data in PICKLES.items():
        paths[name] = folder / f"{name}.pt"
        write_zip(paths[name], {**parts, f"{root}/data.pkl": b"\x80\x02" + data + b"."})
    torch.save({"a": torch.zeros(1).expand(10**12)}, paths["expanded"])
    paths["table"] = folder / "table.safetensors"
    paths["table"].write_bytes(struct.pack("<Q", 2**40) + b"{}")
    return paths


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """What stands in front of the data of an .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def pickled_array(marker: Path) -> bytes:
    """An .npy file with a pickle in it."""
    stream = io.BytesIO()
    np.save(stream, np.array([Touch(marker)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def zeros_member(path: Path, members: dict[str, tuple[bytes, int]]) -> None:
    """An .npz whose members are a header and that many zero bytes, packed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, (header, count) in members.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(header)
                for _ in range(count // 2**24):
                    file.write(bytes(2**24))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def zeros_packed(count: int) -> bytes:
    """zlib's packing of that many zero bytes, a GB in a MB: one packed piece, again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)  # what follows does not refer to it
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    rest = packer.compress(bytes(count % 2**20)) + packer.flush()
    checksum = count % 65521 << 16 | 1  # Adler-32 of zeros
    return b"\x78\xda" + piece * (count // 2**20) + rest + struct.pack(">I", checksum)


def png_bomb(side: int) -> bytes:
    """A whole black-and-white PNG of side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zeros_packed(side * (1 + (side + 7) // 8))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def write_images(folder: Path) -> dict[str, Path]:
    """Image files that say they have billions of pixels, and whole ones of which that is true, by kind."""
    folder.mkdir(parents=True)
    side = 60_000
    small = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    files = {"whole.png": png_bomb(side)}
    for kind in ("jpeg", "webp"):
        stream = io.BytesIO()
        small.save(stream, kind, lossless=True)
        files[f"patched.{kind}"] = stream.getvalue()
    jpeg, webp = files["patched.jpeg"], files["patched.webp"]
    place = jpeg.index(b"\xff\xc0") + 5
    files["patched.jpeg"] = jpeg[:place] + struct.pack(">HH", side, side) + jpeg[place + 4 :]
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (2**24 - 1).to_bytes(3, "little") * 2 + webp[12:]
    files["patched.webp"] = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    files["tile.tiff"] = tiled_tiff(side)
    files["other.png"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) = quit\n"
    paths = {name: folder / name for name in files}
    for name, data in files.items():
        paths[name].write_bytes(data)
    return paths


def tiled_tiff(side: int) -> bytes:
    """A grey TIFF of 8 x 8 pixels, cut out of one packed tile of side x side."""
    tile = zeros_packed(2**26)
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(tile)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(tile)) + tile + struct.pack("<H", len(tags)) + entries + bytes(4)


def commented_png(kind: bytes) -> bytes:
    """A sound 8 x 8 PNG with a GiB of zeros packed into a chunk beside its pixels."""
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(stream, "png")
    data = stream.getvalue()
    place = data.index(b"IDAT") - 4
    return data[:place] + png_chunk(kind, b"name\0\0" + zeros_packed(GIB)) + data[place:]


def write_volumes(folder: Path) -> dict[str, Path]:
    """NIfTI files whose headers promise what no file holds, and gzip bombs, by what they are."""
    folder.mkdir(parents=True)
    head = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).header.binaryblock
    paths = {}

    def write(name: str, shape: tuple[int, ...], *, offset: float = 352.0, extension: bytes = bytes(4), size: int = 0):
        data = bytearray(head + extension)
        struct.pack_into(f"<{1 + len(shape)}h", data, 40, len(shape), *shape)
        struct.pack_into("<f", data, 108, offset)
        paths[name] = folder / f"{name}.nii.gz"
        zeros = gzip.compress(bytes(2**24), mtime=0)  # gzip's members follow one another
        paths[name].write_bytes(gzip.compress(bytes(data), mtime=0) + zeros * (size // 2**24))

    write("terabytes", (32767, 32767, 32767))
    write("sides", (4096, 4096, 4096), size=4096**3)
    write("bomb", (4096, 4096, 256), size=256 * 2**24)
    write("extension", (4, 4, 4), offset=2.0**31, extension=struct.pack("<Bxxxii", 1, 2**31 - 16, 0), size=2 * GIB)
    return paths
