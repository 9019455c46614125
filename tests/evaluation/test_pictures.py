import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exp.evaluation.evaluator import EvalResult
from exp.evaluation.pictures import (
    BETTER,
    BOTH_WRONG,
    GAP,
    LINE,
    WORSE,
    blend_labels,
    choose_pictures,
    colour_differences,
    colour_labels,
    draw_panel,
    save_panel,
    tile_size,
)
from exp.files.output_folders import claim_folder
from tests.conftest import TINY, TINY_RUN

PALETTE = ((0, 0, 0), (200, 0, 0), (0, 200, 0))
CLASSES = ("rest", "red", "green")


def test_labels_in_the_palette_and_ignored_pixels_white():
    assert colour_labels(np.array([[0, 1, 255]]), PALETTE).tolist() == [[[0, 0, 0], [200, 0, 0], [255, 255, 255]]]


def test_differences_tell_better_from_worse():
    label = np.array([[0, 1, 1, 1, 255]])
    base, other = np.array([[0, 0, 1, 0, 0]]), np.array([[0, 1, 0, 2, 1]])
    expected = [[(0, 0, 0), BETTER, WORSE, BOTH_WRONG, (0, 0, 0)]]
    assert colour_differences(label, base, other).tolist() == [[list(c) for c in expected[0]]]


def middle(panel: np.ndarray, column: int, row: int, width: int, height: int) -> tuple[int, ...]:
    """The colour in the middle of a tile."""
    top = LINE + row * (LINE + height + GAP) + LINE
    return tuple(panel[top + height // 2, column * (width + GAP) + width // 2].tolist())


def test_a_panel_has_a_tile_each(tmp_path: Path):
    image, label = np.full((40, 320, 3), 77, np.uint8), np.ones((40, 320), np.uint8)
    preds = {"argmax": label * 0, "rankseg_rma": label, "third": label * 2}
    panel = draw_panel(
        image, label, preds, PALETTE, classes=CLASSES, title="city/0001", captions={"third": "third: mIoUI 12.3"}
    )
    assert panel.shape == (LINE + 2 * (LINE + 40 + GAP) - GAP, 4 * (320 + GAP) - GAP, 3)
    tops = [middle(panel, i, 0, 320, 40) for i in range(4)]
    assert tops == [(77, 77, 77), PALETTE[0], PALETTE[1], PALETTE[2]]
    assert [middle(panel, i, 1, 320, 40) for i in (0, 2, 3)] == [PALETTE[1], BETTER, BOTH_WRONG]
    path = save_panel(panel, tmp_path / "pictures", "city/0001")
    assert path == tmp_path / "pictures" / "city_0001.png"
    assert (np.asarray(Image.open(path)) == panel).all()


def test_captions_and_legend_are_written():
    image, label = np.zeros((40, 320, 3), np.uint8), np.ones((40, 320), np.uint8)
    plain = draw_panel(image, label, {"argmax": label}, PALETTE, classes=CLASSES)
    assert (plain[:LINE] == 255).all()
    titled = draw_panel(image, label, {"argmax": label}, PALETTE, classes=CLASSES, title="x" * 500)
    changed = (titled != plain).any(axis=(1, 2))
    assert changed[:LINE].any()
    assert not changed[LINE:].any()
    legend = plain[2 * LINE + 40 + GAP :, 320 + GAP :]
    assert (legend == PALETTE[1]).all(axis=2).sum() >= 100
    assert not (legend == PALETTE[2]).all(axis=2).any(), "a class that is nowhere needs no line"


@pytest.mark.parametrize(
    ("size", "tile"),
    [((50, 35), (210, 300)), ((1024, 2048), (640, 320)), ((512, 512), (512, 512)), ((2000, 10), (3, 640))],
)
def test_tiles_are_of_a_size_to_be_seen(size: tuple[int, int], tile: tuple[int, int]):
    assert tile_size(*size) == tile
    label = np.zeros(size, np.uint8)
    panel = draw_panel(np.zeros((*size, 3), np.uint8), label, {"argmax": label}, PALETTE, classes=CLASSES)
    assert panel.shape[0] > tile[1]


def test_many_classes_fit_the_legend():
    palette = tuple((c, c, 255 - c) for c in range(150))
    label = np.arange(150, dtype=np.uint8).repeat(4).reshape(20, 30)
    classes = tuple(f"class {c}" for c in range(150))
    panel = draw_panel(np.zeros((20, 30, 3), np.uint8), label, {"argmax": label}, palette, classes=classes)
    assert panel.shape[1] == 2 * (tile_size(20, 30)[0] + GAP) - GAP


def test_overlays_leave_background_and_ignored_pixels_clear():
    image = np.full((1, 3, 3), 100, np.uint8)
    mixed = blend_labels(image, np.array([[0, 1, 255]]), PALETTE, opacity=0.5)
    assert mixed.tolist() == [[[100, 100, 100], [150, 50, 50], [100, 100, 100]]]
    assert blend_labels(image, np.array([[0, 1, 255]]), PALETTE[1:], opacity=0.5)[0, 0].tolist() == [150, 50, 50]


def result(rule: str, right: list[int]) -> EvalResult:
    counts = np.array([[[r, 10, 5], [0, 0, 10 - r], [10 - r, 0, 0]] for r in right])
    return EvalResult(rule, tuple(map(str, range(len(right)))), ("x", "y", "z"), counts)


def test_gains_losses_and_others_are_chosen():
    results = [result("argmax", [5] * 8), result("between", [1] * 8), result("last", [4, 9, 6, 5, 5, 1, 5, 7])]
    chosen = choose_pictures(results, "mIoUI", 2, seed=0)
    assert (chosen["gain"], chosen["loss"]) == ([1, 7], [5, 0])
    assert len(chosen["random"]) == 2
    assert not {*chosen["random"]} & {1, 7, 5, 0}
    assert chosen == choose_pictures(results, "mIoUI", 2, seed=0)
    assert len({tuple(choose_pictures(results, "mIoUI", 2, seed)["random"]) for seed in range(9)}) > 1


def test_few_images_and_one_rule():
    results = [result("argmax", [5, 5, 5]), result("last", [6, 7, 8])]
    chosen = choose_pictures(results, "mIoUI", 2, seed=0)
    assert chosen["gain"] == [2, 1]
    assert chosen["loss"] == [], "an image that gained is no loss"
    assert chosen["random"][0] == 0
    alone = choose_pictures(results[:1], "mIoUI", 9, seed=0)
    assert (alone["gain"], alone["loss"], sorted(alone["random"])) == ([], [], [0, 1, 2])


def test_pictures_of_a_run(program, tmp_path: Path):
    flags = [*TINY, "--output_dir", tmp_path, "--save_pred", 1]
    status, printed, err = program(*flags, "--predict_yaml", "argmax", "rankseg_rma_paper")
    assert status == 0, err
    run = tmp_path / TINY_RUN
    assert f"pictures: {run / 'pictures'}" in printed
    kinds = {path.parent.name: path.name for path in (run / "pictures").glob("*/*.png")}
    assert {"random"} < kinds.keys() <= {"gain", "loss", "random"}
    assert len(set(kinds.values())) == len(kinds), "an image is shown once while there are enough"
    first = {path: path.read_bytes() for path in (run / "pictures").rglob("*.png")}
    assert program(*flags, "--test-only", "--predict_yaml", "argmax", "rankseg_rma_paper")[0] == 0
    assert {path: path.read_bytes() for path in (run / "pictures").rglob("*.png")} == first
    assert not (run / "older").exists()
    assert program(*flags, "--test-only", "--predict_yaml", "argmax")[0] == 0
    assert {path.name for path in (run / "pictures").iterdir()} == {"random"}
    kept = {
        path.relative_to(run / "older" / "pictures.1"): path.read_bytes() for path in (run / "older").rglob("*.png")
    }
    assert kept == {path.relative_to(run / "pictures"): content for path, content in first.items()}
    record = json.loads((run / "older" / "pictures.1.json").read_text())
    assert [rule["config"]["predict"]["name"] for rule in record["rules"]] == ["argmax", "rankseg_rma_paper"]


def test_folders_of_another_origin_are_kept(tmp_path: Path):
    folder = claim_folder(tmp_path / "masks", {"iteration": 1})
    (folder / "a.png").write_text("one")
    assert claim_folder(folder, {"iteration": 1}) == folder
    assert (folder / "a.png").read_text() == "one"
    claim_folder(folder, {"iteration": 2})
    assert list(folder.iterdir()) == []
    (folder / "a.png").write_text("two")
    (tmp_path / "masks.json").unlink()  # of unknown origin
    claim_folder(folder, {"iteration": 2})
    assert (tmp_path / "older" / "masks.1" / "a.png").read_text() == "one"
    assert json.loads((tmp_path / "older" / "masks.1.json").read_text()) == {"iteration": 1}
    assert (tmp_path / "older" / "masks.2" / "a.png").read_text() == "two"
    assert json.loads((tmp_path / "masks.json").read_text()) == {"iteration": 2}
