"""ShapesNoisy: its labels beside the probabilities it gives, and the images and labels of Shapes as they were."""

import hashlib

import numpy as np
import pytest
from scipy import stats

from exp.data.registry import build_dataset
from exp.data.sets.shapes import Shapes, ShapesBinary, ShapesNoisy, ShapesNoisyBinary
from exp.runtime.errors import InputError
from tests.config.test_config import compose

NOISY = (ShapesNoisy, ShapesNoisyBinary)


def make(cls: type[ShapesNoisy], noise: float, spread: float, split: str = "val", images: int = 12) -> ShapesNoisy:
    return cls(None, split, max_samples=images, facts={"label_noise": noise, "label_spread": spread})


@pytest.mark.parametrize(
    ("cls", "split", "digest"),
    [
        (Shapes, "train", "17ecb642117b6ec8"),
        (Shapes, "val", "7dc1f07aac4d8802"),
        (ShapesBinary, "train", "d7ce28691f1fd102"),
        (ShapesBinary, "val", "01cc404c016564e5"),
    ],
)
def test_shapes_are_what_they_were_before_noisy_ones(cls: type[Shapes], split: str, digest: str):
    found, dataset = hashlib.sha256(), cls(None, split)
    for i in range(6):
        image, label = dataset.read(i)
        found.update(image.tobytes() + label.tobytes())
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize("cls", NOISY)
@pytest.mark.parametrize(("noise", "spread"), [(0.0, 0.0), (0.2, 0.0), (0.0, 3.0), (0.4, 6.0), (1.0, 1.5)])
def test_probabilities_sum_to_one(cls: type[ShapesNoisy], noise: float, spread: float):
    dataset = make(cls, noise, spread)
    for i in range(3):
        prob = dataset.probabilities(i)
        assert prob.shape == (len(cls.classes), 96, 128)
        assert prob.min() >= noise / len(cls.classes) - 1e-12
        np.testing.assert_allclose(prob.sum(0), 1, atol=1e-12)


@pytest.mark.parametrize("cls", NOISY)
@pytest.mark.parametrize(("noise", "spread"), [(0.1, 3.0), (0.4, 0.0), (0.0, 6.0)])
def test_labels_follow_the_probabilities(cls: type[ShapesNoisy], noise: float, spread: float):
    """Chi-square over ten bins of each class's probability; the cases are fixed, so the outcome is too."""
    dataset = make(cls, noise, spread, split="train")
    prob = np.stack([dataset.probabilities(i) for i in range(12)])
    label = np.stack([dataset.read(i)[1] for i in range(12)])
    for c in range(len(cls.classes)):
        p, hit = prob[:, c].ravel(), (label == c).ravel()
        assert not hit[p == 0].any()
        assert hit[p == 1].all()
        inside = (p > 1e-4) & (p < 1 - 1e-4)
        bins = np.minimum((10 * p[inside]).astype(int), 9)
        seen, mean, variance = (np.bincount(bins, w, 10) for w in (hit[inside], p[inside], p[inside] * (1 - p[inside])))
        full = variance > 10
        square = ((seen - mean)[full] ** 2 / variance[full]).sum()
        assert stats.chi2.sf(square, full.sum()) > 1e-3


def test_labels_of_neighbours_are_independent_given_the_probabilities():
    """Over 146,000 pairs the sum of the products lies within 3.5 standard deviations of 0."""
    dataset = make(ShapesNoisyBinary, 0.2, 3.0)
    rest = np.stack([dataset.read(i)[1] - dataset.probabilities(i)[1] for i in range(12)])
    product = rest[:, :, 1:] * rest[:, :, :-1]
    assert abs(product.sum()) < 3.5 * np.sqrt((product**2).sum())


def test_the_same_again_and_on_every_noise_level_the_same_images():
    first, again, other = make(ShapesNoisy, 0.2, 3.0), make(ShapesNoisy, 0.2, 3.0), make(ShapesNoisy, 0.4, 3.0)
    for i in range(3):
        assert (first.read(i)[1] == again.read(i)[1]).all()
        assert (first.read(i)[0] == other.read(i)[0]).all()
        assert (first.read(i)[0] == Shapes(None, "val").read(i)[0]).all()
        assert (first.read(i)[1] != other.read(i)[1]).any()


def test_without_noise_the_labels_are_those_of_shapes():
    clean, noisy = Shapes(None, "val"), make(ShapesNoisy, 0.0, 0.0)
    for i in range(6):
        label = clean.read(i)[1]
        assert (noisy.read(i)[1] == label)[label != 255].all()
        assert noisy.read(i)[1].max() < 6


def test_two_classes_are_six_with_the_objects_joined():
    six, two = make(ShapesNoisy, 0.0, 3.0), make(ShapesNoisyBinary, 0.0, 3.0)
    np.testing.assert_allclose(six.probabilities(1)[1:].sum(0), two.probabilities(1)[1], atol=1e-12)


def test_the_yaml_says_how_much_noise():
    dataset = build_dataset(compose("data.label_noise=0.25", data="shapes_noisy").data, None, "val")
    assert (dataset.label_noise, dataset.label_spread) == (0.25, 3.0)
    with pytest.raises(InputError, match=r"key 'label_spread': got None, expected a value: .* shapes_noisy"):
        build_dataset(compose("data.label_spread=null", data="shapes_noisy").data, None, "val")
    with pytest.raises(InputError, match=r"key 'label_noise': got 0.2, expected no such key with the dataset shapes"):
        build_dataset(compose("data.label_noise=0.2").data, None, "val")
