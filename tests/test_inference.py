import pytest
import torch
from torch import nn

from exp.config import TestConfig
from exp.inference import SlidingWindow, build_inference, starts


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
    assert build_inference(config) == SlidingWindow((240, 320), (160, 214), 7)


@pytest.mark.parametrize("size", [(20, 30), (9, 30), (20, 7), (5, 5), (8, 8)])
def test_a_pixelwise_network_gives_the_softmax_of_the_whole_image(size: tuple[int, int]):
    image = torch.randn(1, 3, *size)
    prob = SlidingWindow((8, 8), (6, 6), 3)(Position(), image)
    torch.testing.assert_close(prob, Position()(image).softmax(1))
    assert prob.dtype == torch.float32


def test_logits_are_averaged_before_the_softmax():
    """Two windows overlap by two columns; there the logits are the mean of both windows' own."""
    image = torch.randn(1, 3, 4, 6)
    prob = SlidingWindow((4, 4), (4, 2), 1)(WindowMean(), image)
    left, right = WindowMean()(image[..., :4]), WindowMean()(image[..., 2:])
    logits = torch.cat([left[..., :2], (left[..., 2:] + right[..., :2]) / 2, right[..., 2:]], dim=-1)
    torch.testing.assert_close(prob, logits.softmax(1))


def test_every_window_goes_through_the_network_once_whatever_the_batch():
    for window_batch in (1, 2, 7):
        network = Position()
        SlidingWindow((8, 8), (6, 6), window_batch)(network, torch.randn(1, 3, 20, 20))
        assert network.windows == 9
