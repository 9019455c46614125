"""The layout's rules, kept by walking the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ORDER = (  # data flows one way: a room imports from itself and from those before it
    "runtime",
    "files",
    "config",
    "provenance",
    "data",
    "models",
    "checkpoints",
    "rules",
    "evaluation",
    "training",
    "reproduction",
    "predict_images",
    "run",
    "main",
)
MOST_ENTRIES = {"exp": 14}  # of a folder of the program; 12 where nothing is said
MODULES = {
    ".".join(path.relative_to(ROOT / "exp").with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "exp").rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """The modules of exp that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("exp.")
                found.add(f"exp.{inner}" if inner in MODULES else node.module)
    return {name.removeprefix("exp.") for name in found if name.split(".")[0] == "exp"}


def room(name: str) -> str:
    """A module's name below exp -> the folder it lies in, or its own name at the top."""
    return name.split(".")[0]


def test_every_room_has_its_place():
    assert {room(name) for name in MODULES} == set(ORDER)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_the_house_only(name: str):
    upwards = {other for other in imported(MODULES[name]) if ORDER.index(room(other)) > ORDER.index(room(name))}
    assert not upwards


@pytest.mark.parametrize("top", ["exp", "scripts", "tests"])
def test_no_folder_is_crowded(top: str):
    folders = [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir() and path.name != "__pycache__")]
    for folder in folders:
        entries = [path.name for path in folder.iterdir() if path.name != "__pycache__"]
        assert len(entries) <= MOST_ENTRIES.get(folder.relative_to(ROOT).as_posix(), 12), (folder, sorted(entries))


def test_no_module_hides_one_of_pythons_own():
    """`python exp/main.py` puts exp/ itself on the path, where `statistics.py` would be found before Python's."""
    assert not {name.split(".")[0] for name in MODULES} & sys.stdlib_module_names


def test_main_is_short():
    assert len((ROOT / "exp" / "main.py").read_text().splitlines()) <= 100


def test_the_rule_imports_nothing_of_exp():
    assert not imported(ROOT / "rankseg_rma.py")


@pytest.mark.parametrize("flags", [["--help"], ["--print_config"]])
def test_flags_alone_import_nothing_heavy(flags: list[str]):
    code = (
        f"import sys; sys.argv = ['main.py', *{flags!r}]\n"
        "from exp.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'timm', 'numpy', 'PIL', 'segmentation_models_pytorch'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_one_file_knows_ranks():
    for name, path in MODULES.items():
        if name != "runtime.distributed":
            assert '"RANK"' not in path.read_text(), name
            text = path.read_text().replace("torch.distributed.run", "torchrun")  # which starts processes
            assert "torch.distributed" not in text, name


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--data_dir", "/nowhere/at/all"], "no such folder"),
        (["--test-only", "--model_checkpoint", "/nowhere/x.pt"], "no such file"),
        (["--test-only", "--model_checkpoint", "best", "--output_dir", "/nowhere"], "got no checkpoint best.pt"),
        (["--test-only", "--output_dir", "/nowhere"], "got no checkpoint, expected one"),
    ],
)
def test_paths_that_are_not_there_are_reported_before_anything_heavy_is_imported(flags: list[str], part: str):
    code = (
        f"import sys; sys.argv = ['main.py', *{flags!r}]\n"
        "from exp.main import main\n"
        "from exp.runtime.errors import run_and_report\n"
        "assert run_and_report(main) == 2\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert part in done.stderr
