"""Folders of files that belong together: what they are made from stands beside them, and nothing else is mixed in."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exp.files.atomic import write_atomically


def claim_folder(folder: Path, origin: Mapping[str, Any]) -> Path:
    """Make `folder` with <folder>.json beside it, which says what its files are made from, and return it.

    A folder that is there already is used again if its `origin` was the same; else it is moved with its JSON to
    older/ beside it, under the first free number.
    """
    record = folder.with_name(f"{folder.name}.json")
    text = json.dumps(origin, indent=2, sort_keys=True) + "\n"
    if (folder.exists() or record.exists()) and not (record.is_file() and record.read_bytes() == text.encode()):
        _move_aside(folder, record)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(record, text)
    return folder


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, of the same suffix, which becomes `path` if the body succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _move_aside(folder: Path, record: Path) -> None:
    older = folder.parent / "older"
    older.mkdir(exist_ok=True)
    number = 1
    while any((older / f"{folder.name}.{number}{suffix}").exists() for suffix in ("", ".json")):
        number += 1
    for path, suffix in ((folder, ""), (record, ".json")):
        if path.exists():
            os.rename(path, older / f"{folder.name}.{number}{suffix}")
