"""Small text and JSON files -> their content; what is damaged, absurdly large or no file is told in one line."""

import json
import stat
from pathlib import Path
from typing import Any

from exp.runtime.errors import InputError

MAX_TEXT = 64 * 2**20  # bytes; the largest that the program reads, a manifest of 400,000 files, has 50 MB


def read_text(path: Path, expected: str, max_bytes: int = MAX_TEXT, encoding: str = "utf-8") -> str:
    """A regular file of at most `max_bytes` -> its text; InputError with what was `expected` for anything else."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device would be read for ever
            raise InputError(f"{path}: got something that is no file, expected {expected}")
        if found.st_size > max_bytes:
            raise InputError(f"{path}: got {found.st_size} bytes, expected {expected}, of {max_bytes} bytes at most")
        return path.read_text(encoding=encoding)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected {expected}") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a NUL in it
        raise InputError(f"{path}: cannot be read ({error}), expected {expected}") from None


def read_json(path: Path, expected: str, max_bytes: int = MAX_TEXT) -> dict[str, Any]:
    """A JSON file -> its object; InputError for a damaged one and for any other value."""
    try:
        content = json.loads(read_text(path, expected, max_bytes))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # RecursionError: brackets within brackets by the thousand
        raise InputError(f"{path}: cannot be read (no JSON: {error}), expected {expected}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: cannot be read (a JSON {type(content).__name__}), expected {expected}")
    return content
