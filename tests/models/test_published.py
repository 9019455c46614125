"""Networks that others trained: small ones that each library made and saved, read back through a YAML of ours."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchvision
import yaml
from torch import Tensor, nn

from exp.config.experiment import load_published
from exp.config.published import weights_sha256
from exp.data.sets.ade20k import ADE20K
from exp.models.published import Published, build_published
from exp.runtime.errors import InputError

CLASSES = ["sky", "road", "tree", "car"]
ODD = (77, 93)  # height, width


def write_yaml(path: Path, **keys: object) -> str:
    path.write_text(yaml.safe_dump({"classes": CLASSES, **keys}))
    return str(path)


def published(path: Path, asked: list[str] | None = None, **keys: object) -> Published:
    """asked: the classes of a data set; None: those of the YAML."""
    return build_published(load_published(write_yaml(path / "network.yaml", **keys)), asked)


def stirred(net: nn.Module) -> nn.Module:
    """Random weights and running statistics of a size that gives logits worth comparing, in eval mode."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return net.eval()


def image(size: tuple[int, int] = ODD, number: int = 2) -> Tensor:
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(1))


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 1e-3
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# segmentation_models_pytorch


@pytest.fixture
def smp_folder(tmp_path: Path) -> Path:
    net = smp.Segformer("mit_b0", encoder_weights=None, decoder_segmentation_channels=16, classes=len(CLASSES))
    stirred(net).save_pretrained(tmp_path / "net")
    return tmp_path / "net"


@torch.inference_mode()
def test_a_network_of_smp(smp_folder: Path, tmp_path: Path):
    """The library refuses sizes that are no multiple of 32; ours pads with zeros, the mean colour."""
    ours, theirs = published(tmp_path, source="smp", weights=str(smp_folder)), smp.from_pretrained(smp_folder).eval()
    assert_close(ours(image((64, 96))), theirs(image((64, 96))))
    padded = F.pad(image(), (0, 96 - ODD[1], 0, 96 - ODD[0]))
    assert_close(ours(image()), theirs(padded)[..., : ODD[0], : ODD[1]])


@torch.inference_mode()
def test_a_network_of_smp_that_takes_any_size(tmp_path: Path):
    net = smp.Unet("mobileone_s0", encoder_weights=None, decoder_channels=[8] * 5, classes=len(CLASSES))
    stirred(net).save_pretrained(tmp_path / "net")
    theirs = smp.from_pretrained(tmp_path / "net").eval()
    assert_close(published(tmp_path, source="smp", weights=str(tmp_path / "net"))(image()), theirs(image()))


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        (
            "config.json",
            {"_model_class": "create_model"},
            "config.json: got the network 'create_model', expected one of",
        ),
        ("config.json", {"_model_class": "Unet", "activation": "sigmoid"}, "expected a network that gives logits"),
        (
            "config.json",
            {"_model_class": "Unet", "encoder_name": "no_such"},
            "config.json: got a file that cannot be read",
        ),
        ("model.safetensors", None, "model.safetensors: no such file"),
        ("config.json", None, "config.json: no such file"),
    ],
)
def test_folders_of_smp_that_are_not(smp_folder: Path, tmp_path: Path, file: str, content: dict | None, part: str):
    (smp_folder / file).unlink()
    if content is not None:
        (smp_folder / file).write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        published(tmp_path, source="smp", weights=str(smp_folder))
    assert part in str(error.value)
    assert "\n" not in str(error.value)


# torchvision


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
@torch.inference_mode()
def test_a_network_of_torchvision(name: str, tmp_path: Path):
    """With the auxiliary classifier in the file, which evaluation does not need."""
    keys = {} if name.startswith("lraspp") else {"aux_loss": True}
    net = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=len(CLASSES), **keys)
    torch.save(stirred(net).state_dict(), tmp_path / "net.pth")
    ours = published(tmp_path, source="torchvision", weights=str(tmp_path / "net.pth"), architecture=name)
    assert_close(ours(image()), net(image())["out"])


def test_weight_names_of_torchvision_stand_for_its_files(tmp_path: Path, monkeypatch):
    """The file in PyTorch's cache is taken; torchvision's own names of the classes are VOC's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "lraspp_mobilenet_v3_large"
    net = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=21)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path / "hub" / "checkpoints" / "lraspp_mobilenet_v3_large-d234d4ea.pth")
    ours = build_published(load_published(f"published/torchvision_voc:{name}"), None)
    assert ours.network.classes[:2] == ["__background__", "aeroplane"]


# transformers


def transformers_networks() -> dict[str, tuple]:
    """By name: how it is made, and the size that its input is fixed to."""
    tr = pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    stages = {"depths": [1] * 4, "out_features": [f"stage{i}" for i in range(1, 5)]}
    vit = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    vit |= {"image_size": 64, "patch_size": 16}
    convnext = tr.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], **stages)

    def swin() -> object:
        return tr.SwinConfig(embed_dim=8, num_heads=[1] * 4, window_size=4, **stages)

    wide = {"mask_feature_size": 32, **names}
    segformer = {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1] * 4}
    dpt = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    vit_mobile = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]}
    detr = {"d_model": 16, "decoder_layers": 1, "encoder_layers": 1, "decoder_attention_heads": 2, "num_queries": 5}
    mask2former = {"feature_size": 32, "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}
    return {
        "segformer": (
            lambda: tr.SegformerForSemanticSegmentation(
                tr.SegformerConfig(decoder_hidden_size=16, **segformer, **names)
            ),
            None,
        ),
        "upernet": (
            lambda: tr.UperNetForSemanticSegmentation(
                tr.UperNetConfig(
                    backbone_config=convnext, hidden_size=16, auxiliary_in_channels=24, auxiliary_channels=8, **names
                )
            ),
            None,
        ),
        "beit": (
            lambda: tr.BeitForSemanticSegmentation(
                tr.BeitConfig(out_indices=[1, 2, 3, 4], auxiliary_channels=8, **vit, **names)
            ),
            (64, 64),
        ),
        "dpt": (lambda: tr.DPTForSemanticSegmentation(tr.DPTConfig(**dpt, **vit, **names)), (64, 64)),
        "mobilenet_v2": (lambda: tr.MobileNetV2ForSemanticSegmentation(tr.MobileNetV2Config(**names)), None),
        "mobilevit": (
            lambda: tr.MobileViTForSemanticSegmentation(
                tr.MobileViTConfig(num_attention_heads=2, aspp_out_channels=16, **vit_mobile, **names)
            ),
            None,
        ),
        "mask2former": (
            lambda: tr.Mask2FormerForUniversalSegmentation(
                tr.Mask2FormerConfig(backbone_config=swin(), num_attention_heads=2, **mask2former, **wide)
            ),
            None,
        ),
        "maskformer": (
            lambda: tr.MaskFormerForInstanceSegmentation(
                tr.MaskFormerConfig(
                    backbone_config=swin(), fpn_feature_size=32, decoder_config=tr.DetrConfig(**detr), **wide
                )
            ),
            None,
        ),
        "eomt": (
            lambda: tr.EomtForUniversalSegmentation(
                tr.EomtConfig(
                    hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=64, num_blocks=1,
                    num_queries=5, num_upscale_blocks=1, **names,
                )
            ),
            (64, 64),
        ),
    }  # fmt: skip


def saved_transformers(name: str, tmp_path: Path):
    """A random network -> what it gives for an image of its input's size, and the same network by our YAML."""
    make, size = transformers_networks()[name]
    net = stirred(make())
    net.save_pretrained(tmp_path / "net")
    ours = published(tmp_path, source="transformers", weights=str(tmp_path / "net"), size=size and list(size))
    seen = image() if size is None else F.interpolate(image(), size, mode="bilinear", antialias=True)
    return net(pixel_values=seen), ours


@pytest.mark.parametrize("name", ["segformer", "upernet", "beit", "dpt", "mobilenet_v2", "mobilevit"])
@torch.inference_mode()
def test_a_network_of_transformers(name: str, tmp_path: Path):
    out, ours = saved_transformers(name, tmp_path)
    expected = resized(out.logits, ODD)
    assert_close(ours(image()) / expected.abs().max(), expected / expected.abs().max())


@pytest.mark.parametrize("name", ["mask2former", "maskformer", "eomt"])
@torch.inference_mode()
def test_mask_queries_are_summed(name: str, tmp_path: Path, caplog):
    """As post_process_semantic_segmentation does; the softmax of the logits is that sum by its own sum."""
    out, ours = saved_transformers(name, tmp_path)
    assert "not calibrated" in caplog.text
    classes, masks = out.class_queries_logits.softmax(-1)[..., :-1], out.masks_queries_logits.sigmoid()
    summed = resized(torch.einsum("bqc,bqhw->bchw", classes, masks), ODD)
    assert_close(ours(image()).softmax(1), summed / summed.sum(1, keepdim=True))


def test_classes_are_compared_with_those_of_the_files(tmp_path: Path):
    make, _ = transformers_networks()["segformer"]
    make().save_pretrained(tmp_path / "net")
    keys = {"source": "transformers", "weights": str(tmp_path / "net")}
    with pytest.raises(InputError, match="got 'road' for output 0, expected 'sky', as"):
        published(tmp_path, **keys, classes=["road", "sky", "tree", "car"])
    with pytest.raises(InputError, match=r"got 3 names .* expected 4"):
        published(tmp_path, **keys, classes=CLASSES[:3])
    with pytest.raises(InputError, match="got 0 outputs of the class 'lane' of the data set"):
        published(tmp_path, ["sky", "lane"], **keys)
    assert published(tmp_path, ["Tree", "sky"], **keys, names={"tree": "Tree"}).places == [2, 0]


# ONNX


def onnx_file(path: Path, size: tuple[int, int] | None, activation: str | None, channels: int = 4) -> np.ndarray:
    """A graph of one 1x1 convolution, and an activation -> its weights (channels, 3)."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (pip install onnx)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install onnxruntime)")
    helper, weights = onnx.helper, np.random.default_rng(0).standard_normal((channels, 3), np.float32)
    nodes = [helper.make_node("Conv", ["image", "weights"], ["logits" if activation else "out"])]
    if activation:
        nodes.append(
            helper.make_node(activation, ["logits"], ["out"], **({"axis": 1} if activation == "Softmax" else {}))
        )
    shape = [1, 3, *(size or ("height", "width"))]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, channels, *shape[2:]])],
        [helper.make_tensor("weights", onnx.TensorProto.FLOAT, (channels, 3, 1, 1), weights.ravel())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return weights


@torch.inference_mode()
def test_an_onnx_file_of_any_size(tmp_path: Path):
    weights = onnx_file(tmp_path / "net.onnx", None, None)
    ours = published(tmp_path, source="onnx", weights=str(tmp_path / "net.onnx"))
    assert_close(ours(image()), F.conv2d(image(), torch.from_numpy(weights)[..., None, None]))
    other = onnx_file(tmp_path / "net.onnx", None, None, channels=2)
    assert len(other) == 2
    again = published(tmp_path, source="onnx", weights=str(tmp_path / "net.onnx"), classes=["a", "b"])
    assert not torch.equal(ours.state_dict()["network.sha256"], again.state_dict()["network.sha256"])


@torch.inference_mode()
def test_an_onnx_file_of_probabilities_and_a_fixed_size(tmp_path: Path):
    """Its probabilities are resized, not their logarithms; one channel is that of the second class."""
    weights = onnx_file(tmp_path / "net.onnx", (32, 48), "Sigmoid", channels=1)
    keys = {"source": "onnx", "weights": str(tmp_path / "net.onnx"), "classes": ["no", "yes"]}
    ours = published(tmp_path, **keys, size=[32, 48], outputs="probabilities", output="out")
    small = F.interpolate(image(), (32, 48), mode="bilinear", antialias=True)
    prob = resized(F.conv2d(small, torch.from_numpy(weights)[..., None, None]).sigmoid(), ODD)
    assert_close(ours(image()).softmax(1), torch.cat([1 - prob, prob], dim=1))


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"size": [64, 64]}, "key 'size': got (64, 64), expected [32, 48], the input of"),
        ({}, "key 'size': got None, expected [32, 48], the input of"),
        ({"size": [32, 48], "output": "logit"}, "key 'output': got logit, expected an output of"),
        ({"size": [32, 48], "classes": ["a", "b"]}, "got 2 names (['a', 'b']), expected 4"),
    ],
)
def test_onnx_yamls_that_do_not_fit(keys: dict, part: str, tmp_path: Path):
    onnx_file(tmp_path / "net.onnx", (32, 48), "Softmax")
    with pytest.raises(InputError) as error:
        published(tmp_path, **{"source": "onnx", "weights": str(tmp_path / "net.onnx"), **keys})
    assert part in str(error.value)


# What is refused


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("the file ran code",))


@pytest.mark.parametrize("source", ["torchvision", "mmseg", "onnx", "transformers"])
def test_a_pickle_runs_nothing(source: str, tmp_path: Path, capsys):
    if source in ("onnx", "transformers"):
        pytest.importorskip({"onnx": "onnxruntime"}.get(source, source), reason=f"{source} is not installed")
    path = tmp_path / "net.pth"
    architecture = {"torchvision": "fcn_resnet50", "mmseg": "segformer_mit-b0"}.get(source)
    if source == "transformers":
        make, _ = transformers_networks()["segformer"]
        make().save_pretrained(tmp_path / "net")
        (tmp_path / "net" / "model.safetensors").unlink()
        path = tmp_path / "net" / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Evil()))
    weights = str(path.parent if source == "transformers" else path)
    with pytest.raises(InputError) as error:
        published(tmp_path, source=source, weights=weights, architecture=architecture)
    assert "the file ran code" not in "".join(capsys.readouterr())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("source", "package"), [("transformers", "transformers"), ("onnx", "onnxruntime")])
def test_a_package_that_is_not_installed_is_named(source: str, package: str, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=f"expected it installed: pip install {package}"):
        published(tmp_path, source=source, weights=str(tmp_path / "net.onnx"))


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"means": [0, 0, 0]}, "network.yaml: unknown key 'means'; did you mean 'mean'?"),
        ({"std": [1, 0, 1]}, "key 'std': got (1.0, 0.0, 1.0)"),
        ({"mean": [123.675, 116.28, 103.53]}, "key 'mean': got (123.675, 116.28, 103.53), expected values in [0, 1]"),
        ({"window": [512]}, "key 'window': got [512] (list)"),
        ({"stride": [5, 5]}, "key 'stride': got (5, 5), expected null where the window is the whole image"),
        ({"source": "torchvision"}, "key 'architecture': got None, expected a name with torchvision and mmseg"),
        ({"outputs": "probabilities"}, "key 'outputs': got 'probabilities', expected no such key but with onnx"),
        ({"source": "onnx", "revision": "v1"}, "key 'revision': got 'v1', expected no such key but with smp and trans"),
        ({"source": "keras"}, "key 'source': got 'keras' (str), expected one of smp, torchvision"),
        ({"classes": "ade20k"}, "key 'classes': got 'ade20k' (str), expected a list of text"),
    ],
)
def test_yamls_that_are_not_right(keys: dict, part: str, tmp_path: Path):
    with pytest.raises(InputError) as error:
        load_published(write_yaml(tmp_path / "network.yaml", **{"source": "smp", "weights": "x", **keys}))
    assert part in str(error.value)


def test_a_hub_that_is_not_reached_is_told_in_one_line(tmp_path: Path, monkeypatch):
    """With what to fetch, and where to put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*args: object, **keys: object) -> None:
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(InputError) as error:
        build_published(load_published("published/smp_segformer_ade20k:b0"), None)
    place = "https://huggingface.co/smp-hub/segformer-b0-512x512-ade-160k/tree/main"
    assert f"fetch config.json and model.safetensors (or pytorch_model.bin) of {place}" in str(error.value)
    with pytest.raises(InputError) as error:
        build_published(load_published("published/torchvision_voc"), None)
    assert f"fetch it to {tmp_path}/hub/checkpoints/deeplabv3_resnet101_coco-586e9e4e.pth" in str(error.value)
    assert "\n" not in str(error.value)


@torch.inference_mode()
def test_a_revision_is_what_the_hub_is_asked_for(smp_folder: Path, tmp_path: Path, monkeypatch, caplog):
    """And part of what is recorded; without one the record is that of before there was the key."""
    asked = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(smp_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    keys = {"source": "smp", "weights": "somebody/net"}
    pinned = published(tmp_path, **keys, revision="0123abc")
    assert "looking for https://huggingface.co/somebody/net/tree/0123abc" in caplog.text
    assert torch.equal(published(tmp_path, **keys)(image()), pinned(image()))
    assert asked == [("somebody/net", "0123abc"), ("somebody/net", None)]
    newest, old = (
        load_published(write_yaml(tmp_path / "x.yaml", **keys, **more)).identity for more in ({}, {"revision": "v1"})
    )
    assert old == {**newest, "revision": "v1"}


def test_the_content_of_a_network_is_that_of_the_files_that_are_read(smp_folder: Path, tmp_path: Path):
    before = weights_sha256(smp_folder)
    assert weights_sha256(smp_folder.rename(tmp_path / "moved")) == before
    (tmp_path / "moved" / "README.md").write_text("changed")
    assert weights_sha256(tmp_path / "moved") == before
    with open(tmp_path / "moved" / "config.json", "a") as file:
        file.write(" ")
    assert weights_sha256(tmp_path / "moved") != before


def test_grey_images_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="got images of 1 channel"):
        build_published(load_published(write_yaml(tmp_path / "x.yaml", source="smp", weights="x")), None, 1)


def test_names_of_data_sets_stand_for_their_classes(tmp_path: Path):
    """150 classes of ADE20K behind a background, of which its data set has none."""
    weights = onnx_file(tmp_path / "net.onnx", None, None, channels=151)
    config = load_published(
        write_yaml(
            tmp_path / "x.yaml", source="onnx", weights=str(tmp_path / "net.onnx"), classes=["background", "ade20k"]
        )
    )
    own = build_published(config, None)
    assert own.places == list(range(151))
    ours = build_published(config, ADE20K.classes)
    assert ours.places == list(range(1, 151))
    with torch.inference_mode():
        expected = F.conv2d(image(), torch.from_numpy(weights)[..., None, None])[:, 1:]
        assert_close(ours(image()), expected)
