"""Hostile checkpoints, arrays, volumes and images: refused in one line, nothing executed, memory bounded."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exp.data.decode import read_image, read_label
from exp.files.images import MAX_PIXELS
from exp.files.nifti import MAX_VOXELS, open_volume
from exp.runtime.errors import InputError
from tests.conftest import ROOT, TINY, TINY_RUN, write_png
from tests.data.trees import write_camvid
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


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[dict[str, Path], Path]:
    """Hostile checkpoints by name, and the folder that the code in them would make."""
    folder = tmp_path_factory.mktemp("payloads")
    marker = folder / "marker"
    return payloads.write_checkpoints(folder / "checkpoints", marker), marker


def test_checkpoints_that_would_run_code_or_take_all_memory(checkpoints, tmp_path: Path):
    paths, marker = checkpoints
    planted = tmp_path / "runs" / TINY_RUN / "checkpoints" / "iter_0000002.pt"
    planted.parent.mkdir(parents=True)
    planted.write_bytes(paths["zip"].read_bytes())
    write_png(tmp_path / "photo.png", np.zeros((40, 40, 3), np.uint8))
    runs = ["--output_dir", tmp_path / "runs"]
    jobs: list[Job] = [
        *(("exp.main", "main", [*TINY, *runs, "--test-only", "--model_checkpoint", path]) for path in paths.values()),
        *(("predict", "main", [path, tmp_path / "photo.png", "--output_dir", tmp_path]) for path in paths.values()),
        *(
            ("exp.main", "main", [*TINY, f"model.pretrained={path}", "--output_dir", tmp_path / "new"])
            for path in paths.values()
        ),
        ("exp.main", "main", [*TINY, *runs, "--test-only"]),
        ("exp.main", "main", [*TINY, *runs]),
    ]
    assert_refused(jobs, [*[path.name for path in paths.values()] * 3, planted.name, planted.name])
    assert not marker.exists()


def test_a_refused_checkpoint_says_what_it_asks_for(checkpoints):
    from exp.files.tensors import load_tensor_file

    with pytest.raises(
        InputError, match=r"zip\.pt: .*it asks for \w+\.mkdir, and nothing but tensors.*expected weights"
    ):
        load_tensor_file(checkpoints[0]["zip"], "weights")


def test_a_checkpoint_alone_cannot_ask_for_a_network_of_any_size(program, script, tmp_path: Path):
    import torch

    assert program(*TINY, "schedule.train_iters=1", "--output_dir", tmp_path / "runs")[0] == 0
    path = sorted((tmp_path / "runs" / TINY_RUN / "checkpoints").glob("iter_*.pt"))[-1]
    write_png(tmp_path / "photo.png", np.zeros((40, 40, 3), np.uint8))
    content = torch.load(path, weights_only=True)
    content["config"]["model"] |= {"decoder_channels": [4096] * 5}
    torch.save(content, tmp_path / "wide.pt")
    status, _, err = script("predict", tmp_path / "wide.pt", tmp_path / "photo.png", "--output_dir", tmp_path / "out")
    assert status == 2
    assert "wide.pt: got" in err
    assert "expected those of the network that its config names" in err
    for group in ("data", "test", "model"):
        torch.save({**content, "config": {**content["config"], group: [1]}}, tmp_path / "other.pt")
        flags = (tmp_path / "other.pt", tmp_path / "photo.png", "--output_dir", tmp_path / "out")
        status, _, err = script("predict", *flags)
        assert status == 2, group
        assert "other.pt: got" in err, group


def test_arrays_with_pickles_or_absurd_headers(tmp_path: Path):
    marker, head = tmp_path / "marker", payloads.npy_header
    folders = [tmp_path / name for name in ("pickle_npy", "pickle_npz", "short", "absurd", "member", "bomb", "header")]
    label = np.zeros((8, 8), np.uint8)
    for folder in folders:
        write_png(folder / "labels" / "a.png", label)
        (folder / "maps").mkdir()
    pickle_npy, pickle_npz, short, absurd, member, bomb, header = (folder / "maps" for folder in folders)
    (pickle_npy / "a.npy").write_bytes(payloads.pickled_array(marker))
    payloads.write_zip(pickle_npz / "a.npz", {"probabilities.npy": payloads.pickled_array(marker)})
    (short / "a.npy").write_bytes(head((2, 8, 8), "<f4") + bytes(100))
    (absurd / "a.npy").write_bytes(head((2, 10**6, 10**6), "<f4") + bytes(100))
    payloads.write_zip(member / "a.npz", {"probabilities.npy": head((2, 10**6, 10**6), "<f4") + bytes(100)})
    size = 2**31 + 2**24
    payloads.zeros_member(bomb / "a.npz", {"probabilities.npy": (head((2, size // 8), "<f4"), size)})
    (header / "a.npy").write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 2**20)
    jobs: list[Job] = [
        ("evaluate_probabilities", "main", [folder / "maps", folder / "labels", "--output_dir", tmp_path / "out"])
        for folder in folders
    ]
    names = [next((folder / "maps").iterdir()) for folder in folders]
    for data, kind in (
        (payloads.pickled_array(marker), "pickle"),
        (head((10**6, 10**6), "|u1"), "absurd"),
        (head((2**15, 2**15), "|u1") + bytes(2**10), "short"),
    ):
        folder = tmp_path / f"label_{kind}"
        for name in ("maps", "labels"):
            (folder / name).mkdir(parents=True)
        np.save(folder / "maps" / "a.npy", np.full((2, 8, 8), 0.5, np.float32))
        (folder / "labels" / "a.npy").write_bytes(data)
        flags = [folder / "maps", folder / "labels", "--output_dir", tmp_path / "out"]
        jobs.append(("evaluate_probabilities", "main", flags))
        names.append(folder / "labels" / "a.npy")
    for kind, members in {
        "pickle": {"image.npy": payloads.pickled_array(marker), "label.npy": payloads.pickled_array(marker)},
        "short": {"image.npy": head((512, 512), "<i2"), "label.npy": head((512, 512), "|u1")},
        "absurd": {"image.npy": head((10**9, 10**9), "<i2"), "label.npy": head((10**9, 10**9), "|u1")},
        "others": {"image.npy": head((8, 8), "<f8") + bytes(512), "label.npy": head((8, 8), "|u1") + bytes(64)},
    }.items():
        path = tmp_path / f"slice_{kind}.npz"
        payloads.write_zip(path, members)
        jobs.append(("exp.files.nifti", "read_slice", [path]))
        names.append(path)
    payloads.zeros_member(
        tmp_path / "slice_bomb.npz", {f"{n}.npy": (head((2**15, 2**15), "|u1"), 2**28) for n in ("image", "label")}
    )
    jobs.append(("exp.files.nifti", "read_slice", [tmp_path / "slice_bomb.npz"]))
    assert_refused(jobs, [*names, tmp_path / "slice_bomb.npz"])
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


@pytest.mark.parametrize("shape", [(512, 512, 1500), (1024, 1024, 512), (4096, 64, 64)])
def test_volumes_as_scanners_make_them_are_taken(tmp_path: Path, shape: tuple[int, int, int]):
    import nibabel as nib

    assert np.prod(shape) <= MAX_VOXELS
    volume = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.eye(4))
    volume.header.set_data_shape(shape)
    with open(tmp_path / "ct.nii", "wb") as file:
        file.write(volume.header.binaryblock + bytes(4))
        file.truncate(352 + 2 * int(np.prod(shape)))  # zeros that take no disk
    assert open_volume(tmp_path / "ct.nii").shape == shape


def test_images_that_decode_to_gigabytes(tmp_path: Path):
    paths = payloads.write_images(tmp_path / "images")
    jobs: list[Job] = [
        ("exp.data.decode", function, [path]) for function in ("read_image", "read_label") for path in paths.values()
    ]
    assert_refused(jobs, list(paths.values()) * 2)


def test_a_mask_that_decodes_to_gigabytes_stops_every_program(program, tmp_path: Path):
    data = tmp_path / "data"
    write_camvid(data, {"train": 4, "val": 2})
    mask = data / "camvid" / "valannot" / "val_1.png"
    mask.write_bytes(payloads.png_bomb(60_000))
    tiny = [*TINY, "--data_yaml", "camvid", "--data_dir", data, "--output_dir", tmp_path / "out"]
    tiny[tiny.index("data.train_samples=8")] = "data.train_samples=4"
    jobs: list[Job] = [
        ("exp.main", "main", tiny),
        ("verify_data", "main", ["--data_yaml", "camvid", "--data_dir", data, "--workers", "1"]),
    ]
    (status, _, err), (verified, findings, _) = run_jobs(jobs)
    assert status == 2
    assert f"{mask}: got an image of 60000x60000 pixels, expected {MAX_PIXELS} pixels at most" in err
    assert verified == 1
    assert f"{mask}: got an image of 60000x60000 pixels" in findings


def test_gigabytes_packed_beside_the_pixels(tmp_path: Path):
    """Comments and colour profiles are not unpacked, or no further than a MB: the image is read, or refused."""
    jobs: list[Job] = []
    for kind in (b"zTXt", b"iCCP", b"iTXt"):
        path = tmp_path / f"{kind.decode()}.png"
        path.write_bytes(payloads.commented_png(kind))
        jobs += [("exp.data.decode", function, [path]) for function in ("read_image", "read_label")]
    for (_, _, (path,)), (status, _, err) in zip(jobs, run_jobs(jobs), strict=True):
        assert status == 0 or (status == 2 and f"{path}: got a file that cannot be read" in err)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_large_images_are_taken(tmp_path: Path, suffix: str):
    path = tmp_path / f"large.{suffix}"
    Image.new("L", (3000, 2000), 7).save(path)
    assert read_image(path).shape == (2000, 3000, 3)
    assert MAX_PIXELS >= 8192 * 8192


def test_an_image_of_the_largest_usual_size_is_taken(tmp_path: Path):
    Image.new("L", (8192, 8192), 3).save(tmp_path / "label.png", compress_level=1)
    label = read_label(tmp_path / "label.png")
    assert label.shape == (8192, 8192)
    assert label[-1, -1] == 3


def test_something_that_is_no_image_file_is_not_read(tmp_path: Path):
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"zero\.png: got a file that cannot be read \(no file\)"):
        read_image(tmp_path / "zero.png")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"sparse\.png: got a file that cannot be read \(1099511627776 bytes"):
        read_label(tmp_path / "sparse.png")
