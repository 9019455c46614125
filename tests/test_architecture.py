"""The layout's rules, kept by walking the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = [  # data flows one way: a module imports from those before it
    "interrupt",
    "errors",
    "text_files",
    "paths",
    "lists",
    "strict_yaml",
    "config_checks",
    "config_model",
    "config_data",
    "config_run",
    "config",
    "cli",
    "durable",
    "lock",
    "distributed",
    "random_state",
    "image_files",
    "array_files",
    "volumes",
    "prepare.facts",
    "prepare.jobs",
    "prepare.trees",
    "prepare.cases",
    "prepare.mat_files",
    "prepare.voc",
    "prepare",
    "data.decode",
    "data.base",
    "data.ade20k",
    "data.camvid",
    "data.cityscapes",
    "data.folder",
    "data.pascal_voc",
    "data.shapes",
    "data.slices",
    "data.transforms",
    "data",
    "verify",
    "data.loader",
    "tensor_files",
    "models.weights",
    "models.decoders",
    "models.segmentor",
    "models",
    "losses",
    "optim",
    "precision",
    "checkpoint_files",
    "checkpoint",
    "logger",
    "train",
    "inference",
    "scopes",
    "exact",
    "predict",
    "metrics",
    "calibration",
    "temperature",
    "comparison",
    "evaluate",
    "probability_maps",
    "true_maps",
    "results",
    "output_folders",
    "masks",
    "pictures",
    "own_images",
    "provenance",
    "validation",
    "saving",
    "report",
    "run",
    "reproduction",
    "reproduction.published",
    "reproduction.cells",
    "reproduction.laptop",
    "reproduction.plans",
    "reproduction.data_state",
    "reproduction.runner",
    "reproduction.measured",
    "reproduction.text",
    "reproduction.evidence",
    "reproduction.trainings",
    "reproduction.report",
    "reproduction.readme",
    "reproduction.figures",
    "reproduction.page",
    "main",
]
MODULES = {
    ".".join(path.relative_to(ROOT / "exp").with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "exp").rglob("*.py")
    if path != ROOT / "exp" / "__init__.py"
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


def test_every_module_has_its_place():
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_down_the_list_only(name: str):
    later = {other for other in imported(MODULES[name]) if ORDER.index(other) >= ORDER.index(name)}
    assert not later


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
        if name != "distributed":
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
        "from exp.errors import run_and_report\n"
        "assert run_and_report(main) == 2\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert part in done.stderr
