"""The paper's decoders: their parameters to the digit, what they compute, and their first weights."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from exp.models import build_model
from exp.models.decoders import initialise
from exp.models.paper_decoders import DeepLabV3, DeepLabV3Plus, PSPNet, SegFormer, UPerNet
from tests.models.test_models import NUM_CLASSES, build_without_weights, shipped

# Of the authors' networks with 21 classes and 3 channels. CPT's without its auxiliary head, which no loss reads.
PARAMETERS = {
    "cpt_swinlarge": 204_453_827 - 1_786_154,
    "deeplabv3_mobilenetv2_100": 3_797_866,
    "deeplabv3_resnet101d": 87_106_698,
    "deeplabv3_resnet18d": 13_986_762,
    "deeplabv3_resnet50d": 68_114_570,
    "deeplabv3_xception65": 82_454_618,
    "deeplabv3plus_efficientnet_b0": 4_657_314,
    "deeplabv3plus_mobilenetv2_100": 2_864_422,
    "deeplabv3plus_resnet101d": 62_589_690,
    "deeplabv3plus_resnet18d": 12_470_886,
    "deeplabv3plus_resnet34d": 22_579_046,
    "deeplabv3plus_resnet50d": 43_597_562,
    "pspnet_resnet101d": 67_969_162,
    "pspnet_resnet18d": 12_790_474,
    "pspnet_resnet50d": 48_977_034,
    "segformer_mit_b0": 5_020_554,
    "segformer_mit_b1": 15_483_370,
    "segformer_mit_b2": 26_528_234,
    "segformer_mit_b3": 46_404_074,
    "segformer_mit_b4": 63_174_634,
    "unet_mobilenetv2_100": 4_061_946,
    "unet_resnet101d": 95_065_802,
    "unet_resnet18d": 14_496_602,
    "unet_resnet50d": 76_073_674,
    "upernet_convnext_base.fb_in22k_ft_in1k_384": 117_213_610,
    "upernet_mit_b4": 91_231_210,
    "upernet_resnet101d": 85_408_906,
}
CHANNELS = (3, 4, 8, 12, 16, 24)  # of the features, the image first
WIDTH = 10
DECODERS = {
    "deeplabv3": partial(DeepLabV3, rates=(2, 4, 6)),
    "deeplabv3plus": partial(DeepLabV3Plus, rates=(2, 4, 6), low_width=5),
    "pspnet": PSPNet,
    "segformer": SegFormer,
    "upernet": partial(UPerNet, finest=2),
    "upernet without stride 4": partial(UPerNet, finest=3),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_papers_code(name: str, monkeypatch):
    model = build_without_weights(monkeypatch, shipped(name), NUM_CLASSES)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def features_of(height: int, width: int, *, last: int = 32) -> list[Tensor]:
    """Features of two images as an encoder gives them, the last of stride `last`; each size is rounded up."""
    generator = torch.Generator().manual_seed(0)
    strides = [min(2**level, last) for level in range(6)]
    return [
        torch.randn(2, channels, -(-height // stride), -(-width // stride), generator=generator)
        for channels, stride in zip(CHANNELS, strides)
    ]


@pytest.fixture(params=DECODERS)
def decoder(request) -> nn.Module:
    torch.manual_seed(0)
    made = DECODERS[request.param](CHANNELS, WIDTH)
    made.stride = {"deeplabv3": 8, "pspnet": 8, "upernet without stride 4": 8}.get(request.param, 4)
    made.last = 8 if request.param in ("deeplabv3", "deeplabv3plus", "pspnet") else 32
    return made


@pytest.mark.parametrize("size", [(64, 96), (45, 61)])
def test_a_map_of_stride_4_or_8_and_gradients_everywhere(decoder: nn.Module, size: tuple[int, int]):
    features = features_of(*size, last=decoder.last)
    out = decoder(features)
    assert out.shape == (2, WIDTH, *(-(-side // decoder.stride) for side in size))
    out.square().mean().backward()
    assert [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_channels_last_gives_the_same(decoder: nn.Module):
    features = features_of(45, 61, last=decoder.last)
    expected = decoder.eval()(features)
    decoder.to(memory_format=torch.channels_last)
    found = decoder([x.to(memory_format=torch.channels_last) for x in features])
    torch.testing.assert_close(found, expected)


def conv(layer: nn.Sequential, x: Tensor, **keys: int) -> Tensor:
    """Convolution, norm by the running statistics and ReLU, from the weights alone."""
    x = F.conv2d(x, layer[0].weight, **keys)
    mean, var = layer[1].running_mean[:, None, None], layer[1].running_var[:, None, None]
    x = (x - mean) / (var + layer[1].eps).sqrt()
    return (x * layer[1].weight[:, None, None] + layer[1].bias[:, None, None]).clamp(min=0)


def separable(layer: nn.Sequential, x: Tensor, **keys: int) -> Tensor:
    return conv(layer[1], conv(layer[0], x, groups=x.shape[1], **keys))


def stirred(decoder: nn.Module) -> nn.Module:
    """In evaluation mode, with running statistics and norms that are not those of the start."""
    for layer in decoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight, layer.bias, layer.running_mean):
                nn.init.normal_(values)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return decoder.eval()


def resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


@torch.inference_mode()
def test_deeplabv3plus_word_for_word():
    """Pool, 1x1 and atrous branches, separable but for the pool; a full 3x3; the low map; two separable ones."""
    decoder, features = stirred(DECODERS["deeplabv3plus"](CHANNELS, WIDTH)), features_of(40, 56, last=8)
    low, high = features[2], features[-1]
    pool, first, *atrous = decoder.aspp.branches
    maps = [conv(pool[1], high.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *high.shape[-2:])]
    maps += [separable(first, high)]
    maps += [separable(branch, high, padding=rate, dilation=rate) for branch, rate in zip(atrous, (2, 4, 6))]
    x = conv(decoder.aspp.fuse, torch.cat(maps, dim=1), padding=1)
    x = torch.cat([resized(x, low), conv(decoder.low, low)], dim=1)
    for layer in decoder.fuse:
        x = separable(layer, x, padding=1)
    torch.testing.assert_close(decoder(features), x)


@torch.inference_mode()
def test_pspnet_word_for_word():
    """Bins of 1, 2, 3 and 6 a side, a norm in each of them; then 3x3 over them and the map."""
    decoder, features = stirred(PSPNet(CHANNELS, WIDTH)), features_of(48, 96, last=8)
    x = features[-1]
    maps = [x]
    for bins, branch in zip((1, 2, 3, 6), decoder.pyramid.branches):
        cells = F.avg_pool2d(x, (x.shape[-2] // bins, x.shape[-1] // bins))
        maps.append(resized(conv(branch[1], cells), x))
    torch.testing.assert_close(decoder(features), conv(decoder.pyramid.fuse, torch.cat(maps, dim=1), padding=1))


@torch.inference_mode()
def test_segformer_word_for_word():
    """Every level has its norm and activation before it is resized to stride 4; the coarsest is the first."""
    decoder, features = stirred(SegFormer(CHANNELS, WIDTH)), features_of(64, 96)
    maps = [resized(conv(level, x), features[2]) for level, x in zip(decoder.levels, features[2:])]
    torch.testing.assert_close(decoder(features), conv(decoder.fuse, torch.cat(maps[::-1], dim=1)))


@torch.inference_mode()
def test_upernet_is_the_librarys_without_its_layer_norms():
    """To the bit; and where stride 4 is left out, it is that of the features from stride 8 on."""
    library = stirred(UPerNetDecoder(CHANNELS, decoder_channels=WIDTH))
    library.feature_norms = nn.ModuleList()
    own, features = UPerNet(CHANNELS, WIDTH, finest=2).eval(), features_of(64, 96)
    own.load_state_dict(dict(zip(own.state_dict(), library.state_dict().values(), strict=True)))
    assert torch.equal(own(features), library(list(features)))
    coarser, channels = UPerNet(CHANNELS, WIDTH, finest=3).eval(), (CHANNELS[0], *CHANNELS[2:])
    library = UPerNetDecoder(channels, decoder_channels=WIDTH).eval()
    library.feature_norms = nn.ModuleList()
    coarser.load_state_dict(dict(zip(coarser.state_dict(), library.state_dict().values(), strict=True)))
    assert torch.equal(coarser(features), library([features[0], *features[2:]]))


def test_upernet_skips_two_maps_of_any_encoder():
    """On timm's ConvNeXt, which has none of stride 2, that is the map of stride 4, too; MiT's counts from stride 2."""
    keys = {"decoder_channels": 16, "aux_channels": 8}
    for name, changes, stride in (
        ("upernet_convnext_base.fb_in22k_ft_in1k_384", {"encoder": "convnext_atto"}, 8),
        ("upernet_mit_b4", {"encoder": "mit_b0"}, 4),
        ("upernet_resnet101d", {"encoder": "resnet18d"}, 4),
    ):
        model = build_model(shipped(name, **keys, **changes), 2).eval()
        with torch.inference_mode():
            assert model.decoder(model.encoder(torch.randn(1, 3, 64, 64))).shape[-1] == 64 // stride


def test_first_weights_are_those_of_the_papers_code():
    """Standard deviations of its heads (Xavier) and of its auxiliary convolution (Kaiming); no bias to begin with."""
    torch.manual_seed(0)
    model = build_model(shipped("pspnet_resnet50d"), NUM_CLASSES)
    classifier, convolution = model.head[-1], model.aux_head[0]
    assert classifier.weight.std().item() == pytest.approx(0.0614, rel=0.03)
    assert convolution.weight.std().item() == pytest.approx(0.0147, rel=0.01)
    assert not any(head[-1].bias.any() for head in (model.head, model.aux_head))
    fuse = model.decoder.pyramid.fuse[0].weight
    assert fuse.abs().max().item() == pytest.approx((6 / (4096 * 9)) ** 0.5, rel=1e-3)
    library = build_model(shipped("segformer_mit_b0", variant="library"), NUM_CLASSES)
    assert library.head[-1].bias.any()  # PyTorch's own, as before


def test_linear_layers_and_biases():
    layers = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(30, 70), nn.BatchNorm2d(4))
    nn.init.constant_(layers[2].weight, 0.5)
    initialise(layers)
    assert layers[1].weight.abs().max().item() == pytest.approx((6 / 100) ** 0.5, rel=0.01)
    assert not layers[0].bias.any()
    assert not layers[1].bias.any()
    assert layers[2].weight.eq(0.5).all()
