"""The commands of an installation: each runs a script of the tree as if it were called by its path. And that for a
page."""

import runpy
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = "index.html"  # in the folder that scripts/report.py writes


def train() -> None:
    _run("exp/main.py")


def predict() -> None:
    _run("scripts/predict.py")


def evaluate() -> None:
    _run("scripts/evaluate_probabilities.py")


def export() -> None:
    _run("scripts/export.py")


def prepare() -> None:
    _run("scripts/prepare_data.py")


def reproduce() -> None:
    _run("scripts/reproduce.py")


def page_command(folder: Path) -> str:
    """The folder of a run -> the command that makes the page of its results."""
    return shlex.join(["python", str(ROOT / "scripts" / "report.py"), str(folder)])


def _run(script: str) -> None:
    """Run ROOT/script; where a package of the framework is missing, say how it is installed, with status 2."""
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("exp", "rankseg_rma"):
            raise
        print(f"error: no package {error.name}; expected the framework's: pip install '.[framework]'", file=sys.stderr)
        sys.exit(2)
