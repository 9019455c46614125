"""YAML and JSON files that are damaged, absurd or hostile: refused in one line before anything heavy is imported."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exp.config.experiment import CONFIG_DIR, check_files, load_experiment, load_groups
from exp.config.strict_yaml import MAX_YAML, load_mapping, parse_value, show
from exp.files.text import read_json, read_text
from exp.runtime.errors import InputError, printable
from tests.conftest import ROOT

HEAVY = ("torch", "numpy", "PIL", "cv2", "timm", "scipy", "nibabel", "segmentation_models_pytorch", "tensorboard")
# Runs exp/main.py on each damaged YAML in one process and says what came of it, and what it had imported by then.
DRIVER = f"""
import io, json, sys
from contextlib import redirect_stderr
from exp.runtime.errors import run_and_report
from exp.main import main
results = []
for group, path in json.load(sys.stdin):
    sys.argv = ["main.py", f"--{{group}}_yaml", path]
    with redirect_stderr(io.StringIO()) as err:
        status = run_and_report(main)
    results.append([status, err.getvalue(), sorted(sys.modules.keys() & {{*{HEAVY!r}}})])
json.dump(results, sys.stdout)
"""
# By the kind of damage: the shipped YAML, what is replaced in it and by what, and the key that the message has to name.
DAMAGES = {
    "unknown key": ("optim/adamw_lr6e-4", "lr:", "lrs:", "lrs"),
    "wrong type": ("schedule/quickstart", "batch_size: 16", "batch_size: [16]", "batch_size"),
    "missing key": ("optim/adamw_lr6e-4", "lr:", "# lr:", "lr"),
    "negative": ("optim/adamw_lr6e-4", "lr: ", "lr: -", "lr"),
    "out of range": ("data/camvid", "val_split: val", "val_split: ../val", "val_split"),
    "not finite": ("optim/adamw_lr6e-4", "lr: 6e-4", "lr: .nan", "lr"),
    "wrong length": ("data/camvid", "crop_size: [", "crop_size: [1, ", "crop_size"),
    "duplicate key": ("optim/adamw_lr6e-4", "lr: 6e-4", "lr: 6e-4\nlr: 6e-4", "lr"),
    "other choice": ("optim/adamw_lr6e-4", "adamw", "adamw2", "optimizer"),
    "escaping name": ("optim/adamw_lr6e-4", "lr: 6e-4", "lr: 6e-4\nname: ../out", "name"),
    "python object": ("optim/adamw_lr6e-4", "lr: 6e-4", "lr: !!python/object/apply:os.mkdir [MARKER]", ""),
    "no YAML": ("optim/adamw_lr6e-4", "lr: 6e-4", "lr: 6e-4]", ""),
}


def test_damaged_yamls_are_refused_before_anything_heavy_is_imported(tmp_path: Path):
    written = []
    for kind, (name, before, after, _) in DAMAGES.items():
        text = (CONFIG_DIR / f"{name}.yaml").read_text()
        assert before in text, kind
        path = tmp_path / f"{kind.replace(' ', '_')}.yaml"
        path.write_text(text.replace(before, after.replace("MARKER", str(tmp_path / "marker")), 1))
        written.append((name.partition("/")[0], str(path)))
    command = [sys.executable, "-c", DRIVER]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(written), capture_output=True, text=True, check=True)
    for (*_, key), (_, path), (status, err, heavy) in zip(
        DAMAGES.values(), written, json.loads(done.stdout), strict=True
    ):
        assert (status, heavy) == (2, []), path
        assert err.startswith("error: "), path
        assert err.count("\n") == 1, path
        assert path in err, err
        assert key in err.replace(path, ""), err
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--model_yaml", "nowhere/net.yaml"], "nowhere/net.yaml: no such file"),
        (["--data_yaml", "camvidd"], "camvidd"),
        (["--set", "model.decoder_channels=" + "[" * 3000], "--set model.decoder_channels"),
        (["--set", "model.decoder_channels=!!python/name:os.system"], "--set model.decoder_channels"),
    ],
)
def test_flags_are_refused_alike(program, flags: list[str], part: str):
    status, _, err = program(*flags)
    assert status == 2
    assert part in err
    assert err.count("\n") == 1
    assert len(err) < 4000


def test_files_that_a_yaml_names_and_that_are_not_there(tmp_path: Path):
    def config(*overrides: str):
        from exp.config.cli import DEFAULT_YAMLS

        names = {**DEFAULT_YAMLS, "predict": ["argmax", "rankseg_rma_fixed"]}
        return load_experiment({g: n if isinstance(n, list) else [n] for g, n in names.items()}, overrides, 0)

    weights, thresholds = config(f"model.pretrained={tmp_path}/w.pt"), config(f"predict.thresholds={tmp_path}/t.json")
    with pytest.raises(InputError, match=r"'model\.pretrained': got '.*w\.pt', which is no file"):
        check_files(weights, from_scratch=True)
    check_files(weights, from_scratch=False)  # the weights are in the checkpoint
    with pytest.raises(InputError, match=r"'predict\.thresholds': got '.*t\.json', which is no file"):
        check_files(thresholds, from_scratch=False)
    (tmp_path / "w.pt").touch()
    check_files(weights, from_scratch=True)


BOMBS = {
    "laughs": "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefghijkl", "bcdefghijklm")),
    "deep lists": "a: " + "[" * 100_000,
    "object": "a: !!python/object/new:os.system [echo]",
    "unhashable key": "? [a, b]\n: 1",
    "int": "a: !!int ''",
    "hexadecimal": f"lr: !!int 0x{'f' * 10_000}",
    "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "large": "a: " + "x" * MAX_YAML,
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_end_in_a_line(tmp_path: Path, name: str):
    (tmp_path / "optim.yaml").write_text(BOMBS[name])
    start = time.process_time()
    with pytest.raises(InputError) as refused:
        load_groups({"optim": [str(tmp_path / "optim.yaml")]}, [])
    assert time.process_time() - start < 20
    assert "optim.yaml" in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_something_that_is_no_file_is_not_read(tmp_path: Path):
    for path in (Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError, match="got something that is no file, expected a YAML file"):
            load_mapping(path)
    with pytest.raises(InputError, match="no such file"):
        load_mapping(tmp_path / "no.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_text(Path("a\0b"), "text")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"a": ' * 100_000, "\xff", "1" * 100_000])
def test_damaged_json_ends_in_a_line(tmp_path: Path, text: str):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.json: got a file that cannot be read .*expected an object") as refused:
        read_json(path, "an object")
    assert len(str(refused.value)) < 600
    path.write_text(" " * 11)
    with pytest.raises(InputError, match=r"a\.json: got \d+ bytes, expected an object, of 10 bytes at most"):
        read_json(path, "an object", max_bytes=10)


def test_values_in_messages_are_short():
    nested = value = []
    for _ in range(10_000):
        value.append([])
        value = value[0]
    doubled = "x"
    for _ in range(50):
        doubled = [doubled, doubled]
    for value in (nested, doubled, "x" * 10**6, 1 << 100_000, list(range(10**5)), {i: i for i in range(10**5)}):
        assert len(show(value)) < 500
    assert show([1, 2, None]) == "[1, 2, None]"


def test_names_cannot_forge_lines_or_drive_the_terminal():
    assert printable("a\nb\x1b[2Jc\udcff\u202e") == r"a\nb\x1b[2Jc\udcff\u202e"
    assert printable("Straße 1 (日本)") == "Straße 1 (日本)"
    assert parse_value("'a b'", "here") == "a b"
