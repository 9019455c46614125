"""Small text and JSON files -> their content; what is damaged, absurdly large or no file is told in one line."""

import json
import stat
from pathlib import Path
from typing import Any

from exp.runtime.errors import InputError, decoding, unreadable

MAX_TEXT = 64 * 2**20  # bytes; the largest that the program reads, a manifest of 400,000 files, has 50 MB

MAX_FILE = 2**42  # bytes of a file whose content is bounded by other means, or not taken into memory at once


def require_file(path: Path, expected: str, max_bytes: int) -> None:
    """InputError unless `path` is a regular file (a pipe or device would be read for ever) of at most `max_bytes`."""
    with decoding(path, expected):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: got something that is no file, expected {expected}")
        if found.st_size > max_bytes:
            raise InputError(f"{path}: got {found.st_size} bytes, expected {expected}, of {max_bytes} bytes at most")


def read_text(path: Path, expected: str, max_bytes: int = MAX_TEXT, encoding: str = "utf-8") -> str:
    """A regular file of at most `max_bytes` -> its text; InputError with what was `expected` for anything else."""
    require_file(path, expected, max_bytes)
    with decoding(path, expected):
        return path.read_text(encoding=encoding)


def read_json(path: Path, expected: str, max_bytes: int = MAX_TEXT) -> dict[str, Any]:
    """A JSON file -> its object; InputError for a damaged one and for any other value."""
    text = read_text(path, expected, max_bytes)
    with decoding(path, expected):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise unreadable(path, f"a JSON {type(content).__name__}", expected)
    return content
