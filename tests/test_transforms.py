import numpy as np
import torch
from PIL import Image

from exp.data.transforms import Normalize, RandomCrop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def smooth_image(height: int, width: int) -> Image.Image:
    """A soft picture, on which resampling methods hardly differ."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def block_label(height: int, width: int) -> Image.Image:
    blocks = np.random.default_rng(1).integers(0, 5, (height // 40, width // 40), np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def crop(**changes: object) -> RandomCrop:
    options = {"crop_size": (96, 128), "scale_range": (0.5, 2.0), "flip_prob": 0.5, "mean": MEAN, "seed": 0}
    return RandomCrop(**{**options, **changes})


def test_the_crop_alone_equals_scaling_the_whole_image_first():
    """Against resize, flip, pad, crop in the plain order with the same random numbers.

    Labels may differ by a line of pixels along an edge that falls between two pixels.
    """
    image, label = smooth_image(160, 240), block_label(160, 240)
    equal = []
    for draw in range(100):
        rng = np.random.default_rng((0, draw))
        scale, flip = rng.uniform(0.5, 2.0), rng.random() < 0.5
        size = (round(240 * scale), round(160 * scale))
        left, top = int(rng.integers(max(size[0] - 128, 0) + 1)), int(rng.integers(max(size[1] - 96, 0) + 1))
        box = (left, top, min(left + 128, size[0]), min(top + 96, size[1]))
        whole = image.resize(size, Image.Resampling.BILINEAR).crop(box)
        whole_label = label.resize(size, Image.Resampling.NEAREST).crop(box)
        if flip:
            whole, whole_label = (i.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in (whole, whole_label))
        got, got_label = (np.asarray(i) for i in crop()(image, label, draw))
        h, w = box[3] - box[1], box[2] - box[0]
        assert abs(got[:h, :w].astype(int) - np.asarray(whole)).mean() < 2
        equal.append((got_label[:h, :w] == np.asarray(whole_label)).mean())
        assert (got[h:] == [124, 116, 104]).all()
        assert (got[:, w:] == [124, 116, 104]).all()
        assert (got_label[h:] == 255).all()
        assert (got_label[:, w:] == 255).all()
    assert min(equal) > 0.95
    assert np.mean(equal) > 0.995


def test_the_distribution_is_the_papers():
    """Scale uniform in 0.5..2 (seen in the size of a square), flip one half, the crop anywhere."""
    image = Image.new("RGB", (300, 300))
    marked = np.zeros((300, 300), np.uint8)
    marked[:, :150] = 1
    flips, scales = [], []
    for draw in range(800):
        label = np.asarray(crop(crop_size=(600, 600))(image, Image.fromarray(marked), draw)[1])
        row = label[0]
        scales.append((row != 255).sum() / 300)
        flips.append(row[0] == 0)
    assert abs(np.mean(flips) - 0.5) < 0.06
    assert min(scales) < 0.52
    assert max(scales) > 1.98
    assert abs(np.mean(scales) - 1.25) < 0.05


def test_random_choices_depend_on_seed_and_draw_alone():
    image, label = smooth_image(96, 128), block_label(96, 128)
    same = [np.asarray(crop()(image, label, 5)[0]) for _ in range(2)]
    assert (same[0] == same[1]).all()
    assert (np.asarray(crop()(image, label, 6)[0]) != same[0]).any()
    assert (np.asarray(crop(seed=1)(image, label, 5)[0]) != same[0]).any()


def test_fixed_parameters_leave_the_image_as_it_is():
    image, label = smooth_image(96, 128), block_label(96, 128)
    got, got_label = crop(scale_range=(1.0, 1.0), flip_prob=0.0)(image, label, 0)
    assert (np.asarray(got) == np.asarray(image)).all()
    assert (np.asarray(got_label) == np.asarray(label)).all()


def test_normalize():
    image = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = (image / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(Normalize(MEAN, STD)(image), expected, atol=1e-5, rtol=0)
