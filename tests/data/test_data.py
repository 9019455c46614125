from pathlib import Path

import numpy as np
import pytest

from exp.data.base import label_table
from exp.data.registry import DATASETS
from exp.data.sets.camvid import CamVid
from exp.data.sets.pascal_voc import PascalVOC
from exp.data.sets.shapes import Shapes, ShapesBinary
from exp.runtime.errors import InputError
from tests.conftest import write_png


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - {"folder"}))  # its classes are the YAML's
def test_facts_fit_together(name: str):
    dataset = DATASETS[name]
    assert len(dataset.classes) == len(dataset.palette) == len(set(dataset.classes)) <= 255
    same = 1 if name == "ade20k" else 0  # road and skyscraper have one colour in the standard palette
    assert len(set(dataset.palette)) == len(dataset.palette) - same
    labels = {*range(len(dataset.classes)), 255}
    assert set(dataset.label_map.values()) <= labels


def test_voc_reads_its_lists_and_palette_pngs(voc_dir: Path):
    train, val = PascalVOC(voc_dir, "trainaug"), PascalVOC(voc_dir, "val")
    assert len(train) == 6
    assert len(val) == 3
    item = val[1]
    assert item.image.shape == (3, 57, 81)
    assert item.label.shape == (57, 81)
    values = np.unique(item.label)
    assert values[0] == 0
    assert values[-1] == 255
    assert 1 <= values[1] <= 20
    assert train.samples[0].label.parent.name == "SegmentationClassTrainAug"
    assert val.samples[0].label.parent.name == "SegmentationClass"


def test_camvid_maps_void_to_ignore(camvid_dir: Path):
    item = CamVid(camvid_dir, "val")[0]
    assert (item.label[:3] == 255).all()
    assert (item.label[3:] <= 10).all()


def test_real_camvid(real_data: Path):
    train, val = CamVid(real_data, "train"), CamVid(real_data, "val")
    assert (len(train), len(val)) == (367, 101)
    labels = np.concatenate([val[i].label.flatten() for i in range(0, 101, 10)])
    assert set(np.unique(labels)) == {*range(11), 255}
    assert val[0].image.shape == (3, 360, 480)


def test_max_samples_takes_the_first(camvid_dir: Path):
    assert [s.name for s in CamVid(camvid_dir, "train", max_samples=2).samples] == ["train_0", "train_1"]


def test_label_table():
    table = label_table(3, {7: 1, 9: 255})
    assert table[[0, 1, 2, 3, 7, 9, 255]].tolist() == [0, -1, 2, -1, 1, 255, 255], "1 is not named, and 7 becomes it"


def test_shapes_are_a_function_of_split_and_index():
    first, again, other = Shapes(None, "val"), Shapes(None, "val"), Shapes(None, "train")
    assert (first[3].image == again[3].image).all()
    assert (first[3].label == again[3].label).all()
    assert (first[3].image != other[3].image).any()


def test_binary_shapes_are_the_same_images_of_two_classes():
    several, binary = Shapes(None, "val"), ShapesBinary(None, "val")
    for i in range(5):
        assert (several[i].image == binary[i].image).all()
        expected = np.where(several[i].label == 255, 255, several[i].label > 0)
        assert (binary[i].label.numpy() == expected).all()


def test_shapes_have_every_class_large_and_small_and_ignored_pixels():
    labels = np.stack([Shapes(None, "train")[i].label for i in range(60)])
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4, 5, 255}
    with_ignore = (labels == 255).any((1, 2)).mean()
    assert 0.15 < with_ignore < 0.55
    sizes = [(label == c).sum() for label in labels for c in range(1, 6) if (label == c).any()]
    assert min(sizes) < 100
    assert max(sizes) > 1000


def missing_folder(root: Path) -> None:
    (root / "camvid" / "val").rename(root / "camvid" / "elsewhere")


def missing_label(root: Path) -> None:
    (root / "camvid" / "valannot" / "val_1.png").unlink()


def other_size(root: Path) -> None:
    write_png(root / "camvid" / "valannot" / "val_1.png", np.zeros((48, 60), np.uint8))


def wrong_value(root: Path) -> None:
    write_png(root / "camvid" / "valannot" / "val_1.png", np.full((48, 64), 12, np.uint8))


def rgb_label(root: Path) -> None:
    write_png(root / "camvid" / "valannot" / "val_1.png", np.zeros((48, 64, 3), np.uint8))


def deep_label(root: Path) -> None:
    write_png(root / "camvid" / "valannot" / "val_1.png", np.zeros((48, 64), np.uint16))


def truncated_image(root: Path) -> None:
    path = root / "camvid" / "val" / "val_1.png"
    path.write_bytes(path.read_bytes()[:-200])


def empty_image(root: Path) -> None:
    (root / "camvid" / "val" / "val_1.png").write_bytes(b"")


def missing_image(root: Path) -> None:
    (root / "camvid" / "val" / "val_1.png").unlink()


def no_images(root: Path) -> None:
    for path in (root / "camvid" / "valannot").iterdir():
        path.unlink()
    for path in (root / "camvid" / "val").iterdir():
        path.unlink()


DAMAGES = {
    missing_folder: ["camvid/val: no such folder"],
    missing_label: ["valannot/val_1.png: no such file", "partner of", "val/val_1.png"],
    other_size: ["valannot/val_1.png: got values of shape (48, 60), expected (48, 64)", "val/val_1.png"],
    wrong_value: ["valannot/val_1.png: got label value 12, expected 0..11 or 255"],
    rgb_label: ["valannot/val_1.png: got values of shape (48, 64, 3), expected (48, 64)"],
    deep_label: ["valannot/val_1.png: got", "8-bit class indices"],
    truncated_image: ["val/val_1.png: got a file that cannot be read"],
    empty_image: ["val/val_1.png: got a file that cannot be read"],
    missing_image: ["val/val_1.png: no such file", "partner of", "valannot/val_1.png"],
    no_images: ["got no samples of CamVid in split 'val'"],
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_data_ends_in_one_clear_line(program, camvid_dir: Path, tmp_path: Path, damage, num_workers: int):
    damage(camvid_dir)
    status, _, err = program(
        "--data_dir",
        camvid_dir,
        "--output_dir",
        tmp_path / "out",
        "--data_yaml",
        "camvid",
        "--set",
        "schedule.train_iters=1",
        "schedule.batch_size=2",
        f"schedule.num_workers={num_workers}",
        "model.decoder_channels=[8,8,8,8,8]",
        "data.crop_size=[32,32]",
    )
    line = err.strip().splitlines()[-1]
    assert status == 2
    assert line.startswith("error: ")
    assert "Traceback" not in err
    for part in DAMAGES[damage]:
        assert part in line
    assert not (tmp_path / "out").exists(), "it trained before it noticed"


def test_missing_data_dir(tmp_path: Path):
    with pytest.raises(InputError, match=r"--data_dir: got none, expected the folder that holds CamVid"):
        CamVid(None, "val")
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        CamVid(tmp_path / "nowhere", "val")


def test_voc_without_its_list_or_labels(voc_dir: Path):
    root = voc_dir / "VOCdevkit" / "VOC2012"
    (root / "SegmentationClassTrainAug").rename(root / "elsewhere")
    with pytest.raises(InputError, match=r"SegmentationClassTrainAug: no such folder"):
        PascalVOC(voc_dir, "trainaug")
    (root / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(InputError, match=r"val\.txt: no such file"):
        PascalVOC(voc_dir, "val")


def test_reading_changes_no_file(camvid_dir: Path):
    before = {path: path.read_bytes() for path in camvid_dir.rglob("*.png")}
    dataset = CamVid(camvid_dir, "train")
    for i in range(len(dataset)):
        dataset[i]
    assert before == {path: path.read_bytes() for path in camvid_dir.rglob("*.png")}
