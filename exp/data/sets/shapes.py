"""Shapes: a synthetic data set, drawn on the fly; nothing to download."""

import math

import cv2
import numpy as np
from PIL import Image

from exp.data.base import IGNORE_INDEX, Sample, SegmentationDataset
from exp.runtime.errors import InputError

HEIGHT, WIDTH = 96, 128
SPLITS = {"train": (1, 2000), "val": (2, 200)}  # stream of the generator, images by default
HUES = np.array(  # the mean colour of each class, disk to bar
    [(0.70, 0.45, 0.35), (0.35, 0.50, 0.70), (0.40, 0.65, 0.40), (0.65, 0.62, 0.35), (0.62, 0.40, 0.62)], np.float32
)
GRID_Y, GRID_X = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)


class Shapes(SegmentationDataset):
    """SYNTHETIC 96 x 128 images of disks, squares, triangles, rings and bars: no real image, and no claim about one.

    It is here so that the whole program runs at once on any machine. The background is clutter: soft noise and
    unlabelled blobs. Objects are large and small, of colours that overlap between classes, with soft edges; the
    label's edge is off by about a pixel, so the label near a boundary is ambiguous. One image in three has a band
    of ignored pixels. Image i of a split is a function of (split, i) alone.
    """

    classes = ("background", "disk", "square", "triangle", "ring", "bar")
    palette = ((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167))
    on_disk = False

    def list_samples(self) -> list[Sample]:
        if self.split not in SPLITS:
            raise InputError(f"data.*_split: got '{self.split}', expected one of {', '.join(SPLITS)} with shapes")
        names = (f"shapes_{self.split}_{i:04d}" for i in range(SPLITS[self.split][1]))
        return [Sample(name, image=None, label=None) for name in names]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return draw_scene(np.random.default_rng((SPLITS[self.split][0], index)))


class ShapesBinary(Shapes):
    """SYNTHETIC: the images of Shapes with two classes, any object against the background."""

    classes = ("background", "object")
    palette = ((0, 0, 0), (230, 159, 0))
    label_map = dict.fromkeys(range(1, 6), 1)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = super().read(index)
        return image, self._label_table[label].astype(np.uint8)


class ShapesNoisy(Shapes):
    """SYNTHETIC: the images of Shapes, every pixel's label drawn from a distribution that is known.

    A pixel's label is that of a place `label_spread` pixels away (standard deviation of a Gaussian displacement, the
    border repeated), and with probability `label_noise` it is instead any of the classes, each as likely. Pixels are
    independent given the scene (the image and the labels that Shapes has for it); the noise of image i of a split is a
    function of (split, i) alone, and so the same in every epoch. No pixel is ignored, so that what a rule decides on
    and what is scored are the same pixels.
    """

    label_noise: float
    label_spread: float

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = self._scene(index)
        rng = np.random.default_rng((SPLITS[self.split][0], index, 1))  # another stream than the scene's
        steps = self._soften(label)[:-1].cumsum(0)
        return image, (rng.random(label.shape) >= steps).sum(0, dtype=np.uint8)

    def probabilities(self, index: int) -> np.ndarray:
        """Index -> (C, H, W) float64: the distribution from which the labels are drawn; it sums to 1."""
        return self._soften(self._scene(index)[1])

    def _scene(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Index -> image and (H, W) labels before the noise."""
        image, label = draw_objects(np.random.default_rng((SPLITS[self.split][0], index)))
        return image, self._label_table[label]

    def _soften(self, label: np.ndarray) -> np.ndarray:
        """(H, W) labels -> (C, H, W) float64 probabilities of the noisy ones."""
        num_classes = len(self.classes)
        prob = (np.arange(num_classes)[:, None, None] == label).astype(np.float64)
        if self.label_spread:
            side = 2 * math.ceil(4 * self.label_spread) + 1
            kernel = cv2.getGaussianKernel(side, self.label_spread)
            prob = np.stack([cv2.sepFilter2D(p, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE) for p in prob])
            prob = prob.clip(0, 1)
            prob /= prob.sum(0)
        return (1 - self.label_noise) * prob + self.label_noise / num_classes


class ShapesNoisyBinary(ShapesNoisy):
    """SYNTHETIC: ShapesNoisy with two classes, any object against the background."""

    classes, palette, label_map = ShapesBinary.classes, ShapesBinary.palette, ShapesBinary.label_map


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Generator -> (H, W, 3) uint8 image and (H, W) uint8 label."""
    image, label = draw_objects(rng)
    if rng.random() < 1 / 3:
        left = int(rng.integers(WIDTH - 12))
        label[:, left : left + int(rng.integers(4, 12))] = IGNORE_INDEX
    return image, label


def draw_objects(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Generator -> (H, W, 3) uint8 image and (H, W) uint8 label of every pixel."""
    base = rng.uniform(0.3, 0.6, 3).astype(np.float32)
    image = _noise(rng, cell=16, depth=3) * 0.15 + _noise(rng, cell=4, depth=1) * 0.1 + base
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    for _ in range(rng.integers(3, 7)):  # clutter: soft blobs that no class claims
        alpha = _coverage(_signed_distance(rng, 0, radius=rng.uniform(3, 20)), softness=rng.uniform(3, 6))
        image += 0.5 * alpha[..., None] * (rng.uniform(0.2, 0.8, 3).astype(np.float32) - image)
    for _ in range(rng.integers(2, 7)):
        kind = int(rng.integers(len(HUES)))
        radius = rng.uniform(16, 32) if rng.random() < 0.4 else rng.uniform(4, 10)
        distance = _signed_distance(rng, kind, radius)
        colour = HUES[kind] + (rng.normal(0, 0.06, 3) + rng.uniform(-0.12, 0.12)).astype(np.float32)
        alpha = rng.uniform(0.6, 1.0) * _coverage(distance, softness=rng.uniform(0.4, 2.0))
        image += alpha[..., None] * (colour - image)
        label[distance < rng.normal(0, 0.7)] = kind + 1
    image += rng.normal(0, 0.03, (HEIGHT, WIDTH, 1)).astype(np.float32)
    return (image.clip(0, 1) * 255).astype(np.uint8), label


def _noise(rng: np.random.Generator, cell: int, depth: int) -> np.ndarray:
    """(H, W, depth) smooth noise in -0.5..0.5 that varies over `cell` pixels."""
    coarse = rng.uniform(-0.5, 0.5, (depth, HEIGHT // cell + 1, WIDTH // cell + 1)).astype(np.float32)
    planes = [Image.fromarray(plane).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for plane in coarse]
    return np.stack(planes, axis=-1)


def _coverage(distance: np.ndarray, softness: float) -> np.ndarray:
    return 1 / (1 + np.exp(np.clip(distance / softness, -30, 30)))


def _signed_distance(rng: np.random.Generator, kind: int, radius: float) -> np.ndarray:
    """(H, W) distance in pixels to the edge of one shape at a random place and angle, negative inside."""
    x, y = GRID_X - np.float32(rng.uniform(0, WIDTH)), GRID_Y - np.float32(rng.uniform(0, HEIGHT))
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * x + sin * y, cos * y - sin * x
    if kind == 0:  # disk
        return np.hypot(u, v) - radius
    if kind == 1:  # square
        return np.maximum(abs(u), abs(v)) - 0.85 * radius
    if kind == 2:  # triangle: three half-planes
        return np.max([np.cos(a) * u + np.sin(a) * v for a in (0, 2 * np.pi / 3, 4 * np.pi / 3)], axis=0) - 0.6 * radius
    if kind == 3:  # ring
        return abs(np.hypot(u, v) - 0.75 * radius) - 0.25 * radius
    return np.maximum(abs(u) - 1.4 * radius, abs(v) - 0.22 * radius)  # bar
