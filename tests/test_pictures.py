from pathlib import Path

import numpy as np
from PIL import Image

from exp.evaluate import EvalResult
from exp.pictures import (
    BETTER,
    BOTH_WRONG,
    WORSE,
    colour_differences,
    colour_labels,
    draw_panel,
    largest_gains,
    save_panel,
)

PALETTE = ((0, 0, 0), (200, 0, 0), (0, 200, 0))


def test_labels_in_the_palette_and_ignored_pixels_white():
    assert colour_labels(np.array([[0, 1, 255]]), PALETTE).tolist() == [[[0, 0, 0], [200, 0, 0], [255, 255, 255]]]


def test_differences_tell_better_from_worse():
    label = np.array([[0, 1, 1, 1, 255]])
    base, other = np.array([[0, 0, 1, 0, 0]]), np.array([[0, 1, 0, 2, 1]])
    expected = [[(0, 0, 0), BETTER, WORSE, BOTH_WRONG, (0, 0, 0)]]
    assert colour_differences(label, base, other).tolist() == [[list(c) for c in expected[0]]]


def test_a_panel_has_a_tile_each(tmp_path: Path):
    image, label = np.full((40, 320, 3), 77, np.uint8), np.ones((40, 320), np.uint8)
    panel = draw_panel(image, label, {"argmax": label * 0, "rankseg_rma": label}, PALETTE)
    assert panel.shape == (54, 5 * 324 - 4, 3)
    middles = [tuple(panel[34, 324 * i + 160]) for i in range(5)]
    assert middles == [(77, 77, 77), (200, 0, 0), (0, 0, 0), (200, 0, 0), BETTER]
    path = save_panel(panel, tmp_path / "pictures", "city/0001")
    assert path == tmp_path / "pictures" / "city_0001.png"
    assert (np.asarray(Image.open(path)) == panel).all()


def test_largest_gains_come_first():
    def result(rule: str, right: list[int]) -> EvalResult:
        counts = np.array([[[r, 10, 5], [0, 0, 10 - r], [10 - r, 0, 0]] for r in right])
        return EvalResult(rule, tuple("abc"), ("x", "y", "z"), counts)

    results = [result("argmax", [5, 5, 5]), result("rankseg_rma", [4, 9, 6])]
    assert largest_gains(results, "mIoUI", 2) == [1, 2]
    assert largest_gains(results[:1], "mIoUI", 2) == [0, 1]
