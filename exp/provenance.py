"""What was run, with which code and which libraries."""

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from exp.files.atomic import append_line, write_atomically

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "torchvision", "timm", "segmentation-models-pytorch", "numpy", "pillow")


def code_revision() -> str:
    """The commit of this code, '-dirty' behind it where tracked files were changed; 'unknown' outside git."""

    def git(*args: str) -> str:
        done = subprocess.run(("git", "-C", str(ROOT), *args), capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"  # a copy of the code inside somebody else's repository
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def library_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def describe_code() -> dict[str, Any]:
    """What results and runs say of the program that made them."""
    return {"revision": code_revision(), "versions": library_versions()}


def record_start(run_dir: Path, config: dict[str, Any], config_yaml: str, iteration: int, world_size: int) -> None:
    """Append this start of training to <run>/starts.jsonl; the first one also writes <run>/config.yaml."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if iteration == 0 or not (run_dir / "config.yaml").exists():
        write_atomically(run_dir / "config.yaml", config_yaml)
    start = {
        "iteration": iteration,
        "world_size": world_size,
        "command": sys.argv,
        **describe_code(),
        "config": config,
    }
    append_line(run_dir / "starts.jsonl", json.dumps(start))
