"""`rankseg_rma` is one file that other projects can have in four ways."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

USE = (
    "import rankseg_rma, torch; from rankseg_rma import rankseg_rma as rule; "
    "print(rankseg_rma.__file__, rule(torch.rand(1, 3, 4, 4).softmax(1)).shape)"
)


def use(folder: Path, *flags: str) -> str:
    """Import and call the rule in a fresh Python in `folder` -> what it prints."""
    done = subprocess.run([sys.executable, *flags, "-c", USE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_the_clone_and_as_a_copy(tmp_path: Path):
    assert str(ROOT) in use(ROOT)
    shutil.copy(ROOT / "rankseg_rma.py", tmp_path)
    assert str(tmp_path) in use(tmp_path)


def test_from_exp():
    code = "import main; " + USE  # the driver puts the top level on the path
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "exp", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_after_pip_install(tmp_path: Path):
    pytest.importorskip("setuptools")
    source, target = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("rankseg_rma.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    done = subprocess.run([*pip, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in target.glob("*.py")) == ["rankseg_rma.py"]
    code = f"import sys; sys.path.insert(0, {str(target)!r}); " + USE
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
