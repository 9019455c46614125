import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from exp.config.experiment import load_groups
from exp.data.decode import read_image
from exp.data.registry import build_transform
from exp.data.sets.camvid import CamVid
from exp.data.transforms import CenterCrop, Normalize, RandomCrop

FILL = (124, 116, 104)


def soft_image(height: int, width: int) -> np.ndarray:
    """A soft picture, on which ways of resampling hardly differ."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def round_label(height: int, width: int) -> np.ndarray:
    """Regions of five labels with curved edges."""
    coarse = np.random.default_rng(1).normal(size=(height // 40 + 1, width // 40 + 1, 5))
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).argmax(-1).astype(np.uint8)


def crop(**changes: object) -> RandomCrop:
    options = {"crop_size": (96, 128), "scale_range": (0.5, 2.0), "flip_prob": 0.5, "fill": FILL, "seed": 0}
    return RandomCrop(**{**options, **changes})


def plain_crop(
    image: np.ndarray, label: np.ndarray, transform: RandomCrop, draw: int
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Resize the whole image, cut, flip, with the same random numbers -> the crop without its padding, its size."""
    (height, width), (crop_h, crop_w) = label.shape, transform.crop_size
    rng = np.random.default_rng((transform.seed, draw))
    scale, flip = rng.uniform(*transform.scale_range), rng.random() < transform.flip_prob
    size = (round(width * scale), round(height * scale))
    left, top = int(rng.integers(max(size[0] - crop_w, 0) + 1)), int(rng.integers(max(size[1] - crop_h, 0) + 1))
    whole = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)[top : top + crop_h, left : left + crop_w]
    whole_label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST_EXACT)  # pixel centres, as the image's
    whole_label = whole_label[top : top + crop_h, left : left + crop_w]
    if flip:
        whole, whole_label = whole[:, ::-1], whole_label[:, ::-1]
    return whole, whole_label, *whole_label.shape


def compare_with_plain(image: np.ndarray, label: np.ndarray, transform: RandomCrop, draws: range) -> None:
    """On every draw the crop differs by less than 2 grey levels on average; 99.5 % of all the labels are equal.

    The others: at some scales a line of pixels lies exactly half-way between two labels.
    """
    equal = []
    for draw in draws:
        expected, expected_label, height, width = plain_crop(image, label, transform, draw)
        got, got_label = transform(image, label, draw)
        assert got.shape == (*transform.crop_size, image.shape[2])
        assert got.dtype == image.dtype
        above, left = ((crop - side) // 2 for crop, side in zip(transform.crop_size, (height, width)))
        box = (slice(above, above + height), slice(left, left + width))
        difference = got[box].astype(int) - expected.reshape(height, width, -1)
        assert abs(difference).mean() < 2
        equal.append((got_label[box] == expected_label).mean())
        around = np.ones(transform.crop_size, bool)
        around[box] = False
        assert (got[around] == transform.fill).all()
        assert (got_label[around] == 255).all()
    assert np.mean(equal) >= 0.995
    assert min(equal) >= 0.985


def test_the_crop_alone_equals_scaling_the_whole_image_first():
    """Against resize, flip, pad, crop in the plain order with the same random numbers."""
    compare_with_plain(soft_image(160, 240), round_label(160, 240), crop(), range(100))


def test_a_slice_of_ct_is_warped_as_it_is():
    image = cv2.resize(np.random.default_rng(0).normal(40, 60, (20, 20)), (160, 160)).astype(np.int16)[..., None]
    compare_with_plain(image, round_label(160, 160), crop(fill=(40,)), range(30))


def test_real_photographs(real_data: Path):
    dataset = CamVid(real_data, "val", max_samples=8)
    for index in range(8):
        compare_with_plain(*dataset.read(index), crop(crop_size=(240, 320)), range(10 * index, 10 * index + 10))
    for path in sorted((real_data / "ade_sample" / "images").iterdir()):
        image = read_image(path)
        compare_with_plain(image, round_label(*image.shape[:2]), crop(crop_size=(512, 512)), range(10))


def test_the_distribution_is_the_papers():
    """Scale uniform in 0.5..2 (seen in the size of a square), flip one half."""
    image, marked = np.zeros((300, 300, 3), np.uint8), np.zeros((300, 300), np.uint8)
    marked[:, :150] = 1
    flips, scales = [], []
    for draw in range(800):
        row = crop(crop_size=(600, 600))(image, marked, draw)[1][300]
        row = row[row != 255]
        scales.append(len(row) / 300)
        flips.append(row[0] == 0)
    assert abs(np.mean(flips) - 0.5) < 0.06
    counts, _ = np.histogram(scales, bins=6, range=(0.5, 2.0))
    assert abs(counts / 800 - 1 / 6).max() < 0.04  # three standard deviations


def test_the_crop_lies_anywhere():
    """At a fixed scale the left edge is uniform over the places where the crop fits."""
    label = np.broadcast_to(np.arange(200, dtype=np.uint8), (120, 200)).copy()
    image = np.zeros((120, 200, 3), np.uint8)
    steady = crop(crop_size=(100, 100), scale_range=(1.0, 1.0), flip_prob=0.0)
    lefts = [steady(image, label, draw)[1][0, 0] for draw in range(1000)]
    assert (min(lefts), max(lefts)) == (0, 100)
    counts, _ = np.histogram(lefts, bins=5, range=(0, 101))
    assert abs(counts / 1000 - 1 / 5).max() < 0.04


def test_random_choices_depend_on_seed_and_draw_alone():
    image, label = soft_image(96, 128), round_label(96, 128)
    first, again = (crop()(image, label, 5)[0] for _ in range(2))
    assert (first == again).all()
    assert (crop()(image, label, 6)[0] != first).any()
    assert (crop(seed=1)(image, label, 5)[0] != first).any()


def test_fixed_parameters_leave_the_image_as_it_is():
    image, label = soft_image(96, 128), round_label(96, 128)
    before = image.copy(), label.copy()
    got, got_label = crop(scale_range=(1.0, 1.0), flip_prob=0.0)(image, label, 0)
    assert (got == image).all()
    assert (got_label == label).all()
    mirrored, mirrored_label = crop(scale_range=(1.0, 1.0), flip_prob=1.0)(image, label, 0)
    assert (mirrored == image[:, ::-1]).all()
    assert (mirrored_label == label[:, ::-1]).all()
    assert (image == before[0]).all()
    assert (label == before[1]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2)])
def test_tiny_images_have_a_crop_too(size: tuple[int, int]):
    for draw in range(20):
        image, label = crop()(np.full((*size, 3), 7, np.uint8), np.zeros(size, np.uint8), draw)
        assert (image[label == 0] == 7).all()
        assert (label == 0).sum() >= 1


def half_of(label: np.ndarray, axis: int) -> tuple[int, int]:
    """Ignored rows or columns before and behind what is not."""
    kept = np.flatnonzero((label != 255).any(1 - axis))
    return kept[0], label.shape[axis] - 1 - kept[-1]


@pytest.mark.parametrize("kind", ["centred", "letter"])
def test_padding_is_centred(kind: str):
    for draw in range(20):
        label = crop(crop_size=(512, 512), kind=kind)(soft_image(160, 240), round_label(160, 240), draw)[1]
        for axis in (0, 1):
            before, behind = half_of(label, axis)
            assert behind - before in (0, 1)


def test_to_the_letter_a_crop_is_that_of_a_factor_in_floating_point(real_data: Path):
    """Against cv2.resize(fx, fy) of the whole float32 image and INTER_NEAREST of its label, as the paper's code does.

    Its pixels lie at (x + 0.5) / scale - 0.5, its labels at floor(x / scale); ours are rounded to the file's integers.
    Without the letter the labels differ.
    """
    image, label = CamVid(real_data, "val").read(0)
    away = []
    for draw in range(12):
        options = {"crop_size": (900, 900), "flip_prob": 0.0}
        got, got_label = crop(kind="letter", **options)(image, label, draw)
        rng = np.random.default_rng((0, draw))
        scale = rng.uniform(0.5, 2.0)
        rng.random()
        whole = cv2.resize(image.astype(np.float32), None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        whole_label = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        height, width = whole_label.shape
        left, top = int(rng.integers(max(width - 900, 0) + 1)), int(rng.integers(max(height - 900, 0) + 1))
        whole, whole_label = (values[top : top + 900, left : left + 900] for values in (whole, whole_label))
        above, start = ((900 - side) // 2 for side in whole_label.shape)
        box = (slice(above, above + whole.shape[0]), slice(start, start + whole.shape[1]))
        assert abs(got[box] - whole).mean() < 0.6, draw
        assert (got_label[box] == whole_label).mean() > 0.9995, draw
        away.append((crop(**options)(image, label, draw)[1][box] != whole_label).mean())
    assert max(away) > 0.005


def test_a_slice_of_ct_is_padded_by_air_and_clipped_after_it_is_resampled():
    """Half of the pixels are far below the window, half little above: halfway between is below it or, clipped first, in
    its middle."""
    config = dataclasses.replace(
        load_groups({"data": ["lits"]}, [])["data"], crop_size=(96, 96), scale_range=(1.9, 1.9)
    )
    image = np.full((32, 32, 1), -1000, np.int16)
    image[:, 16:] = 240
    label = np.zeros((32, 32), np.uint8)
    for kind, padding in (("centred", -60), ("letter", -60), ("corner", 40)):
        transform = build_transform(dataclasses.replace(config, augmentation=kind, flip_prob=0.0), True, 0)
        got, got_label = transform(image, label, 0)
        got = got.clip(-60, 140)
        assert set(np.unique(got[got_label == 255])) == {padding}
        row = got[got_label != 255].reshape(-1, 61)[0]
        between = row[(row > -60) & (row < 140)]
        assert len(between) == (1 if kind == "corner" else 0), (kind, between)


def test_the_middle_of_an_image():
    label = np.arange(12 * 10, dtype=np.uint8).reshape(12, 10)
    image, middle = CenterCrop((4, 6))(label[..., None], label, 0)
    assert (middle == label[4:8, 2:8]).all()
    assert (image[..., 0] == middle).all()
    assert (CenterCrop((20, 6))(label[..., None], label, 0)[1] == label[:, 2:8]).all()


def test_normalize():
    image = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (image / 255 - mean[:, None, None]) / std[:, None, None]
    got = Normalize(tuple(255 * mean), tuple(255 * std))(image)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_window_of_ct_becomes_minus_one_to_one():
    values = torch.tensor([-60, 40, 140], dtype=torch.int16).reshape(1, 1, 1, 3)
    got = Normalize((40.0,), (100.0,))(values).flatten()
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 1.0]))
