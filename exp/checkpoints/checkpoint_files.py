"""Files of a run's checkpoints: written whole with a checksum beside them, checked before they are read, rotated."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from exp.files.atomic import PART, file_sha256, move_aside, no_room, replacing, require_room, sync
from exp.files.text import read_json
from exp.runtime.errors import PATH_ERRORS, InputError, one_line

PATTERN = re.compile(r"iter_(\d+)\.pt$")
DAMAGED = ".damaged"
MAX_FACTS = 2**20  # bytes of the JSON beside a checkpoint, which has one or two thousand


def write_checked(path: Path, write: Callable[[Path], None], facts: Mapping[str, Any], needed: int) -> None:
    """Call write(a temporary path), then put the file in its place and a JSON of facts and its SHA-256 beside it.

    Whenever this is interrupted, `path` is absent or whole, and its JSON, which comes first, knows its checksum: that
    of the file to come and that of the one that it replaces. Both are on the disk when this returns.
    needed: bytes that the file takes, for the InputError of a full disk, which leaves what was there as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = file_sha256(path) if path.exists() else None
    require_room(path, needed)
    try:
        with replacing(path) as temporary:
            write(temporary)
            sync(temporary)
            content = {
                "file": path.name,
                "sha256": file_sha256(temporary),
                "replaces": before,
                "bytes": temporary.stat().st_size,
                **facts,
            }
            with replacing(facts_path(path)) as temporary_facts:
                temporary_facts.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except PATH_ERRORS:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error
        while inner := cause.__cause__ or cause.__context__:  # PyTorch hides what the system said behind its own error
            cause = inner
        raise no_room(path, needed, one_line(cause)) from error


def facts_path(path: Path) -> Path:
    """A checkpoint file -> the JSON beside it: best.pt -> best.pt.json."""
    return path.with_name(f"{path.name}.json")


def find_damage(path: Path) -> str | None:
    """A checkpoint -> what is wrong with it, or None; the whole file is read. One without a checksum is let pass."""
    if not path.is_file():
        return "it is no file"
    if not facts_path(path).exists():
        print(f"warning: {path}: no checksum beside it, taken unchecked", file=sys.stderr, flush=True)
        return None
    try:
        facts = read_json(facts_path(path), "the checksum of the file beside it", MAX_FACTS)
        expected = {facts["sha256"], facts["replaces"]}
        found = file_sha256(path)
    except (InputError, OSError, TypeError, KeyError) as error:
        return f"{facts_path(path)}: cannot be read ({error!r})"
    return None if found in expected else f"its SHA-256 is {found[:12]}..., expected {str(facts['sha256'])[:12]}..."


def list_checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("iter_*.pt") if (match := PATTERN.match(path.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(folder: Path) -> Path | None:
    """A run's newest checkpoint that is whole, or None where there is none at all.

    A damaged one is named on stderr and left out; InputError if all are.
    """
    damaged = []
    for path in reversed(list_checkpoints(folder)):
        damage = find_damage(path)
        if damage is None:
            return path
        damaged.append(path)
        print(f"warning: {path}: damaged, left out: {damage}", file=sys.stderr, flush=True)
    if damaged:
        raise InputError(
            f"{folder}: got damaged checkpoints alone ({', '.join(p.name for p in damaged)}), expected a whole one: "
            "bring back a copy, or train anew in another --output_dir"
        )
    return None


def set_aside_damaged(folder: Path, whole: Path) -> None:
    """Rename the checkpoints that are newer than `whole` to *.damaged; training will write them anew."""
    for path in list_checkpoints(folder):
        if int(PATTERN.match(path.name)[1]) > int(PATTERN.match(whole.name)[1]):
            move_aside([path, facts_path(path)], _damaged_name)


def _damaged_name(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}{DAMAGED}{'' if number == 1 else f'.{number}'}")


def remove_older(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`, the file before its JSON."""
    for path in list_checkpoints(folder)[:-keep]:
        path.unlink()
        facts_path(path).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written; for the one process that writes to the folder."""
    for path in folder.glob(f".tmp-*{PART}"):
        path.unlink()
