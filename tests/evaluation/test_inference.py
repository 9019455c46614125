import pytest
import torch
from torch import nn

from exp.config.evaluation import TestConfig
from exp.evaluation.inference import Inference, build_inference, resize, softmax_, starts
from exp.runtime.errors import InputError


class Position(nn.Module):
    """A pixel-wise network that counts the windows it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.windows += len(image)
        return torch.cat([image, image[:, :1] * 2], dim=1)


class WindowMean(nn.Module):
    """A network whose logits depend on the whole window."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image - image.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("length", "crop", "stride", "expected"),
    [
        (10, 10, 7, [0]),
        (11, 10, 7, [0, 1]),
        (17, 10, 7, [0, 7]),
        (18, 10, 7, [0, 7, 8]),
        (24, 10, 7, [0, 7, 14]),
    ],
)
def test_windows_step_by_the_stride_and_end_with_the_image(length: int, crop: int, stride: int, expected: list[int]):
    assert starts(length, crop, stride) == expected


def test_a_resolved_yaml_becomes_the_window():
    config = TestConfig("t", "mIoUI", window_batch=7).resolved((240, 320))
    assert build_inference(config) == Inference((240, 320), (160, 214), 7)
    config = TestConfig("t", "mIoUI", scales=(0.5, 2.0), flip=True, temperature=1.5).resolved((240, 320))
    assert build_inference(config) == Inference((240, 320), (160, 214), 4, (0.5, 2.0), True, 1.5)


@pytest.mark.parametrize("size", [(20, 30), (9, 30), (20, 7), (5, 5), (8, 8)])
def test_a_pixelwise_network_gives_the_softmax_of_the_whole_image(size: tuple[int, int]):
    image = torch.randn(1, 3, *size)
    prob = Inference((8, 8), (6, 6), 3)(Position(), image)
    torch.testing.assert_close(prob, Position()(image).softmax(1))
    assert prob.dtype == torch.float32


def test_logits_are_averaged_before_the_softmax():
    """Two windows overlap by two columns; there the logits are the mean of both windows' own."""
    image = torch.randn(1, 3, 4, 6)
    prob = Inference((4, 4), (4, 2), 1)(WindowMean(), image)
    left, right = WindowMean()(image[..., :4]), WindowMean()(image[..., 2:])
    logits = torch.cat([left[..., :2], (left[..., 2:] + right[..., :2]) / 2, right[..., 2:]], dim=-1)
    torch.testing.assert_close(prob, logits.softmax(1))


def test_every_window_goes_through_the_network_once_whatever_the_batch():
    for window_batch in (1, 2, 7):
        network = Position()
        Inference((8, 8), (6, 6), window_batch)(network, torch.randn(1, 3, 20, 20))
        assert network.windows == 9


def literal(model: nn.Module, image: torch.Tensor, window: tuple, scales: tuple, flip: bool, temperature: float):
    """The definition, one window, view and pixel-wise mean at a time."""
    crop_h, crop_w = window[0]
    height, width = image.shape[-2:]
    views = []
    for scale in scales:
        for mirrored in [False, True] if flip else [False]:
            size = (round(height * scale), round(width * scale))
            small = scale < 1
            view = nn.functional.interpolate(image, size, mode="bilinear", antialias=small) if scale != 1 else image
            view = torch.flip(view, [3]) if mirrored else view
            padded = torch.zeros(1, 3, max(size[0], crop_h), max(size[1], crop_w))
            padded[..., : size[0], : size[1]] = view
            total = torch.zeros_like(model(padded))
            visits = torch.zeros_like(total)
            for top in starts(padded.shape[2], crop_h, window[1][0]):
                for left in starts(padded.shape[3], crop_w, window[1][1]):
                    area = (..., slice(top, top + crop_h), slice(left, left + crop_w))
                    total[area] += model(padded[area])
                    visits[area] += 1
            logits = (total / visits)[..., : size[0], : size[1]]
            if scale != 1:
                logits = nn.functional.interpolate(logits, (height, width), mode="bilinear", antialias=scale > 1)
            logits = torch.flip(logits, [3]) if mirrored else logits
            views.append((logits / temperature).softmax(1))
    return sum(views) / len(views)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.5,), (0.5, 1.0), (0.75, 1.0, 1.5)])
@pytest.mark.parametrize("size", [(20, 31), (6, 17)])
def test_every_combination_of_options_is_what_it_says(size: tuple, scales: tuple, flip: bool, temperature: float):
    generator = torch.Generator().manual_seed(0)
    network = nn.Conv2d(3, 5, 3, padding=1)  # neither symmetric nor local to a pixel
    network.weight.data = torch.randn(network.weight.shape, generator=generator)
    image = torch.randn(1, 3, *size, generator=generator)
    before = image.clone()
    prob = Inference((10, 12), (7, 8), 3, scales, flip, temperature)(network, image)
    with torch.inference_mode():
        expected = literal(network, image, ((10, 12), (7, 8)), scales, flip, temperature)
    torch.testing.assert_close(prob, expected)
    assert torch.equal(image, before)
    assert prob.is_contiguous()
    options = (flip, temperature != 1, scales != (1.0,))
    for plain in ((False, 1.0, (1.0,)),) if any(options) else ():
        other = Inference((10, 12), (7, 8), 3, plain[2], plain[0], plain[1])(network, image)
        assert (other - prob).abs().max() > 1e-3, "the options make no difference here"


def test_the_softmax_in_pieces_is_the_softmax(monkeypatch):
    monkeypatch.setattr("exp.evaluation.inference.CHUNK", 100)
    logits = torch.randn(1, 5, 33, 7) * 4
    expected = (logits / 1.7).softmax(1)
    prob = softmax_(logits, 1.7)
    assert prob.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(prob, expected)


def test_half_precision_logits_are_averaged_in_single():
    image = torch.randn(1, 3, 20, 20)
    prob = Inference((8, 8), (3, 3), 2)(lambda x: Position()(x).bfloat16(), image)
    assert prob.dtype == torch.float32
    torch.testing.assert_close(prob, Position()(image).bfloat16().float().softmax(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_are_refused(value: float):
    image = torch.zeros(1, 3, 8, 8)
    image[0, 1, 5, 6] = value
    with pytest.raises(InputError, match=r"test\.amp: got an image whose logits are non-finite"):
        Inference((8, 8), (6, 6), 3)(Position(), image)


def test_resizing_to_the_same_size_is_the_identity():
    image = torch.randn(1, 2, 9, 11)
    torch.testing.assert_close(resize(image, (9, 11)), image)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", ["corner", "centred"])
@pytest.mark.parametrize("size", [(5, 7), (20, 7), (9, 12)])
def test_padding_lies_where_it_is_to_and_may_be_kept(size: tuple[int, int], padding: str, flip: bool):
    """Of a network of pixels the padded map is that of the image padded by hand; inside it lies the image's own."""
    height, width = size
    image, (rows, columns) = torch.randn(1, 3, *size), (max(0, 8 - size[0]), max(0, 10 - size[1]))
    above, left = (rows // 2, columns // 2) if padding == "centred" else (0, 0)
    padded = nn.functional.pad(image, (left, columns - left, above, rows - above))
    kept = Inference((8, 10), (6, 7), 3, flip=flip, padding=padding, keep_padding=True)
    whole = kept(Position(), image)
    torch.testing.assert_close(whole, Position()(padded).softmax(1))
    assert kept.place(*size) == (slice(above, above + height), slice(left, left + width))
    torch.testing.assert_close(kept.inside(whole, *size), Position()(image).softmax(1))
    assert {view.shape[-2:] for view in kept.logits(Position(), image)} == {size}  # of labels, for a temperature
    prob = Inference((8, 10), (6, 7), 3, flip=flip, padding=padding)(WindowMean(), image)
    assert prob.shape == (1, 3, *size)
    torch.testing.assert_close(prob, kept.inside(kept(WindowMean(), image), *size))


def test_a_network_sees_the_padding_where_it_lies():
    def ramp(image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image[:, :1] + torch.arange(image.shape[-1]), image[:, 1:]], 1)

    image = torch.randn(1, 3, 5, 6)
    for where, left in (("corner", 0), ("centred", 1)):
        prob = Inference((9, 9), (6, 6), 1, padding=where)(ramp, image)
        expected = torch.cat([image[:, :1] + torch.arange(left, left + 6), image[:, 1:]], 1).softmax(1)
        torch.testing.assert_close(prob, expected)


def test_a_padded_map_has_one_scale():
    config = TestConfig("t", "mIoUI", scales=(0.5, 1.0)).resolved((32, 32))
    with pytest.raises(InputError, match=r"test\.scales: got \[0\.5, 1\.0\], expected \[1\] with a rule that sees"):
        build_inference(config, keep_padding=True)


@pytest.mark.parametrize("short_side", [None, 12, 40])
def test_whole_images_go_through_the_network_at_once(short_side: int | None):
    """Several of different sizes, each resized by its shorter side before, and its logits back after."""
    images = [torch.randn(1, 3, 20, 31), torch.randn(1, 3, 25, 17)]
    inference = build_inference(TestConfig("t", "mIoUI", whole=True, short_side=short_side).resolved((8, 8)))
    for image, prob in zip(images, inference.unchecked(WindowMean(), images)):
        size = tuple(image.shape[-2:])
        new = size if short_side is None else tuple(round(side * short_side / min(size)) for side in size)
        seen = image if new == size else resize(image, new)
        logits = WindowMean()(seen)
        expected = (logits if new == size else resize(logits, size)).softmax(1)
        torch.testing.assert_close(prob, expected)


def test_windows_slide_over_the_resized_image():
    network = Position()
    inference = build_inference(
        TestConfig("t", "mIoUI", crop_size=(10, 10), stride=(10, 10), short_side=20).resolved((8, 8))
    )
    assert inference(network, torch.randn(1, 3, 10, 15)).shape == (1, 4, 10, 15)
    assert network.windows == 2 * 3


def test_where_nothing_is_padded_a_rule_sees_no_padding():
    """Of an image that is smaller than the window before it is resized, too."""
    for keys in ({"whole": True}, {"crop_size": (32, 32), "short_side": 32}, {"whole": True, "scales": (0.5, 1.0)}):
        config = TestConfig("t", "mIoUI", padding="centred", **keys).resolved((32, 32))
        inference = build_inference(config, keep_padding=True)
        prob = inference(Position(), torch.randn(1, 3, 20, 24))
        assert prob[(..., *inference.place(20, 24))].shape == prob.shape == (1, 4, 20, 24)
    for keys in ({}, {"crop_size": (20, 20), "scales": (0.5, 1.0)}):  # padded, in one of the views
        config = TestConfig("t", "mIoUI", short_side=20, **keys).resolved((32, 32))
        with pytest.raises(InputError, match=r"test\.short_side: got 20, expected null with a rule that sees"):
            build_inference(config, keep_padding=True)


def test_a_window_and_the_whole_image_exclude_each_other():
    with pytest.raises(InputError, match="key 'whole': got True, expected false together with crop_size or stride"):
        TestConfig("t", "mIoUI", whole=True, crop_size=(8, 8))
