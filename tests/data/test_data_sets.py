"""Each data set in its owner's layout and encoding: the samples, the labels, a whole run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exp.config.data import DataConfig
from exp.config.experiment import load_groups
from exp.data.base import Sample
from exp.data.prepare.facts import fold_of
from exp.data.registry import build_dataset, build_normalize
from exp.data.sets.ade20k import ADE20K
from exp.data.sets.cityscapes import Cityscapes, DarkZurich
from exp.data.sets.coco_stuff import COCOStuff
from exp.data.sets.pascal_voc import PascalVOC
from exp.data.sets.slices import Hippocampus, KiTS, LiTS
from exp.data.slice_files import Case, write_case
from exp.files.paths import read_names
from exp.runtime.errors import InputError
from tests.conftest import write_png
from tests.data import volume_trees
from tests.data.trees import (
    write_ade20k,
    write_camvid,
    write_cityscapes,
    write_coco_stuff,
    write_deepglobe,
    write_folder,
    write_jpg,
    write_mapillary,
    write_night,
    write_pascal_context,
)

# The 34 label ids in the order of the owners' table; in small letters what is ignored.
CITYSCAPES_IDS = """
unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, ROAD, SIDEWALK, parking, rail track,
BUILDING, WALL, FENCE, guard rail, bridge, tunnel, POLE, polegroup, TRAFFIC LIGHT, TRAFFIC SIGN, VEGETATION, TERRAIN,
SKY, PERSON, RIDER, CAR, TRUCK, BUS, caravan, trailer, TRAIN, MOTORCYCLE, BICYCLE
"""


def data_config(name: str, **changes: object) -> DataConfig:
    return dataclasses.replace(load_groups({"data": [name]}, [])["data"], **changes)


def write_slices(data_dir: Path, name: str, counts: dict[str, int], size: tuple[int, int] = (24, 20)) -> None:
    """Prepared cases of `counts` slices each, labels 0..2, values of -1000 and more."""
    for number, (case, count) in enumerate(counts.items()):
        rng, folder = np.random.default_rng(number), data_dir / name / "train" / case
        folder.mkdir(parents=True)
        shape, slices = (*size, 40), tuple(range(3, 3 + count))
        labels = rng.integers(0, 3, (count, *size)).astype(np.uint8)
        affine = tuple(map(tuple, np.eye(4).tolist()))
        facts = Case("image.nii", "label.nii", shape, affine, (1.0, 1.0, 1.0), 2, slices, size, False, False)
        write_case(folder, facts, (labels * 60 + rng.integers(-1000, 400, labels.shape)).astype(np.int16), labels)


def test_cityscapes_gives_the_same_label_from_label_ids_and_train_ids(tmp_path: Path):
    write_cityscapes(tmp_path / "ids", {"train": 3, "val": 2}, (40, 56))
    write_cityscapes(tmp_path / "both", {"train": 3, "val": 2}, (40, 56), train_ids=True)
    from_ids, from_train_ids = Cityscapes(tmp_path / "ids", "train"), Cityscapes(tmp_path / "both", "train")
    assert [s.label.name.split("_")[-1] for s in from_train_ids.samples] == ["labelTrainIds.png"] * 3
    assert [s.label.name.split("_")[-1] for s in from_ids.samples] == ["labelIds.png"] * 3
    assert [s.name for s in from_ids.samples][:2] == [f"aachen/aachen_{i:06d}_000019" for i in (0, 2)]
    for a, b in zip(from_ids, from_train_ids, strict=True):
        assert (a.label == b.label).all()
        assert set(np.unique(a.label)) == {*range(19), 255}
    next((tmp_path / "both").rglob("train/*/*labelTrainIds.png")).unlink()  # half made: the ids are the whole set
    assert Cityscapes(tmp_path / "both", "train").samples[0].label.name.endswith("labelIds.png")


def test_cityscapes_table_is_the_owners():
    names = [name.strip() for name in CITYSCAPES_IDS.split(",")]
    assert len(names) == 34
    for value, name in enumerate(names):
        expected = Cityscapes.classes.index(name.lower()) if name.isupper() else 255
        assert Cityscapes.label_map[value] == expected, name


def test_ade20k_shifts_its_classes_and_ignores_zero(tmp_path: Path):
    write_ade20k(tmp_path, {"training": 2, "validation": 1})
    dataset = ADE20K(tmp_path, "training")
    for i in range(2):
        values = np.asarray(Image.open(dataset.samples[i].label)).astype(int)
        assert (dataset[i].label.numpy() == np.where(values == 0, 255, values - 1)).all()
        assert {0, 149, 255} <= set(np.unique(dataset[i].label))
    write_png(dataset.samples[0].label, np.full((60, 90), 151, np.uint8))
    with pytest.raises(InputError, match=r"ADE_train_00000001\.png: got label value 151, expected 0\.\.150 or 255"):
        dataset[0]
    assert [ADE20K.classes[i] for i in (0, 12, 76, 149)] == ["wall", "person", "boat", "flag"]
    assert len(ADE20K.classes) == 150


def add_hidden(folder: Path) -> None:
    """A ._name beside every image and label, as macOS leaves them on disks that are not its own."""
    for path in [*folder.rglob("*.jpg"), *folder.rglob("*.png")]:
        path.with_name(f"._{path.name}").write_bytes(b"no image")


def test_coco_stuff_gives_the_same_label_from_owners_ids_and_train_ids(tmp_path: Path):
    """Ids without images are ignored; 171 classes are left of 182."""
    write_coco_stuff(tmp_path / "ids", {"val2017": 2})
    write_coco_stuff(tmp_path / "both", {"val2017": 2}, train_ids=True)
    add_hidden(tmp_path)
    from_ids, from_train_ids = COCOStuff(tmp_path / "ids", "val2017"), COCOStuff(tmp_path / "both", "val2017")
    assert [s.label.name for s in from_ids.samples] == ["000000000000.png", "000000000001.png"]
    assert all(s.label.name.endswith("_labelTrainIds.png") for s in from_train_ids.samples)
    for a, b in zip(from_ids, from_train_ids, strict=True):
        assert (a.label == b.label).all()
        assert set(np.unique(a.label)) == {*range(171), 255}
    assert {COCOStuff.label_map[value] for value in (11, 25, 90)} == {255}
    assert [COCOStuff.classes[COCOStuff.label_map[value]] for value in (0, 89, 91, 181)] == [
        "person",
        "toothbrush",
        "banner",
        "wood",
    ]


def test_pascal_context_mapillary_and_night_scenes_ignore_what_their_owners_do(tmp_path: Path):
    write_pascal_context(tmp_path, {"val": 1})
    write_mapillary(tmp_path, {"validation": 2})
    write_night(tmp_path, "dark_zurich", 2)
    write_night(tmp_path, "nighttime_driving", 1)
    add_hidden(tmp_path)
    expected = {
        "pascal_context": (1, [255, 0, 58]),
        "mapillary_vistas": (2, [0, 64, 255]),
        "dark_zurich": (2, [0, 18, 255]),
        "nighttime_driving": (1, [0, 18, 255]),
    }
    for name, (count, first) in expected.items():
        dataset = build_dataset(data_config(name), str(tmp_path), "val")
        assert len(dataset) == count, name
        assert dataset[0].label[0, :3].tolist() == first, name
    assert DarkZurich.classes == Cityscapes.classes


def test_deepglobe_is_in_five_folds_in_the_order_of_whole_file_names(script, tmp_path: Path):
    """A fifth of each city is validated on, rounded down; what is left over is always trained on."""
    write_deepglobe(tmp_path, "deepglobe_building", 7)
    add_hidden(tmp_path)
    assert script("prepare_data", "deepglobe_building", "--data_dir", tmp_path, "--workers", 1)[0] == 0
    names = sorted(p.name for p in (tmp_path / "building" / "train").glob("Vegas_*_sat.jpg"))
    assert names[:3] == ["Vegas_1000_sat.jpg", "Vegas_100_sat.jpg", "Vegas_10_sat.jpg"]
    seen = []
    for fold in range(5):
        config = data_config("deepglobe_building", fold=fold)
        train, val = (build_dataset(config, str(tmp_path), split) for split in ("train", "val"))
        assert (len(train), len(val)) == (24, 4)
        assert not {s.name for s in train.samples} & {s.name for s in val.samples}
        seen += [f"{s.name}_sat.jpg" for s in val.samples if s.name.startswith("Vegas")]
    assert seen == names[:5]
    assert set(np.unique(val[0].label)) == {0, 1}


def test_deepglobes_masks_become_labels_and_labels_that_are_there_are_kept(script, tmp_path: Path):
    write_deepglobe(tmp_path, "deepglobe_land", 3)
    flags = ["deepglobe_land", "--data_dir", tmp_path, "--workers", 1]
    assert script("prepare_data", *flags)[0] == 2  # three images are no five folds, but the labels are there
    label = tmp_path / "land" / "train" / "1_label.png"
    values = np.asarray(Image.open(label))
    mask = np.asarray(Image.open(label.with_name("1_mask.png"))) >= 128
    assert (values[:2] == 255).all()
    for colour, index in (((0, 1, 1), 0), ((1, 1, 0), 1), ((1, 0, 1), 2), ((0, 1, 0), 3), ((0, 0, 1), 4)):
        assert (values[(mask == colour).all(-1)] == index).all()
    theirs = np.where(values == 255, 6, values).astype(np.uint8)  # as the paper's code writes unknown
    write_png(label, theirs)
    assert "got another label" not in script("prepare_data", *flags)[1]
    assert (np.asarray(Image.open(label)) == theirs).all()
    write_png(label, (theirs + 1) % 6)
    assert f"{label}: got another label" in script("prepare_data", *flags)[1]
    write_png(label.with_name("1_mask.png"), np.full((48, 48, 3), (255, 0, 0), np.uint8))
    assert "got a colour that is no class's" in script("prepare_data", *flags)[1]


def test_real_ade20k(real_data: Path, tmp_path: Path):
    """Three validation images: the classes that cover most of each, and the owners' values less one."""
    root = tmp_path / "ade" / "ADEChallengeData2016"
    for kind in ("images", "annotations"):
        (root / kind).mkdir(parents=True)
        (root / kind / "validation").symlink_to(real_data / "ade_sample" / kind)
    dataset = ADE20K(tmp_path, "validation")
    largest = [["building", "grass", "sky"], ["building", "sky", "tree"], ["road", "sidewalk", "sky"]]  # as one sees
    for sample, item, names in zip(dataset.samples, dataset, largest, strict=True):
        areas = np.bincount(item.label.flatten(), minlength=256)[:150]
        assert sorted(ADE20K.classes[c] for c in np.argsort(-areas)[:3]) == names
        values = np.asarray(Image.open(sample.label)).astype(int)
        assert item.image.shape[1:] == values.shape
        assert (item.label.numpy() == np.where(values == 0, 255, values - 1)).all()
        assert abs(item.image.permute(1, 2, 0).numpy() - np.asarray(Image.open(sample.image)).astype(int)).mean() < 1


def test_folds_are_contiguous_by_case_number():
    """26 and 42 cases a fold, the remainder in the last."""
    lits, kits = (
        [fold_of(n, cls.volumes.cases_per_fold) for n in range(total)] for cls, total in ((LiTS, 131), (KiTS, 210))
    )
    assert [lits.count(fold) for fold in range(5)] == [26, 26, 26, 26, 27]
    assert [kits.count(fold) for fold in range(5)] == [42] * 5
    assert lits == sorted(lits)
    assert kits == sorted(kits)


@pytest.mark.parametrize(
    ("cls", "name", "case", "numbers"),
    [
        (LiTS, "lits", "volume-{}", range(131)),
        (KiTS, "kits", "case_{:05d}", range(210)),
        (Hippocampus, "hippocampus", "hippocampus_{:03d}", range(1, 395, 6)),
    ],
)
def test_every_fold_splits_the_cases_by_the_rule(tmp_path: Path, cls, name: str, case: str, numbers: range):
    write_slices(tmp_path, name, {case.format(n): 1 + n % 2 for n in numbers}, size=(4, 4))
    per_fold = {"lits": 26, "kits": 42, "hippocampus": 79}[name]
    for fold in range(5):
        last = max(numbers) if fold == 4 else (fold + 1) * per_fold - 1
        expected = [case.format(n) for n in numbers if fold * per_fold <= n <= last]
        facts = {"fold": fold, "window": (-60.0, 140.0)}
        train, val = (cls(tmp_path, split, facts=facts) for split in ("train", "val"))
        assert list(dict.fromkeys(s.case for s in val.samples)) == expected
        assert {s.case for s in train.samples} == {case.format(n) for n in numbers} - set(expected)
        assert len(train) + len(val) == sum(1 + n % 2 for n in numbers)


def test_slices_are_clipped_to_the_window_and_tumour_stands_against_the_rest(tmp_path: Path):
    write_slices(tmp_path, "lits", {"volume-3": 2})
    config = data_config("lits", crop_size=(16, 16), test_crop=(8, 12))
    dataset = build_dataset(dataclasses.replace(config, test_crop=None), str(tmp_path), "val")
    with np.load(tmp_path / "lits" / "train" / "volume-3" / "0004.npz") as stored:
        hu, values = stored["image"], stored["label"]
    item = dataset[1]
    assert dataset.samples[1] == Sample("volume-3/0004", *[dataset.samples[1].image] * 2, case="volume-3")
    assert item.image.shape == (1, 24, 20)
    assert (item.image[0].numpy() == hu.clip(-60, 140)).all()
    assert (item.label.numpy() == (values == 2)).all()
    scaled = build_normalize(config)(item.image[None])[0, 0].numpy()
    assert np.allclose(scaled, (hu.clip(-60, 140) + 60) / 200 * 2 - 1, atol=1e-6)
    assert (dataset.display(item.image.numpy())[..., 1] == np.rint((hu.clip(-60, 140) + 60) / 200 * 255)).all()
    middle = build_dataset(config, str(tmp_path), "val")[1]
    assert (middle.image == item.image[:, 8:16, 4:16]).all()
    assert (middle.label == item.label[8:16, 4:16]).all()


def test_hippocampus_keeps_its_three_classes(tmp_path: Path):
    write_slices(tmp_path, "hippocampus", {"hippocampus_001": 1})
    item = build_dataset(data_config("hippocampus"), str(tmp_path), "val")[0]
    assert set(np.unique(item.label)) == {0, 1, 2}


def test_slices_without_a_fold_or_of_another_split_are_refused(tmp_path: Path):
    write_slices(tmp_path, "lits", {"volume-3": 1})
    with pytest.raises(InputError, match="key 'fold': got None, expected a value: the dataset lits reads it"):
        build_dataset(data_config("lits", fold=None), str(tmp_path), "val")
    with pytest.raises(InputError, match=r"data\.\*_split: got 'test', expected train or val"):
        build_dataset(data_config("lits", val_split="test"), str(tmp_path), "val")
    with pytest.raises(InputError, match="got no samples of LiTS in split 'train'"):
        build_dataset(data_config("lits"), str(tmp_path), "train")
    with pytest.raises(InputError, match="key 'fold': got 1, expected no such key with the dataset camvid"):
        build_dataset(data_config("camvid", fold=1), str(tmp_path), "val")


def test_a_folder_in_folders_and_in_lists(tmp_path: Path):
    write_folder(tmp_path, {"train": 3, "val": 2})
    by_folder = build_dataset(data_config("folder"), str(tmp_path), "val")
    assert [s.name for s in by_folder.samples] == ["photo 0", "site_b/photo 1"]
    (tmp_path / "val_images.txt").write_text("val/images/photo 0.jpg\nval/images/site_b/photo 1.jpg\n")
    (tmp_path / "val_labels.txt").write_text("val/labels/photo 0.png\nval/labels/site_b/photo 1.png\n")
    lists = data_config("folder", images="{split}_images.txt", labels="{split}_labels.txt")
    by_list = build_dataset(lists, str(tmp_path), "val")
    for a, b in zip(by_folder, by_list, strict=True):
        assert (a.image == b.image).all()
        assert (a.label == b.label).all()
    (tmp_path / "val_labels.txt").write_text("val/labels/photo 0.png\n")
    with pytest.raises(InputError, match=r"val_labels\.txt: got 1 lines, expected 2 as in .*val_images\.txt"):
        build_dataset(lists, str(tmp_path), "val")
    (tmp_path / "val_labels.txt").write_text("val/labels/photo 0.png\n../secret.png\n")
    with pytest.raises(InputError, match=r"got '\.\./secret\.png', which leads out of the data folder"):
        build_dataset(lists, str(tmp_path), "val")
    with pytest.raises(InputError, match="expected two folders or two lists"):
        build_dataset(data_config("folder", images="{split}_images.txt"), str(tmp_path), "val")


def test_a_folder_with_other_values_and_grey_images(tmp_path: Path):
    write_folder(tmp_path, {"val": 1})
    path = tmp_path / "val" / "labels" / "photo 0.png"
    write_png(path, np.asarray(Image.open(path)) * 255)
    config = data_config("folder", label_map={0: 0, 255: 1}, channels=1)
    dataset = build_dataset(config, str(tmp_path), "val")
    item = dataset[0]
    assert set(np.unique(item.label)) == {0, 1}
    assert item.image.shape == (1, 48, 64)
    scaled = build_normalize(config)(item.image[None])
    assert np.allclose(scaled[0].numpy(), item.image.numpy() / 127.5 - 1, atol=1e-6)
    assert (dataset.display(item.image.numpy()) == item.image.numpy().transpose(1, 2, 0)).all()


def test_a_folder_whose_files_have_no_partner(tmp_path: Path):
    write_folder(tmp_path, {"val": 2})
    (tmp_path / "val" / "labels" / "photo 0.png").rename(tmp_path / "val" / "labels" / "photo 7.png")
    with pytest.raises(InputError, match=r"labels/photo 0\.png: no such file, expected the partner of .*photo 0\.jpg"):
        build_dataset(data_config("folder"), str(tmp_path), "val")
    write_png(tmp_path / "val" / "labels" / "photo 0.png", np.zeros((48, 64), np.uint8))
    with pytest.raises(InputError, match=r"images/photo 7\.jpg: no such file, expected the partner of .*photo 7\.png"):
        build_dataset(data_config("folder"), str(tmp_path), "val")
    write_jpg(tmp_path / "val" / "images" / "photo 7.jpg", np.zeros((48, 64, 3), np.uint8))
    write_png(tmp_path / "val" / "images" / "photo 7.png", np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(InputError, match="got a second file of the name photo 7"):
        build_dataset(data_config("folder"), str(tmp_path), "val")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"palette": ((0, 0, 0),)}, "'palette'.*a colour of 0..255 for each class"),
        ({"classes": ("a", "a")}, "'classes'.*different names"),
        ({"label_map": {7: 2}}, "'label_map'.*0..1 or 255"),
        ({"fold": 1}, "'fold': got 1, expected no such key with the dataset folder"),
    ],
)
def test_facts_that_do_not_fit_together_are_refused(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        data_config("folder", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fold": 5}, r"'fold': got 5, expected 0\.\.4"),
        ({"window": (140.0, -60.0)}, "'window'"),
    ],
)
def test_facts_of_volumes_that_do_not_fit_are_refused(changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        data_config("lits", **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n", r"SegmentationClassAug: no such folder"),
        ("/JPEGImages/a.jpg /../a.png\n", r"val\.txt: got '\.\./a\.png', which leads out"),
        ("/JPEGImages/a.jpg /A/a.png\n/JPEGImages/b.jpg /B/b.png\n", r"val\.txt: got paths in several folders"),
        ("a 1\n", r"a 1\.jpg: no such file"),
        ("../../secret\n", "leads out of the data folder"),
        ("/etc/passwd\n", "leads out of the data folder"),
        ("\xff".encode("latin-1"), r"val\.txt: got a file that cannot be read"),
        ("2007_val_000000\n2007_val_000000\n", "got '2007_val_000000' twice in split 'val'"),
    ],
)
def test_voc_lists_that_hold_anything_but_names_are_refused(voc_dir: Path, text: str | bytes, message: str):
    path = voc_dir / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        PascalVOC(voc_dir, "val")


def test_voc_reads_a_list_of_paths_as_the_papers_code_has_it(voc_dir: Path):
    """train_aug.txt with an image and a label a line, the labels in SegmentationClassAug."""
    root = voc_dir / "VOCdevkit" / "VOC2012"
    (root / "SegmentationClassTrainAug").rename(root / "SegmentationClassAug")
    names = [f"2007_trainaug_{i:06d}" for i in (3, 0, 5)]
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in names]
    (root / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("\n".join(lines) + "\n")
    dataset = build_dataset(data_config("pascal_voc", train_split="train_aug"), str(voc_dir), "train")
    assert [sample.name for sample in dataset.samples] == names
    assert {sample.label.parent for sample in dataset.samples} == {root / "SegmentationClassAug"}
    assert set(np.unique(dataset[0].label)) > {0}


def test_lists_with_blank_lines_a_byte_order_mark_and_windows_line_ends(tmp_path: Path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa\r\n\r\n b \r\n")
    assert read_names(tmp_path / "list.txt") == ["a", "b"]


def link_first(source: Path, target: Path, count: int) -> None:
    """Symbolic links to the first files of a folder."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir())[:count]:
        (target / path.name).symlink_to(path)


def link_ade20k(real_data: Path, data_dir: Path) -> None:
    for kind in ("images", "annotations"):
        root, files = (
            data_dir / "ade" / "ADEChallengeData2016" / kind,
            sorted((real_data / "ade_sample" / kind).iterdir()),
        )
        for split, chosen in (("training", files[:2]), ("validation", files[2:])):
            (root / split).mkdir(parents=True)
            for path in chosen:
                (root / split / path.name).symlink_to(path)


def link_camvid(real_data: Path, data_dir: Path) -> None:
    for folder in ("train", "trainannot", "val", "valannot"):
        link_first(real_data / "camvid" / folder, data_dir / "camvid" / folder, 2)


def link_hippocampus(real_data: Path, data_dir: Path) -> None:
    for kind in ("images", "labels"):
        link_first(real_data / "hippocampus" / kind, data_dir / "hippocampus" / kind, 120)


GENERATED = {
    "ade20k": lambda d: write_ade20k(d, {"training": 4, "validation": 2}),
    "camvid": lambda d: write_camvid(d, {"train": 4, "val": 2}),
    "coco_stuff": lambda d: write_coco_stuff(d, {"train2017": 4, "val2017": 2}),
    "dark_zurich": lambda d: write_night(d, "dark_zurich", 2),
    "deepglobe_building": lambda d: write_deepglobe(d, "deepglobe_building", 5),
    "deepglobe_land": lambda d: write_deepglobe(d, "deepglobe_land", 6),
    "deepglobe_road": lambda d: write_deepglobe(d, "deepglobe_road", 6),
    "mapillary_vistas": lambda d: write_mapillary(d, {"training": 4, "validation": 2}),
    "nighttime_driving": lambda d: write_night(d, "nighttime_driving", 2),
    "pascal_context": lambda d: write_pascal_context(d, {"train": 4, "val": 2}),
    "cityscapes": lambda d: write_cityscapes(d, {"train": 4, "val": 2}, (48, 64)),
    "folder": lambda d: write_folder(d, {"train": 4, "val": 2}),
    "hippocampus": lambda d: volume_trees.write_hippocampus(d, [1, 80, 160]),
    "kits": lambda d: volume_trees.write_kits(d, [0, 42, 209]),
    "lits": lambda d: volume_trees.write_lits(d, [0, 26, 130]),
    "pascal_voc": volume_trees.write_voc,
}
ALIKE = ("deepglobe_building", "deepglobe_road", "mapillary_vistas", "nighttime_driving", "pascal_context")
REAL = {"ade20k": link_ade20k, "camvid": link_camvid, "hippocampus": link_hippocampus}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in GENERATED]
)
def test_from_the_owners_files_to_scores(script, program, tmp_path: Path, name: str):
    GENERATED[name](tmp_path / "data")
    check_whole_run(script, program, tmp_path, name)


@pytest.mark.slow
def test_what_was_trained_on_cityscapes_is_evaluated_by_night(program, tmp_path: Path):
    write_cityscapes(tmp_path / "data", {"train": 4, "val": 1}, (48, 64))
    write_night(tmp_path / "data", "dark_zurich", 2)
    tiny = ["--model_yaml", "unet_mobilenetv3_small_100", "--data_dir", tmp_path / "data", "--output_dir", tmp_path]
    tiny += ["--set", "model.decoder_channels=[8,8,8,8,8]", "data.crop_size=[32,32]", "schedule.train_iters=1"]
    tiny += ["schedule.batch_size=2", "schedule.num_workers=0", "--predict_yaml", "argmax", "--data_yaml"]
    assert program(*tiny, "cityscapes")[0] == 0
    weights = next(tmp_path.glob("*.cityscapes.*/checkpoints/last.safetensors"))
    status, _, err = program(*tiny, "dark_zurich", "--test-only", "--model_checkpoint", weights)
    assert status == 0, err
    assert next(tmp_path.glob("*.dark_zurich.*/results/argmax.json")).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_from_real_files_to_scores(script, program, real_data: Path, tmp_path: Path, name: str):
    REAL[name](real_data, tmp_path / "data")
    check_whole_run(script, program, tmp_path, name)


def check_whole_run(script, program, tmp_path: Path, name: str) -> None:
    """Prepare, verify, train two iterations and evaluate, with the data YAML as shipped but for sizes."""
    data_dir = tmp_path / "data"
    if name != "folder":
        status, printed, err = script("prepare_data", name, "--data_dir", data_dir, "--workers", 1)
        assert status == 0, printed + err
    status, printed, err = script("verify_data", "--data_yaml", name, "--data_dir", data_dir)
    assert status == 0, printed + err
    window = ["data.test_crop=[64,64]"] if name in ("lits", "kits") else []
    status, printed, err = program(
        "--data_dir",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "out",
        "--model_yaml",
        "unet_mobilenetv3_small_100",
        "--data_yaml",
        name,
        "--predict_yaml",
        "argmax",
        "rankseg_rma",
        "--save_pred",
        "1",
        "--set",
        "model.decoder_channels=[8,8,8,8,8]",
        "data.crop_size=[64,64]",
        "schedule.train_iters=2",
        "schedule.batch_size=2",
        "schedule.num_workers=0",
        *window,
    )
    assert status == 0, err
    assert "mIoUI" in printed
    (run,) = (tmp_path / "out").iterdir()
    assert ("fold0" in run.name) == (name in ("hippocampus", "kits", "lits") or name.startswith("deepglobe"))
    assert (run / "results" / "rankseg_rma.json").is_file()
    assert any((run / "pictures").rglob("*.png"))
