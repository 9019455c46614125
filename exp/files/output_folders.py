"""Folders of files that belong together: what they are made from stands beside them, and nothing else is mixed in."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exp.files.atomic import move_aside, write_atomically


def claim_folder(folder: Path, origin: Mapping[str, Any]) -> Path:
    """Make `folder` with <folder>.json beside it, which says what its files are made from, and return it.

    A folder that is there already is used again if its `origin` was the same; else it is moved with its JSON to
    older/ beside it, under the first free number.
    """
    record = folder.with_name(f"{folder.name}.json")
    text = json.dumps(origin, indent=2, sort_keys=True) + "\n"
    if (folder.exists() or record.exists()) and not (record.is_file() and record.read_bytes() == text.encode()):
        move_aside([folder, record])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(record, text)
    return folder
