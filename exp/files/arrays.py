"""numpy's .npy format -> arrays, without unpickling, and without memory for more than the file holds."""

import io
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

# What numpy and zipfile raise on files that are damaged, of another kind, or hold Python objects.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    OverflowError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    tokenize.TokenError,
)
MAX_HEADER = 2**16  # bytes; the first version of the format allows no more
FREE_BYTES = 2**30  # an array of an archive may have that many however it is packed
MAX_RATIO = 200  # by which a larger one may be packed: softmax maps come to 10 or so, a bomb to the 1,032 of deflate


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """A file at its start -> shape, whether in Fortran's order, dtype, offset of the data; else one of UNREADABLE."""
    start = io.BytesIO(file.read(MAX_HEADER))  # a header's length is what the file says, up to 4 GiB
    version = np.lib.format.read_magic(start)
    if version not in HEADERS:
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = HEADERS[version](start)
    if dtype.hasobject or not all(side >= 0 for side in shape):
        raise ValueError(f"an array of {dtype} and shape {shape}")
    return shape, fortran, dtype, start.tell()


HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def map_array(path: Path) -> np.ndarray:
    """An .npy file -> its array, mapped from the disk and not writable; one of UNREADABLE if that cannot be."""
    with open(path, "rb") as file:
        shape, fortran, dtype, offset = read_header(file)
    size, expected = path.stat().st_size - offset, math.prod(shape) * dtype.itemsize
    if size < expected:
        raise ValueError(f"{size} bytes of data for an array of {dtype} and shape {shape}")
    if expected == 0:  # nothing to map
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an .npz archive; one of UNREADABLE if that cannot be, before any memory is taken for its data."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > max(FREE_BYTES, MAX_RATIO * info.compress_size):
        raise ValueError(f"'{name}' of {info.file_size} bytes packed into {info.compress_size}")
    with archive.open(info) as file:
        shape, fortran, dtype, offset = read_header(file)
    if info.file_size - offset != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{info.file_size - offset} bytes of data for '{name}' of {dtype} and shape {shape}")
    values = np.empty(math.prod(shape), dtype)
    target = memoryview(values).cast("B") if values.size else memoryview(b"")
    with archive.open(info) as file:
        file.read(offset)
        done = 0
        while done < len(target):
            read = file.readinto(target[done : done + 2**24])
            if not read:
                raise EOFError(f"the data of '{name}' end early")
            done += read
        file.read(1)  # the end, where the checksum is compared
    return values.reshape(shape, order="F" if fortran else "C")
