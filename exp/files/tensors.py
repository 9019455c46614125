"""Files of tensors -> their content, without running any code that a file may hold."""

import io
import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from exp.files.text import MAX_FILE, require_file
from exp.runtime.errors import decoding

MAX_PICKLE = 2**23  # bytes: what stands around the tensors; a thousand of them with the optimiser's state have 0.5 MB
MAX_TUPLE = 2**12  # values in a tuple, those of tuples inside it counted each time: hashing one looks at all
PICKLES_BEFORE_1_6 = 5  # in a file of torch before 1.6: two marks, the system's facts, the content, the storages' names
# The names that torch.save writes for tensors and plain values. torch.load lets by more, and with some of those a file
# of a few kB takes gigabytes (bytearray, _codecs.encode, tensors by size).
NAMES = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)|torch [a-z]\w*|torch Size"
    r"|torch(\.cuda|\.storage)? \w*Storage|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter\w*)"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
)
UNHASHABLE = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "APPEND", "APPENDS", "SETITEM", "SETITEMS")
METADATA = "rankseg_rma"  # the key of a safetensors file's metadata that holds JSON of a run of this program
MAX_METADATA = 2**20  # characters of that JSON; with the names of 255 classes it has some 20,000


def load_tensor_file(path: Path, expected: str) -> Any:
    """A .safetensors file or one of torch.save -> its content on the CPU; InputError if it is not `expected`.

    The checksums (CRC-32) that torch.save writes are compared first, which torch.load does not do. The content takes
    about as much memory as the file has bytes.
    """
    require_file(path, expected, MAX_FILE)
    with decoding(path, expected):
        if path.suffix == ".safetensors":
            return load_file(path)  # which takes no table of more than 100 MB
        _check_pickles(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch, on how the file came to be
            content = torch.load(path, map_location="cpu", weights_only=True)
        for tensor in find_tensors(content):
            _check_tensor(tensor)
        return content


def _check_pickles(path: Path) -> None:
    """ValueError for a file of torch.save that is damaged, or whose pickles would take more than their size."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # by which torch.load tells; files from before torch 1.6 have no checksums
            file.seek(0)
            for _ in range(PICKLES_BEFORE_1_6):
                _check_pickle(file)
            return
        _check_archive(path)
        file.seek(0)
        reader = torch._C.PyTorchFileReader(file)  # torch.load's own: two readers may see two files in one
        _check_pickle(io.BytesIO(reader.get_record("data.pkl")))


def _check_pickle(file: IO[bytes]) -> None:
    """Read to the end of a pickle without making anything of it; ValueError for one that no weights need.

    Kept is, for each value, how many others it stands for where it is hashed: of lists and dicts, which cannot be,
    none. A tuple of ten of a tuple of ten ... is some bytes for each step, and billions of values.
    """
    stack, memo, start = [], {}, file.tell()
    for code, argument, place in pickletools.genops(file):
        if place - start > MAX_PICKLE:
            raise ValueError(f"more than {MAX_PICKLE} bytes besides the tensors")
        if code.name == "GLOBAL" and not NAMES.fullmatch(argument):
            raise ValueError(f"it asks for {argument.replace(' ', '.')}; tensors and plain values alone are taken")
        if "PUT" in code.name:
            memo[argument] = stack[-1]
            continue
        taken = _pop(stack, len(code.stack_before), to_mark=pickletools.markobject in code.stack_before)
        size = memo[argument] if "GET" in code.name else 1 + sum(taken)
        if size > MAX_TUPLE and "TUPLE" in code.name:
            raise ValueError(f"a tuple of more than {MAX_TUPLE} values")
        made = None if code.name == "MARK" else 1 if code.name in UNHASHABLE else size
        stack += [made] * len(code.stack_after)


def _pop(stack: list[int | None], number: int, *, to_mark: bool) -> list[int]:
    """What an operation takes from the stack: `number` values, or all above the last mark, and what stands below it."""
    taken = []
    if to_mark:
        while (value := stack.pop()) is not None:
            taken.append(value)
        number -= 2  # the mark, and what stood above it
    return taken + [stack.pop() for _ in range(number)]


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


def read_classes(path: Path) -> list[str] | None:
    """The names of the classes in a safetensors file that a run of this program wrote; None in any other."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {})[METADATA]
        return json.loads(text)["classes"] if len(text) <= MAX_METADATA else None
    except (KeyError, ValueError, TypeError, RecursionError, SafetensorError):
        return None
