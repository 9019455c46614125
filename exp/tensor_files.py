"""Files of tensors -> their content, without running any code that a file may hold."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from exp.errors import InputError

# What torch.load and safetensors raise on files that are damaged, of another kind, or hold more than tensors.
UNREADABLE = (
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
)


def load_tensor_file(path: Path, expected: str) -> Any:
    """A .safetensors file or one of torch.save -> its content on the CPU; InputError if it is not `expected`.

    The checksums (CRC-32) that torch.save writes are compared first, which torch.load does not do.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected {expected}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch's format since 1.6; older files have no checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of its part {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: got a file that cannot be read ({reason}), expected {expected}") from None
