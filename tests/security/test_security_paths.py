"""Names of files that lead out of the data folder, and what a name may do to a message or an output folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exp.config.experiment import load_groups
from exp.data.prepare.voc import find_sources, trainaug_names
from exp.data.registry import build_dataset
from exp.evaluation.probability_maps.files import list_by_stem, read_array
from exp.files.nifti import open_volume
from exp.files.paths import Fence, leads_out
from exp.runtime.errors import InputError
from tests.conftest import ROOT, TINY, TINY_RUN
from tests.data.trees import write_ade20k, write_camvid, write_cityscapes, write_folder, write_voc

LEADS_OUT = [
    "../x",
    "a/../../x",
    "/etc/passwd",
    "C:\\x",
    "c:x",
    "\\\\host\\x",
    "..\\x",
    "a\\..\\..\\x",
    "a\0b",
    "a\x1b[2J",
    "",
]


def listed(data_dir: Path, name: str, split: str = "val", **changes: object):
    overrides = [f"data.{key}={value}" for key, value in changes.items()]
    return build_dataset(load_groups({"data": [name]}, overrides)["data"], str(data_dir), split)


@pytest.mark.parametrize("name", LEADS_OUT)
def test_names_that_lead_out(name: str):
    assert leads_out(name)


def test_names_that_stay():
    assert not any(map(leads_out, ["a", "a/b.png", "photo 1.jpg", "..a", "a..b/c", "Straße/1.png", "at 12:30.jpg"]))


def test_a_list_with_a_name_that_leads_out_is_refused(voc_dir: Path):
    path = voc_dir / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"
    path.write_text(path.read_text() + "a/../../x\n")
    with pytest.raises(InputError, match=r"val\.txt: got .* which leads out of the data folder, expected a name insid"):
        listed(voc_dir, "pascal_voc")


@pytest.mark.parametrize("role", ["JPEGImages", "SegmentationClass"])
def test_a_listed_name_that_a_link_leads_out_is_refused(voc_dir: Path, tmp_path: Path, role: str):
    folder = voc_dir / "VOCdevkit" / "VOC2012" / role
    victim = sorted(path for path in folder.iterdir() if "_val_" in path.name)[1]
    outside = tmp_path / "outside" / victim.name
    outside.parent.mkdir()
    shutil.move(victim, outside)
    victim.symlink_to(outside)
    with pytest.raises(InputError, match=rf"{victim.name}: got a listed file that a link leads to .*outside.*expected"):
        listed(voc_dir, "pascal_voc")
    victim.unlink()
    shutil.move(outside, folder / f"moved_{victim.name}")
    victim.symlink_to(f"moved_{victim.name}")  # a link that stays
    assert len(listed(voc_dir, "pascal_voc")) == 3


def test_a_listed_path_through_a_folder_that_a_link_leads_out_is_refused(tmp_path: Path):
    data, outside = tmp_path / "data", tmp_path / "outside"
    write_folder(data, {"val": 2})
    write_folder(outside, {"val": 2})
    (data / "linked").symlink_to(outside)
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        names = [f"val/{kind}/photo 0.{suffix}", f"linked/val/{kind}/photo 0.{suffix}"]
        (data / f"val_{kind}.txt").write_text("\n".join(names))
    lists = {"images": "'{split}_images.txt'", "labels": "'{split}_labels.txt'"}
    with pytest.raises(InputError, match=r"linked/val/images/photo 0\.jpg: got a listed file that a link leads to"):
        listed(data, "folder", **lists)
    (data / "linked").unlink()
    shutil.copytree(outside, data / "linked")
    assert len(listed(data, "folder", **lists)) == 2


def test_folders_of_the_layout_may_be_links(tmp_path: Path):
    """As on clusters, where the data lie on a shared disk."""
    shared, data = tmp_path / "shared", tmp_path / "data"
    write_voc(shared, {"trainaug": 2, "val": 2})
    write_cityscapes(shared, {"train": 2, "val": 2}, (32, 48))
    write_ade20k(shared, {"training": 2, "validation": 2})
    write_camvid(shared, {"train": 2, "val": 2})
    names = ("pascal_voc", "cityscapes", "ade20k", "camvid")
    (tmp_path / "all").symlink_to(shared)
    for name in names:
        assert len(listed(tmp_path / "all", name)) == 2
    for path in shared.glob("*/*"):  # the folders of each data set
        link = data / path.relative_to(shared)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    for name in names:
        assert len(listed(data, name)) == 2, name


def test_lists_of_sbd_cannot_lead_out(tmp_path: Path):
    voc, sbd = tmp_path / "voc", tmp_path / "sbd"
    (voc / "SegmentationClass").mkdir(parents=True)
    (sbd / "cls").mkdir(parents=True)
    for name in ("train", "val"):
        (sbd / f"{name}.txt").write_text("2008_000001\n")
        (voc / f"{name}.txt").write_text("2008_000002\n")
    assert trainaug_names(voc, sbd) == ["2008_000001"]
    (sbd / "val.txt").write_text("../../2008_000003\n")
    with pytest.raises(InputError, match=r"val\.txt: got '\.\./\.\./2008_000003', which leads out"):
        trainaug_names(voc, sbd)
    (tmp_path / "secret.mat").touch()
    (sbd / "cls" / "2008_000001.mat").symlink_to(tmp_path / "secret.mat")
    with pytest.raises(InputError, match=r"2008_000001\.mat: got a listed file that a link leads to .*secret\.mat"):
        list(find_sources(voc, sbd, ["2008_000001"]))


def test_a_loop_of_links_ends(tmp_path: Path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match="got a listed file that a link leads to"):
        Fence(tmp_path / "inside").check(tmp_path / "a", is_link=True)


def test_strange_names_stay_in_the_output_folder_and_on_one_line(program, script, tmp_path: Path):
    assert program(*TINY, "schedule.train_iters=1", "--output_dir", tmp_path / "runs")[0] == 0
    checkpoint = sorted((tmp_path / "runs" / TINY_RUN / "checkpoints").glob("iter_*.pt"))[-1]
    rng, photos = np.random.default_rng(0), tmp_path / "photos"
    names = ["...png", "..x.png", "a\nb.png", "\x1b[2J.png", "-rf .png", "a\\..\\b.png", "$(id).png", "é\udcff.png"]
    for i, name in enumerate(names):
        folder = photos / str(i)
        folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / "photo.png")
        os.replace(tmp_path / "photo.png", folder / name)
    before = set(tmp_path.rglob("*"))
    for path in (photos, *sorted(photos.glob("*/*"))):
        out = tmp_path / "out" / str(len(list((tmp_path / "out").glob("*"))))
        status, _, err = script("predict", checkpoint, path, "--output_dir", out)
        assert status == 0, err
    new = set(tmp_path.rglob("*")) - before
    assert new
    assert all(path.is_relative_to(tmp_path / "out") for path in new)
    bad = photos / "2" / "c\nerror: all is well\x1b[2J.png"
    bad.write_bytes(b"no image")
    status, _, err = script("predict", checkpoint, bad, "--output_dir", tmp_path / "out" / "bad")
    assert status == 2
    assert err.count("\n") == 1
    assert "\x1b" not in err


def rename(path: Path, name: bytes) -> None:
    os.rename(path, os.path.join(os.fsencode(path.parent), name))


@pytest.mark.parametrize("split", ["train", "val"])
def test_names_that_are_no_text_are_told_before_the_first_step(program, script, camvid_dir: Path, split: str):
    folder = camvid_dir / "camvid"
    for part in (split, f"{split}annot"):
        rename(folder / part / f"{split}_2.png", b"\xdf.png")
    sizes = ["data.train_samples=6", "schedule.batch_size=2"]
    flags = ["--data_yaml", "camvid", "--data_dir", camvid_dir, "--output_dir", camvid_dir / "runs"]
    status, _, err = program(*TINY, *sizes, *flags)
    assert status == 2
    assert r"\udcdf.png: got a name that is no UTF-8 text, expected one that is: rename it" in err
    assert not (camvid_dir / "runs").exists()
    status, out, _ = script("verify_data", "--no_manifest", "--data_yaml", "camvid", "--data_dir", camvid_dir)
    assert status == 1
    assert "got a name that is no UTF-8 text" in out


def test_maps_of_names_that_are_no_text_are_told_before_they_are_evaluated(tmp_path: Path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "a.npy").write_bytes(b"")
    rename(tmp_path / "maps" / "a.npy", b"\xdf.npy")
    with pytest.raises(InputError, match="got a name that is no UTF-8 text"):
        list_by_stem(tmp_path / "maps", (".npy",))


def test_maps_and_volumes_that_never_end_are_refused(tmp_path: Path):
    for name in ("a.npy", "a.npz"):
        os.mkfifo(tmp_path / name)
        (tmp_path / f"zero{name}").symlink_to("/dev/zero")
        for path in (tmp_path / name, tmp_path / f"zero{name}"):
            with pytest.raises(InputError, match=f"{path.name}: got something that is no file, expected what numpy"):
                read_array(path, None)
    for name in ("v.nii", "v.nii.gz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: got something that is no file, expected a NIfTI"):
            open_volume(tmp_path / name)


@pytest.mark.parametrize("kind", ["bytes", "loop", "long"])
def test_output_folders_that_cannot_be_are_told_at_once(program, script, tmp_path: Path, kind: str):
    (tmp_path / "loop").symlink_to("loop")
    names = {"bytes": os.fsdecode(b"\xdf"), "loop": "loop/x", "long": "a" * 300}
    path = tmp_path / names[kind]
    expected = "got a name that is no UTF-8" if kind == "bytes" else "--output_dir: .*: got a path that cannot be"
    for status, _, err in (
        program("--output_dir", path),
        script("predict", "c.pt", tmp_path, "--output_dir", path),
    ):
        assert status == 2
        assert re.search(expected, err)
        assert err.count("\n") == 1


def test_a_terminal_that_shows_ascii_alone_gets_escapes(tmp_path: Path):
    code = "from exp.runtime.errors import run_and_report as r; r(lambda: print('caf\\xe9 \\udcdf'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9 \\udcdf\n"), done.stderr
