"""Damaged files of every kind that the program reads: each is read, or refused by an InputError that names it.

The bytes that are changed are drawn with a fixed seed, half of them among the first 200, where headers are.
"""

import json
import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
from scipy.sparse import csc_matrix

from exp.config.strict_yaml import load_mapping
from exp.data.decode import read_image, read_label
from exp.data.prepare.jobs import run_jobs, worker_pool
from exp.data.prepare.voc import read_mat, write_label
from exp.data.slice_files import Case, read_case, read_slice, write_case
from exp.data.verify import read_manifest
from exp.evaluation.probability_maps import Decoding, MapReader, read_array
from exp.evaluation.results import load_result
from exp.evaluation.temperature import load_temperature
from exp.files.nifti import open_volume, read_labels, value_range
from exp.files.paths import read_names
from exp.files.tensors import load_tensor_file
from exp.rules.pooled import load_thresholds
from exp.runtime.errors import InputError

MUTATIONS = 120
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 255, (20, 30, 3), np.uint8)
LOGITS = {"scale": 0.5, "input_size": (12, 13), "inside": (9, 13)}
SLICE = {"image": RNG.integers(0, 9, (8, 9)).astype(np.int16), "label": RNG.integers(0, 3, (8, 9)).astype(np.uint8)}
THRESHOLD = {"threshold": 0.5, "size": 3, "mass": 1.0, "total": 5, "kept": True, "resolution": 0.1}
CASE = Case("i", "l", (6, 7, 5), tuple(map(tuple, np.eye(4).tolist())), (1.0,) * 3, 2, (1,), (6, 7), False, False)


def write_sbd(path: Path) -> None:
    boundaries = np.empty((2, 1), object)
    boundaries[:, 0] = [csc_matrix(np.eye(9)) for _ in range(2)]
    labels = {"Boundaries": boundaries, "Segmentation": SLICE["label"], "CategoriesPresent": np.array([[3]], np.uint8)}
    savemat(path, {"GTcls": labels}, do_compression=True)


def write_volume(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((6, 7, 5), np.uint8), np.eye(4)), path)


def read_volume(path: Path) -> None:
    volume = open_volume(path)
    read_labels(volume, range(volume.num_slices))
    value_range(volume)


def read_logits(path: Path) -> None:
    stored, decoding = Decoding().read(path, None)
    decoding.decode(stored, (20, 30), False, path)


def write_prepared(path: Path) -> None:
    write_case(path.parent, CASE, np.zeros((1, 6, 7), np.int16), np.zeros((1, 6, 7), np.uint8))


Format = tuple[Callable[[Path], object], tuple[Callable[[Path], object], ...]]
PICTURES = (read_image, read_label)
FORMATS: dict[str, Format] = {  # name: what writes a sound file, what reads it
    "a.png": (lambda p: Image.fromarray(COLOURS).save(p), PICTURES),
    "a.jpg": (lambda p: Image.fromarray(COLOURS).save(p), (read_image,)),
    "a.bmp": (lambda p: Image.fromarray(COLOURS).save(p), PICTURES),
    "a.webp": (lambda p: Image.fromarray(COLOURS).save(p, lossless=True), PICTURES),
    "a.tif": (lambda p: Image.fromarray(COLOURS).save(p, compression="tiff_lzw"), PICTURES),
    "palette.png": (lambda p: Image.fromarray(SLICE["label"]).convert("P").save(p), (read_label,)),
    "slice.npz": (lambda p: np.savez(p, **SLICE), (read_slice, lambda p: read_array(p, "image"))),
    "packed.npz": (lambda p: np.savez_compressed(p, **SLICE), (read_slice, lambda p: read_array(p, "image"))),
    "map.npy": (lambda p: np.save(p, np.full((2, 4, 4), 0.5, np.float32)), (MapReader().read_map,)),
    "logits.npz": (lambda p: np.savez(p, logits=SLICE["label"][None], **LOGITS), (read_logits,)),
    "v.nii": (write_volume, (read_volume,)),
    "v.nii.gz": (write_volume, (read_volume,)),
    "new.pt": (lambda p: torch.save({"a": torch.ones(5), "b": [1]}, p), (lambda p: load_tensor_file(p, "x"),)),
    "old.pt": (
        lambda p: torch.save({"a": torch.ones(5)}, p, _use_new_zipfile_serialization=False),
        (lambda p: load_tensor_file(p, "x"),),
    ),
    "a.safetensors": (lambda p: save_file({"a": torch.ones(3)}, p), (lambda p: load_tensor_file(p, "x"),)),
    "case.json": (write_prepared, (lambda p: read_case(p.parent),)),
    "temperature.json": (
        lambda p: p.write_text(json.dumps({"temperature": 1.5, "weights_checksum": "a"})),
        (lambda p: load_temperature(p, "a"),),
    ),
    "thresholds.json": (
        lambda p: p.write_text(json.dumps({"opt_metric": "dice", "classes": {"a": THRESHOLD, "b": THRESHOLD}})),
        (lambda p: load_thresholds(p, 2),),
    ),
    "argmax.csv": (lambda p: p.write_text("image,mIoU,tp.a,fp.a,fn.a\nx,1,1,2,3\n"), (load_result,)),
    "names.txt": (lambda p: p.write_text("a/b.png\nc d.jpg\n"), (read_names,)),
    "data.sha256": (lambda p: p.write_text(f"{'0' * 64}  a.png\n"), (read_manifest,)),
    "loss.yaml": (lambda p: p.write_text("loss: dice\nsmooth: 1e-3\nlist: [1, [2, 3]]\n"), (load_mapping,)),
}


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes -> the same cut short, or with some of them changed."""
    if rng.random() < 0.15:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 200))
        changed[place] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
    return bytes(changed)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore")  # of Pillow and nibabel, on what they repaired
def test_damaged_files_are_read_or_refused(tmp_path: Path, name: str):
    write, readers = FORMATS[name]
    path, rng, refused = tmp_path / name, random.Random(name), []
    write(path)
    sound = path.read_bytes()
    for reader in readers:
        reader(path)
    for _ in range(MUTATIONS):
        path.write_bytes(damage(sound, rng))
        for reader in readers:
            try:
                reader(path)
            except InputError as error:
                refused.append(str(error))
    assert len(refused) > MUTATIONS / 20
    assert all(str(path) in message and len(message) < 1000 for message in refused)


def write_or_crash(labels: Path, source: Path) -> None:
    """As write_label, under a scipy that ends its process by a segmentation fault, as it does on some damaged files."""
    if source.read_bytes() == b"damaged":
        os.kill(os.getpid(), signal.SIGSEGV)
    write_label(labels, source)


def test_a_mat_file_that_crashes_scipy_is_named(tmp_path: Path):
    sources = [tmp_path / f"{i}.mat" for i in range(5)]
    for source in sources:
        write_sbd(source)
    sources[2].write_bytes(b"damaged")
    with (
        pytest.raises(InputError, match=r"2\.mat: got a file at which the process that reads it dies, expected"),
        worker_pool(2) as pool,
    ):
        run_jobs(partial(write_or_crash, tmp_path), sources, pool, "labels", "label")
    assert not (tmp_path / "2.png").exists()


def test_large_mat_files_are_refused(tmp_path: Path):
    (tmp_path / "a.mat").write_bytes(bytes(2**20 + 1))
    with pytest.raises(InputError, match=r"a\.mat: got 1048577 bytes, expected SBD.s GTcls, .* of 1048576 bytes"):
        read_mat(tmp_path / "a.mat")
