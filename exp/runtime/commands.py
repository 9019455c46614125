"""The commands of an installation. Each runs a script of the tree as if it were called by its path."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


def _run(script: str) -> None:
    """Run ROOT/script; where a package of the framework is missing, say how it is installed, with status 2."""
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("exp", "rankseg_rma"):
            raise
        print(f"error: no package {error.name}; expected the framework's: pip install '.[framework]'", file=sys.stderr)
        sys.exit(2)
