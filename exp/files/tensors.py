"""Files of tensors -> their content, without running any code that a file may hold."""

import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from exp.runtime.errors import decoding


def load_tensor_file(path: Path, expected: str) -> Any:
    """A .safetensors file or one of torch.save -> its content on the CPU; InputError if it is not `expected`.

    The checksums (CRC-32) that torch.save writes are compared first, which torch.load does not do. The content takes
    about as much memory as the file has bytes.
    """
    with decoding(path, expected):
        if path.suffix == ".safetensors":
            return load_file(path)  # which takes no table of more than 100 MB
        if zipfile.is_zipfile(path):  # torch's format since 1.6; older files have no checksums
            _check_archive(path)
        _refuse_bytearrays(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch, on how the file came to be
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
                    raise ValueError(f"it asks for {named[1]}; tensors and plain values alone are taken") from None
                raise
        for tensor in find_tensors(content):
            _check_tensor(tensor)
        return content


def _check_archive(path: Path) -> None:
    """ValueError for an archive whose parts do not add up to its size, or whose checksums are wrong.

    torch.save packs nothing, so what takes more memory than the file has bytes was made to.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
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


def find_tensors(content: Any) -> Iterator[Tensor]:
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
