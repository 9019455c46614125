"""Files of tensors -> their content, without running any code that a file may hold."""

import mmap
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from exp.runtime.errors import InputError

# What torch.load and safetensors raise on files that are damaged, of another kind, or hold more than tensors.
UNREADABLE = (
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    EOFError,
    MemoryError,
    OverflowError,
    AssertionError,
    NotImplementedError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
)
MAX_HEADER = 2**24  # bytes of a safetensors file's table; a network of 2,000 tensors has 0.2 MB
MAX_MEMBERS = 100_000  # of a checkpoint's archive: its tensors and some more


def load_tensor_file(path: Path, expected: str) -> Any:
    """A .safetensors file or one of torch.save -> its content on the CPU; InputError if it is not `expected`.

    The checksums (CRC-32) that torch.save writes are compared first, which torch.load does not do. The content takes
    about as much memory as the file has bytes.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected {expected}")
    try:
        if path.suffix == ".safetensors":
            check_safetensors(path)
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch's format since 1.6; older files have no checksums
            _check_archive(path)
        _refuse_bytearrays(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch, on how the file came to be
            content = torch.load(path, map_location="cpu", weights_only=True)
        for tensor in _tensors(content):
            _check_tensor(tensor)
        return content
    except UNREADABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it asks for {named[1]}, and nothing but tensors and plain values is taken from a file"
        raise InputError(f"{path}: got a file that cannot be read ({reason}), expected {expected}") from None


def check_safetensors(path: Path) -> None:
    """ValueError for a table of tensors that is longer than any is, before it is read."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"a table of {length} bytes")


def _check_archive(path: Path) -> None:
    """ValueError for an archive whose parts do not add up to its size, or whose checksums are wrong.

    torch.save packs nothing, so what takes more memory than the file has bytes was made to.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"{len(members)} parts")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"its part {member.filename} is packed, {member.file_size} bytes")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its parts overlap")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the checksum of its part {damaged} is wrong")


def _refuse_bytearrays(path: Path) -> None:
    """ValueError for a file with the one name that torch.load lets by and that makes gigabytes out of a number."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray") >= 0:
            raise ValueError("a bytearray")


def _tensors(content: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, each container once, however deep or often it stands in others."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            waiting += (*value.keys(), *value.values()) if isinstance(value, dict) else value


def _check_tensor(tensor: Tensor) -> None:
    """ValueError for a tensor of another kind than those of weights, or of more elements than are in the file."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"a tensor of layout {tensor.layout} on {tensor.device}")
    needed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > held:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} over {held} bytes")
