"""Checkpoints of mmsegmentation -> our networks, beside what mmsegmentation itself makes of the same tensors.

MEASURED: by mmsegmentation 1.2.2 with mmcv-lite 2.1.0, of networks of its own classes with every tensor as `fill` has
it: the SHA-256 of the tensors' names and shapes, and the logits of two pixels.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from exp.models.mmseg import ARCHITECTURES, load_mmseg
from exp.runtime.errors import InputError

NUM_CLASSES = 5
Shapes = dict[str, tuple[int, ...]]
PIXELS = ((10, 20), (60, 90))  # row, column
MEASURED: dict[str, tuple[str, list[list[float]]]] = {
    "segformer_mit-b0": (
        "7d161c99c33f7a9585eec54d1396e95960803a04a96a0e087e5b3f24f992df56",
        [[-1.60987, -0.1584, 0.66475, 2.36154, 0.16052], [-1.12088, -0.76468, 0.85799, 1.53522, -0.00692]],
    ),
    "pspnet_r50-d8": (
        "f72c8c1538fc21cc17fc39b83678477bd050c1937db59dfdb14489d0db3cc235",
        [[71.342, -7.841, -69.21748, 71.04308, 9.62481], [62.15093, 8.7481, -0.9913, 41.70908, 27.57183]],
    ),
    "deeplabv3plus_r50-d8": (
        "19c34a52f34a0193754bc6a25cb710fbb47dcd454dca825938ca4c81cc513349",
        [[-23.24132, 4.35527, 3.02856, -6.62253, 14.80409], [-7.20697, 9.43519, -13.32037, -12.61035, 6.99948]],
    ),
    "upernet_r50": (
        "9e07456ffe462089cdb1510cbfccdbcd1f6d04422c1c31b7dc9d4df2cc375247",
        [[-27.93456, -8.50296, 0.10193, 3.32245, -32.6676], [-7.60357, 8.14345, -9.15187, 10.21983, 9.37638]],
    ),
}
SMALL = "segformer_mit-b0"


def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.{part}", (width,)) for part in ("weight", "bias", "running_mean", "running_var"))
    yield f"{name}.num_batches_tracked", ()


def conv_module(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A convolution without bias and its batch norm."""
    yield f"{name}.conv.weight", shape
    yield from norm(f"{name}.bn", shape[0])


def linear(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def resnet50() -> Iterator[tuple[str, tuple[int, ...]]]:
    """ResNetV1c of depth 50."""
    for place, shape in ((0, (32, 3)), (3, (32, 32)), (6, (64, 32))):
        yield f"backbone.stem.{place}.weight", (*shape, 3, 3)
        yield from norm(f"backbone.stem.{place + 1}", shape[0])
    before = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            place = f"backbone.layer{stage + 1}.{block}"
            for i, shape in enumerate(((width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)), start=1):
                yield f"{place}.conv{i}.weight", shape
                yield from norm(f"{place}.bn{i}", shape[0])
            if block == 0:
                yield f"{place}.downsample.0.weight", (4 * width, before, 1, 1)
                yield from norm(f"{place}.downsample.1", 4 * width)
            before = 4 * width


def mit_b0() -> Iterator[tuple[str, tuple[int, ...]]]:
    before = 3
    for stage, (width, size, ratio) in enumerate(zip((32, 64, 160, 256), (7, 3, 3, 3), (8, 4, 2, 1))):
        place = f"backbone.layers.{stage}"
        yield from linear(f"{place}.0.projection", width, before, size, size)
        yield from linear(f"{place}.0.norm", width)
        for block in range(2):
            yield from linear(f"{place}.1.{block}.norm1", width)
            yield f"{place}.1.{block}.attn.attn.in_proj_weight", (3 * width, width)
            yield f"{place}.1.{block}.attn.attn.in_proj_bias", (3 * width,)
            yield from linear(f"{place}.1.{block}.attn.attn.out_proj", width, width)
            if ratio > 1:
                yield from linear(f"{place}.1.{block}.attn.sr", width, width, ratio, ratio)
                yield from linear(f"{place}.1.{block}.attn.norm", width)
            yield from linear(f"{place}.1.{block}.norm2", width)
            yield from linear(f"{place}.1.{block}.ffn.layers.0", 4 * width, width, 1, 1)
            yield from linear(f"{place}.1.{block}.ffn.layers.1", 4 * width, 1, 3, 3)
            yield from linear(f"{place}.1.{block}.ffn.layers.4", width, 4 * width, 1, 1)
        yield from linear(f"{place}.2", width)
        before = width


def separable(name: str, width: int, before: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from conv_module(f"{name}.depthwise_conv", before, 1, 3, 3)
    yield from conv_module(f"{name}.pointwise_conv", width, before, 1, 1)


def head(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """decode_head of a network on ResNet-50, or of SegFormer on MiT-B0."""
    place = "decode_head"
    yield from linear(f"{place}.conv_seg", NUM_CLASSES, 256 if name == "segformer" else 512, 1, 1)
    if name in ("pspnet", "upernet"):
        for i in range(4):
            yield from conv_module(f"{place}.psp_modules.{i}.1", 512, 2048, 1, 1)
        yield from conv_module(f"{place}.bottleneck", 512, 2048 + 4 * 512, 3, 3)
    if name == "upernet":
        for i in range(3):
            yield from conv_module(f"{place}.lateral_convs.{i}", 512, 256 * 2**i, 1, 1)
            yield from conv_module(f"{place}.fpn_convs.{i}", 512, 512, 3, 3)
        yield from conv_module(f"{place}.fpn_bottleneck", 512, 4 * 512, 3, 3)
    if name == "deeplabv3plus":
        yield from conv_module(f"{place}.image_pool.1", 512, 2048, 1, 1)
        yield from conv_module(f"{place}.aspp_modules.0", 512, 2048, 1, 1)
        for i in range(1, 4):
            yield from separable(f"{place}.aspp_modules.{i}", 512, 2048)
        yield from conv_module(f"{place}.bottleneck", 512, 5 * 512, 3, 3)
        yield from conv_module(f"{place}.c1_bottleneck", 48, 256, 1, 1)
        yield from separable(f"{place}.sep_bottleneck.0", 512, 512 + 48)
        yield from separable(f"{place}.sep_bottleneck.1", 512, 512)
    if name == "segformer":
        for i, width in enumerate((32, 64, 160, 256)):
            yield from conv_module(f"{place}.convs.{i}", 256, width, 1, 1)
        yield from conv_module(f"{place}.fusion_conv", 256, 4 * 256, 1, 1)


def auxiliary_head() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from linear("auxiliary_head.conv_seg", NUM_CLASSES, 256, 1, 1)
    yield from conv_module("auxiliary_head.convs.0", 256, 1024, 3, 3)


def shapes(architecture: str) -> Shapes:
    """The names and shapes of a network of mmsegmentation."""
    name = architecture.partition("_")[0]
    backbone = mit_b0() if name == "segformer" else resnet50()
    return {**dict(backbone), **dict(head(name)), **({} if name == "segformer" else dict(auxiliary_head()))}


def fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that follows from its name: of a spread that keeps features in their range."""
    if not shape:
        return torch.tensor(1)
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if name.endswith("running_var"):
        values = 1 + values**2 / 4
    elif len(shape) > 1:
        values *= (2 / prod(shape[1:])) ** 0.5
    else:
        values = values / 10 + name.endswith("weight")
    return torch.from_numpy(values.astype(np.float32))


def image() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 65, 97), np.float32))


def digest(found: Shapes) -> str:
    rows = sorted((name, list(shape)) for name, shape in found.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def write(path: Path, architecture: str, **changes: torch.Tensor | None) -> Path:
    """A checkpoint as mmsegmentation writes it; changes: tensors by name, None: left out."""
    state = {name: fill(name, shape) for name, shape in shapes(architecture).items()} | changes
    state = {name: value for name, value in state.items() if value is not None}
    torch.save({"meta": {"CLASSES": ["a", "b", "c", "d", "e"], "epoch": 1}, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("architecture", MEASURED)
def test_these_are_the_tensors_of_mmsegmentation(architecture: str):
    assert digest(shapes(architecture)) == MEASURED[architecture][0]


@pytest.mark.parametrize(
    "architecture",
    [
        SMALL,
        "deeplabv3plus_r50-d8",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("pspnet_r50-d8", "upernet_r50")),
    ],
)
def test_the_logits_are_those_of_mmsegmentation(architecture: str, tmp_path: Path):
    network, classes = load_mmseg(write(tmp_path / "zoo.pth", architecture), architecture)
    with torch.inference_mode():
        logits = network.eval()(image())
    assert logits.shape == (1, NUM_CLASSES, 65, 97)
    found = torch.stack([logits[0, :, row, column] for row, column in PIXELS])
    expected = torch.tensor(MEASURED[architecture][1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # they have five decimals
    assert classes == ["a", "b", "c", "d", "e"]


def test_classes_of_either_version(tmp_path: Path):
    """mmsegmentation 0 writes meta.CLASSES, mmsegmentation 1 meta.dataset_meta.classes."""
    path, names = write(tmp_path / "zoo.pth", SMALL), ("v", "w", "x", "y", "z")
    state = torch.load(path)["state_dict"]
    for meta, expected in (
        ({"dataset_meta": {"classes": names, "palette": None}}, list(names)),
        ({"CLASSES": names}, list(names)),
        ({"dataset_meta": None}, None),
        ({}, None),
    ):
        torch.save({"meta": meta, "state_dict": state}, path)
        assert load_mmseg(path, SMALL)[1] == expected


def test_every_architecture_has_its_names():
    """Those of MEASURED and their siblings."""
    assert {name.partition("_")[0] for name in ARCHITECTURES} == {name.partition("_")[0] for name in MEASURED}
    assert len(ARCHITECTURES) == 12


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"decode_head.fusion_conv.bn.bias": None}, "got no 'decoder.fuse.1.bias' (named as here)"),
        (
            {"decode_head.linear_c4.proj.weight": torch.zeros(1)},
            "got 'decode_head.linear_c4.proj.weight', which it does",
        ),
        ({"decode_head.conv_seg.weight": None}, "got no tensor 'decode_head.conv_seg.weight'"),
        ({"decode_head.convs.0.conv.weight": torch.zeros(256, 64, 1, 1)}, "got shape (256, 64, 1, 1) for 'decoder."),
    ],
)
def test_other_tensors_are_named(changes: dict, part: str, tmp_path: Path):
    path = write(tmp_path / "zoo.pth", SMALL, **changes)
    with pytest.raises(InputError, match=r"zoo\.pth") as error:
        load_mmseg(path, SMALL)
    assert part in str(error.value)


def test_an_unknown_architecture_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"architecture': got segformer_b0.*did you mean 'segformer_mit-b0'"):
        load_mmseg(tmp_path / "none.pth", "segformer_b0")
