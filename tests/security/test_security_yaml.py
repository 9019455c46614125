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
from tests.security.yaml_mutations import all_mutations, draw_mutations, dump_yaml

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


def write_mutations(folder: Path, mutations: list) -> list[tuple[str, str]]:
    """Mutations -> (group, path) of each, written under a number."""
    written = []
    for number, mutation in enumerate(mutations):
        path = folder / f"{number:03d}_{mutation.name}.yaml"
        path.write_text(mutation.text.replace("MARKER", str(folder / "marker")), encoding="utf-8")
        written.append((mutation.group, str(path)))
    return written


def test_two_hundred_damaged_yamls_are_refused_before_anything_heavy_is_imported(tmp_path: Path):
    mutations = draw_mutations(200, seed=7)
    assert len({m.kind for m in mutations}) == 12
    written = write_mutations(tmp_path, mutations)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=ROOT,
        input=json.dumps(written),
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(done.stdout)
    assert len(results) == 200
    for mutation, (_, path), (status, err, heavy) in zip(mutations, written, results, strict=True):
        assert status == 2, mutation
        assert not heavy, mutation
        assert err.startswith("error: "), mutation
        assert err.count("\n") == 1, mutation
        assert path in err, mutation
        assert mutation.key in err, mutation
    assert not (tmp_path / "marker").exists()


def test_copies_without_damage_are_taken(tmp_path: Path):
    """Which shows that the copies below are refused for their damage."""
    for path in CONFIG_DIR.glob("*/*.yaml"):
        copy = tmp_path / path.name
        copy.write_text(dump_yaml(load_mapping(path)))
        load_groups({path.parent.name: [str(copy)]}, [])


@pytest.mark.slow
def test_every_mutation_of_every_shipped_yaml_is_refused(tmp_path: Path):
    mutations = all_mutations(seed=8)
    assert len(mutations) > 1000
    for mutation, (group, path) in zip(mutations, write_mutations(tmp_path, mutations), strict=True):
        with pytest.raises(InputError) as refused:
            load_groups({group: [path]}, [])
        assert path in str(refused.value), mutation
        assert mutation.key in str(refused.value), mutation
        assert len(str(refused.value)) < 1000, mutation


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--model_yaml", "nowhere/net.yaml"], "nowhere/net.yaml: no such file"),
        (["--data_yaml", "camvidd"], "camvidd"),
        (["--set", "data.dataset=imagenet"], "'dataset': got 'imagenet'"),
        (["--set", "schedule.batch_size=-4"], "--set schedule.batch_size=-4: key 'batch_size'"),
        (["--set", f"schedule.batch_size={10**30}"], "key 'batch_size'"),
        (["--set", "data.crop_size=[100000,100000]"], "key 'crop_size'"),
        (["--set", "data.train_split=../../etc"], "key 'train_split'"),
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
    "merges": "a: &a {x: 1}\n" + "".join(f"{c}: &{c} {{<<: [*{p}, *{p}]}}\n" for p, c in zip("abcdefgh", "bcdefghi")),
    "deep lists": "a: " + "[" * 100_000,
    "deep mappings": "a: " + "{b: " * 50_000,
    "object": "a: !!python/object/new:os.system [echo]",
    "module": "a: !!python/module:antigravity",
    "unhashable key": "? [a, b]\n: 1",
    "timestamp": "a: !!timestamp x",
    "int": "a: !!int ''",
    "digits": "a: " + "9" * 100_000,
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
    with pytest.raises(InputError, match=r"a\.json: cannot be read .*expected an object") as refused:
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


def test_the_shipped_yamls_are_far_from_the_limits():
    for path in CONFIG_DIR.glob("*/*.yaml"):
        assert path.stat().st_size < MAX_YAML / 10
