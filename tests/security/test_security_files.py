"""Hostile checkpoints, arrays, volumes and images: refused in one line, nothing executed, memory bounded."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from exp.data.decode import read_image, read_label
from exp.files.nifti import open_volume
from exp.files.tensors import load_tensor_file
from exp.runtime.errors import InputError
from tests.conftest import ROOT, TINY, TINY_RUN, write_png
from tests.security import payloads

PEAK = 2 * 2**30  # bytes
# Runs each job in one process; a job is a function of the program with a path, or a script with its flags.
DRIVER = """
import importlib, io, json, pathlib, resource, sys
from contextlib import redirect_stderr, redirect_stdout
from exp.runtime.errors import run_and_report
sys.path.insert(0, "scripts")
results = []
for module, function, args in json.load(sys.stdin):
    target = getattr(importlib.import_module(module), function)
    sys.argv = [module, *args]
    def call():
        target() if function == "main" else target(pathlib.Path(args[0]), *args[1:])
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = run_and_report(call)
        except SystemExit as exit_:
            status = exit_.code
    results.append([status, out.getvalue(), err.getvalue()])
json.dump({"results": results, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}, sys.stdout)
"""
Job = tuple[str, str, Sequence[object]]  # module, function, arguments


def run_jobs(jobs: Sequence[Job]) -> list[tuple[int, str, str]]:
    """Jobs -> exit status, stdout and stderr of each; asserts that the process never took 2 GiB."""
    text = json.dumps([(module, function, list(map(str, args))) for module, function, args in jobs])
    command = [sys.executable, "-c", DRIVER]
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert 0 < answer["peak"] < PEAK
    assert len(answer["results"]) == len(jobs)
    return [tuple(result) for result in answer["results"]]


def assert_refused(jobs: Sequence[Job], names: Sequence[object]) -> None:
    """Every job ends with status 2 and one line that names its file and says what was expected."""
    for job, name, (status, _, err) in zip(jobs, names, run_jobs(jobs), strict=True):
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert status == 2, (job, err)
        assert len(lines) == 1, (job, err)
        assert lines[0].startswith("error: "), (job, err)
        assert str(name) in lines[0], (job, err)
        assert "expected" in lines[0], (job, err)


def test_checkpoints_that_would_run_code_or_take_all_memory(tmp_path: Path):
    marker = tmp_path / "marker"
    paths = payloads.write_checkpoints(tmp_path / "checkpoints", marker)
    code, runs = paths["zip"], ["--output_dir", tmp_path / "runs"]
    planted = tmp_path / "runs" / TINY_RUN / "checkpoints" / "iter_0000002.pt"
    planted.parent.mkdir(parents=True)
    planted.write_bytes(code.read_bytes())
    write_png(tmp_path / "photo.png", np.zeros((40, 40, 3), np.uint8))
    jobs: list[Job] = [
        *(("exp.files.tensors", "load_tensor_file", [path, "weights"]) for path in paths.values()),
        ("exp.main", "main", [*TINY, *runs, "--test-only", "--model_checkpoint", code]),
        ("predict", "main", [code, tmp_path / "photo.png", "--output_dir", tmp_path]),
        ("exp.main", "main", [*TINY, f"model.pretrained={code}", "--output_dir", tmp_path / "new"]),
        ("exp.main", "main", [*TINY, *runs, "--test-only"]),
        ("exp.main", "main", [*TINY, *runs]),
    ]
    assert_refused(jobs, [*paths.values(), *[code.name] * 3, planted.name, planted.name])
    assert not marker.exists()
    with pytest.raises(InputError, match=r"zip\.pt: .*it asks for \w+\.mkdir; tensors .*expected weights"):
        load_tensor_file(code, "weights")


def test_a_checkpoint_alone_cannot_ask_for_a_network_of_any_size(program, script, tmp_path: Path):
    assert program(*TINY, "schedule.train_iters=1", "--output_dir", tmp_path / "runs")[0] == 0
    path = sorted((tmp_path / "runs" / TINY_RUN / "checkpoints").glob("iter_*.pt"))[-1]
    write_png(tmp_path / "photo.png", np.zeros((40, 40, 3), np.uint8))
    content = torch.load(path, weights_only=True)
    for width, part in ((64, "got other parameters than the model's"), (10**6, "key 'decoder_channels': got")):
        content["config"]["model"] |= {"decoder_channels": [width] * 5}
        torch.save(content, tmp_path / "wide.pt")
        flags = (tmp_path / "wide.pt", tmp_path / "photo.png", "--output_dir", tmp_path / "out")
        status, _, err = script("predict", *flags)
        assert status == 2
        assert f"wide.pt: {part}" in err
    content["config"]["model"] |= {"decoder_channels": [8] * 5}
    for group in ("data", "test", "model"):
        torch.save({**content, "config": {**content["config"], group: [1]}}, tmp_path / "other.pt")
        flags = (tmp_path / "other.pt", tmp_path / "photo.png", "--output_dir", tmp_path / "out")
        status, _, err = script("predict", *flags)
        assert status == 2, group
        assert "other.pt: got" in err, group


def test_arrays_with_pickles_or_absurd_headers(tmp_path: Path):
    marker, head, size = tmp_path / "marker", payloads.npy_header, 2**31 + 2**24
    write_png(tmp_path / "labels" / "a.png", np.zeros((8, 8), np.uint8))
    hostile = {
        "pickle": payloads.pickled_array(marker),
        "absurd": head((2, 10**6, 10**6), "<f4") + bytes(100),
        "header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 2**20,
    }
    jobs: list[Job] = []
    paths = [tmp_path / f"{kind}_maps" / "a.npy" for kind in hostile]
    paths += [tmp_path / f"{kind}_member" / "a.npz" for kind in ("pickle", "bomb")]
    for path in paths:
        path.parent.mkdir()
        jobs.append(("evaluate_probabilities", "main", [path.parent, tmp_path / "labels", "--output_dir", tmp_path]))
    for path, data in zip(paths, hostile.values()):
        path.write_bytes(data)
    payloads.write_zip(paths[-2], {"probabilities.npy": hostile["pickle"]})
    payloads.zeros_member(paths[-1], {"probabilities.npy": (head((2, size // 8), "<f4"), size)})
    for kind, members in {
        "pickle": {"image.npy": hostile["pickle"], "label.npy": hostile["pickle"]},
        "absurd": {"image.npy": head((10**9, 10**9), "<i2"), "label.npy": head((10**9, 10**9), "|u1")},
        "others": {"image.npy": head((8, 8), "<f8") + bytes(512), "label.npy": head((8, 8), "|u1") + bytes(64)},
    }.items():
        paths.append(tmp_path / f"slice_{kind}.npz")
        payloads.write_zip(paths[-1], members)
        jobs.append(("exp.data.slice_files", "read_slice", [paths[-1]]))
    assert_refused(jobs, paths)
    assert not marker.exists()


def test_volumes_that_promise_terabytes(tmp_path: Path):
    paths = payloads.write_volumes(tmp_path / "volumes")
    jobs: list[Job] = [("exp.files.nifti", "open_volume", [path]) for path in paths.values()]
    root = tmp_path / "data" / "lits"  # as an image, and as a label volume of its own
    root.mkdir(parents=True)
    for number, path in enumerate(paths.values()):
        suffix = "".join(path.suffixes)
        for name in ("volume", "segmentation"):
            (root / f"{name}-{number}{suffix}").symlink_to(path)
    jobs.append(("prepare_data", "main", ["lits", "--data_dir", tmp_path / "data", "--workers", "1"]))
    results = run_jobs(jobs)
    for path, (status, _, err) in zip(paths.values(), results):
        assert status == 2, path
        assert str(path) in err, path
        assert err.count("\n") == 1, path
    status, out, err = results[-1]
    assert status == 2
    assert f"got {len(paths)} cases that could not be prepared" in err
    assert out.count("not prepared: ") == len(paths)


def test_the_largest_volumes_of_scanners_are_taken(tmp_path: Path):
    volume = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.eye(4))
    volume.header.set_data_shape((1024, 1024, 512))
    with open(tmp_path / "ct.nii", "wb") as file:
        file.write(volume.header.binaryblock + bytes(4))
        file.truncate(352 + 2**30)  # zeros that take no disk
    assert open_volume(tmp_path / "ct.nii").shape == (1024, 1024, 512)


def test_images_that_decode_to_gigabytes(tmp_path: Path):
    paths = payloads.write_images(tmp_path / "images")
    jobs: list[Job] = [
        ("exp.data.decode", function, [path]) for function in ("read_image", "read_label") for path in paths.values()
    ]
    assert_refused(jobs, list(paths.values()) * 2)


def test_gigabytes_packed_beside_the_pixels(tmp_path: Path):
    """Comments and colour profiles are not unpacked, or no further than a MB: the image is read, or refused."""
    jobs: list[Job] = []
    for kind in (b"zTXt", b"iCCP"):
        path = tmp_path / f"{kind.decode()}.png"
        path.write_bytes(payloads.commented_png(kind))
        jobs += [("exp.data.decode", function, [path]) for function in ("read_image", "read_label")]
    for (_, _, (path,)), (status, _, err) in zip(jobs, run_jobs(jobs), strict=True):
        assert status == 0 or (status == 2 and f"{path}: got a file that cannot be read" in err)


def test_something_that_is_no_image_file_is_not_read(tmp_path: Path):
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"zero\.png: got something that is no file"):
        read_image(tmp_path / "zero.png")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"sparse\.png: got 1099511627776 bytes"):
        read_label(tmp_path / "sparse.png")
