"""`rankseg_rma` is one file that other projects can have in four ways; an installation has the framework, too."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, TINY, TINY_RUN
from tests.data.volume_trees import write_hippocampus

INSTALLED = ("exp", "configs", "scripts")
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `pip install .` puts into an environment, without the packages that it depends on."""
    pytest.importorskip("setuptools", minversion="78")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("rankseg_rma.py", "pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in INSTALLED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    done = subprocess.run([*pip, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def run_installed(site: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in `folder`, of a Python that has `site` among its packages."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PATH": f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_rule_after_pip_install(site: Path, tmp_path: Path):
    names = {path.name for path in site.iterdir() if path.suffix != ".dist-info" and path.name != "__pycache__"}
    assert names == {"rankseg_rma.py", "rankseg_rma", "rankseg_rma_framework", "bin"}  # no `exp`, no `scripts`
    assert [path.name for path in (site / "rankseg_rma").iterdir()] == ["py.typed"]
    code = f"import sys; sys.path.insert(0, {str(site)!r}); " + USE
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(site / "rankseg_rma.py") in done.stdout


def test_the_framework_takes_what_requirements_say_without_the_tests(site: Path):
    (metadata,) = site.glob("*.dist-info")
    lines = email.message_from_string((metadata / "METADATA").read_text()).get_all("Requires-Dist")
    rule = {line for line in lines if "extra ==" not in line}
    assert rule == {"torch>=2.6"}
    extra = {re.split(r"[<>=]", line)[0] for line in lines if line.endswith('extra == "framework"')}
    assert {"torch", "timm", "pyyaml", "rankseg"} <= extra
    assert not {"pytest", "ruff", "hypothesis", "setuptools"} & extra


def test_the_tree_is_installed_whole(site: Path):
    def files(root: Path) -> set[str]:
        found = (path for name in INSTALLED for path in (root / name).rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix() for path in found if path.suffix != ".pyc"}

    assert files(site / "rankseg_rma_framework") == files(ROOT)


@pytest.mark.parametrize(
    ("command", "script"),
    [
        ("rankseg-train", "exp/main.py"),
        ("rankseg-predict", "scripts/predict.py"),
        ("rankseg-evaluate", "scripts/evaluate_probabilities.py"),
        ("rankseg-export", "scripts/export.py"),
        ("rankseg-prepare", "scripts/prepare_data.py"),
        ("rankseg-reproduce", "scripts/reproduce.py"),
    ],
)
def test_a_command_has_the_flags_of_its_script(command: str, script: str, site: Path, tmp_path: Path):
    installed = run_installed(site, tmp_path, command, "--help")
    assert installed.returncode == 0, installed.stderr
    own = subprocess.run([sys.executable, ROOT / script, "--help"], cwd=tmp_path, capture_output=True, text=True)

    def flags(text: str) -> list[str]:
        return re.findall(r"--[a-z_-]+", text.split("positional arguments:")[-1].split("options:")[-1])

    assert flags(installed.stdout) == flags(own.stdout) != []


def test_an_installed_training_finds_its_yamls(site: Path, tmp_path: Path):
    done = run_installed(site, tmp_path, "rankseg-train", *TINY, "--output_dir", "out", "--predict_yaml", "argmax")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / TINY_RUN / "results" / "argmax.json").is_file()
    checkpoint = max((tmp_path / "out" / TINY_RUN / "checkpoints").glob("iter_*.pt"))
    Image.new("RGB", (40, 36)).save(tmp_path / "photo.png")
    done = run_installed(site, tmp_path, "rankseg-predict", str(checkpoint), "photo.png", "--predict_yaml", "argmax")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "predicted" / "masks" / "argmax" / "photo.png").is_file()


def test_workers_of_an_installed_command_find_its_functions(site: Path, tmp_path: Path):
    write_hippocampus(tmp_path / "data", [1, 2, 5])
    done = run_installed(
        site, tmp_path, "rankseg-prepare", "hippocampus", "--data_dir", str(tmp_path / "data"), "--workers", "2"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_torchrun_starts_the_installed_command(site: Path, tmp_path: Path):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        str(site / "bin" / "rankseg-train"),
    ]
    done = run_installed(site, tmp_path, *torchrun, *TINY, "--output_dir", "out", "--predict_yaml", "argmax")
    assert done.returncode == 0, done.stderr
    start = json.loads((tmp_path / "out" / TINY_RUN / "starts.jsonl").read_text().splitlines()[0])
    assert start["world_size"] == 2


def test_without_the_frameworks_packages_a_command_says_how_to_get_them(site: Path, tmp_path: Path):
    code = f"import sys; sys.path.insert(0, {str(site)!r}); sys.modules['yaml'] = None; " + (
        "from rankseg_rma_framework.exp.runtime.commands import train; train()"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: no package yaml; expected the framework's: pip install '.[framework]'\n"


@pytest.mark.slow
def test_type_checkers_see_what_the_installed_rule_returns(site: Path, tmp_path: Path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "import torch\nfrom rankseg_rma import rankseg_levelset, rankseg_rma\nprob = torch.rand(1, 3, 4, 4)\n"
        "reveal_type(rankseg_rma(prob))\nreveal_type(rankseg_rma(prob, return_tau=True))\n"
        "reveal_type(rankseg_rma(prob.numpy(), 'iou'))\nreveal_type(rankseg_levelset(prob))\nrankseg_rma([0.5])\n"
    )
    environment = {**os.environ, "PYTHONPATH": "", "MYPYPATH": ""}
    executable = tmp_path / "python"  # a Python whose packages are those of this one and `site`
    executable.write_text(f"#!/bin/sh\nPYTHONPATH='{site}' exec '{sys.executable}' \"$@\"\n")
    executable.chmod(0o755)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", executable, "user.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert len(revealed) == 4, done.stdout + done.stderr
    assert revealed[0] == revealed[3] == "torch._tensor.Tensor"
    assert revealed[1] == "tuple[torch._tensor.Tensor, torch._tensor.Tensor]"
    assert "ndarray" in revealed[2]
    assert "user.py:8: error:" in done.stdout
