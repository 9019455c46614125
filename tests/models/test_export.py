"""scripts/export.py: a checkpoint -> a graph for other programs, which is run and compared on the spot."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

import exp.main
from exp.config.evaluation import TestConfig
from exp.models import export
from exp.models.export import Graph, export_graph, make_images
from exp.predict_images import build_predictor
from exp.runtime.errors import InputError
from rankseg_rma import RankSEG, rankseg_rma
from tests.conftest import TINY, TINY_RUN

NEEDS_ONNX = "needs the packages onnx, onnxscript and onnxruntime"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A network of three iterations on crops of 32 x 32, evaluated at a temperature of 0.5."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TINY, "test.temperature=0.5", "--output_dir", str(folder), "--predict_yaml", "argmax"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *flags])
        exp.main.main()
    return folder / TINY_RUN / "checkpoints" / "iter_0000003.pt"


def require_onnx() -> None:
    for name in export.PACKAGES:
        pytest.importorskip(name, reason=NEEDS_ONNX)


def reference(checkpoint: Path, size: tuple[int, int], number: int = 1) -> tuple[Tensor, Tensor]:
    """Images of a size, and the network's logits for them, by the way that predict.py takes."""
    predictor = build_predictor(checkpoint, [], TestConfig("own", "mIoUI", crop_size=size), torch.device("cpu"))
    images = make_images(number, (3, *size)).flip(-2)  # not those that it was compared with
    with torch.no_grad():
        return images, predictor.model(images)


def test_the_networks_own_graph(script, checkpoint: Path, tmp_path: Path):
    out = tmp_path / "sub" / "network.pt2"
    status, printed, err = script("export", checkpoint, "--format", "torch_export", "--output", out)
    assert status == 0, err
    assert "logits of images of 32 x 32; logits differ by " in printed
    images, logits = reference(checkpoint, (32, 32), number=3)
    graph = torch.export.load(out).module()
    torch.testing.assert_close(graph(images), logits)
    facts = json.loads((tmp_path / "sub" / "network.pt2.json").read_text())
    assert facts["input"]["shape"] == [None, 3, 32, 32]
    assert facts["input"]["mean"] == [123.675, 116.28, 103.53]
    assert facts["classes"][:2] == ["background", "disk"]
    assert facts["rule"] is None


@pytest.mark.slow
def test_an_onnx_file_with_the_rule_in_it(script, checkpoint: Path):
    """The labels of onnxruntime are those of the ordinary rule on the network's probabilities, on an odd size."""
    require_onnx()
    import onnxruntime

    flags = ["--format", "onnx", "--predict_yaml", "rankseg_rma", "--size", 37, 51]
    status, printed, err = script("export", checkpoint, *flags)
    assert status == 0, err
    out = checkpoint.with_name("iter_0000003.rankseg_rma.onnx")
    assert f"{out}: label of images of 37 x 51; " in printed
    images, logits = reference(checkpoint, (37, 51), number=3)
    (label,) = onnxruntime.InferenceSession(out).run(None, {"image": images.numpy()})
    expected = rankseg_rma((logits / 0.5).softmax(1)).numpy()
    assert label.dtype == np.int64
    assert (label != expected).mean() <= 1e-3
    facts = json.loads(out.with_name(out.name + ".json").read_text())
    assert (facts["output"], facts["rule"]["rule"], facts["temperature"]) == ("label", "rankseg_rma", 0.5)


@pytest.mark.parametrize(("metric", "classes"), [("iou", 3), pytest.param("dice", 2, marks=pytest.mark.slow)])
def test_level_sets_in_an_onnx_file(tmp_path: Path, metric: str, classes: int):
    require_onnx()
    rule = RankSEG("rankseg_levelset", opt_metric=metric)
    traced = RankSEG("rankseg_levelset", traceable=True, opt_metric=metric)
    graphs = Graph(Colours(), traced), Graph(Colours(), rule)
    told = export_graph(*graphs, tmp_path / "graph.onnx", "onnx", (classes, 37, 51), metric == "iou")
    assert told == f"0 of {(2 if metric == 'iou' else 1) * 37 * 51} labels differ"


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["rankseg_rma", "rankseg_levelset"])
def test_a_rule_in_a_graph_on_a_gpu(gpu: torch.device, rule: str, tmp_path: Path):
    """The traceable form on the device, and a graph that was written on the CPU and moved there."""
    torch.manual_seed(0)
    path, shape, layer = tmp_path / "graph.pt2", (3, 96, 128), nn.Conv2d(3, 7, 1)
    nn.init.normal_(layer.weight, std=2.0)
    graph, ordinary = Graph(layer, RankSEG(rule, traceable=True)), Graph(layer, RankSEG(rule))
    export_graph(graph, ordinary, path, "torch_export", shape, free_batch=True)
    images = make_images(3, shape).flip(-2)
    with torch.no_grad():
        expected = ordinary(images)
        moved = move_to_device_pass(torch.export.load(path), gpu).module()
        for module in (moved, graph.to(gpu)):
            labels = module(images.to(gpu))
            assert (labels.device.type, labels.dtype) == (gpu.type, torch.int64)
            assert (labels.cpu() != expected).double().mean() <= 1e-3
    assert len(expected.unique()) > 3


def test_existing_files_are_not_overwritten(script, checkpoint: Path, tmp_path: Path):
    mine = tmp_path / "network.pt2.json"
    mine.write_text("mine")
    flags = ["--format", "torch_export", "--output", tmp_path / "network.pt2"]
    status, _, err = script("export", checkpoint, *flags)
    assert status == 2
    assert f"{mine}: got a file there already, expected none (--overwrite replaces it)" in err
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt2.json"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--predict_yaml", "rankseg_dep"], "got the rule rankseg_dep, expected one that a graph can hold: argmax, "),
        (["--predict_yaml", "rankseg_rma_dataset"], "got the rule rankseg_rma_pooled, expected one that a graph can"),
        (["--predict_yaml", "rankseg_rma_paper"], "got sees_padding=true, expected --set predict.sees_padding=false"),
        (["--size", "0", "5"], "--size: got [0, 5], expected a height and a width of 1.."),
        (["--set", "predict.opt_metric=iou"], "expected together with --predict_yaml"),
    ],
)
def test_what_no_graph_can_hold_is_told_first(script, tmp_path: Path, flags: list[str], part: str):
    status, _, err = script("export", tmp_path / "none.pt", "--format", "onnx", *flags)
    assert status == 2
    assert part in err


def test_a_missing_package_is_told_with_its_command(script, checkpoint: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    pytest.importorskip("onnx", reason=NEEDS_ONNX)
    status, _, err = script("export", checkpoint, "--format", "onnx")
    assert status == 2
    assert "got no package onnxscript, expected it: pip install onnx onnxscript onnxruntime" in err


class Colours(nn.Module):
    """Logits that are the image's own values."""

    def forward(self, image: Tensor) -> Tensor:
        return image


class Counted(nn.Module):
    """Takes a branch by the values of its image."""

    def forward(self, image: Tensor) -> Tensor:
        return image if image.sum() > 0 else -image


def test_a_graph_of_other_results_is_not_kept(tmp_path: Path):
    graph, other = Graph(Colours()), Graph(Colours(), temperature=1.0)
    other.model = nn.Softmax(1)
    path = tmp_path / "graph.pt2"
    with pytest.raises(InputError, match=r"graph.pt2: got a graph of other results \(logits differ by "):
        export_graph(graph, other, path, "torch_export", (3, 8, 8), True)
    graphs = Graph(Colours(), lambda prob: prob.argmax(1)), Graph(Colours(), lambda prob: prob.argmin(1))
    with pytest.raises(InputError, match=r"got a graph of other results \(\d+ of 128 labels differ"):
        export_graph(*graphs, path, "torch_export", (3, 8, 8), True)
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_traced_is_told_in_one_line(tmp_path: Path):
    graph = Graph(Counted())
    with pytest.raises(InputError, match=r"graph.pt2: got a network that cannot be traced \(\w+: ") as caught:
        export_graph(graph, graph, tmp_path / "graph.pt2", "torch_export", (3, 8, 8), True)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_run_on_whole_images_needs_a_size(script, checkpoint: Path, tmp_path: Path, monkeypatch):
    predictor = build_predictor(checkpoint, [], TestConfig("own", "mIoUI", whole=True), torch.device("cpu"))
    monkeypatch.setattr("exp.predict_images.build_predictor", lambda *_: predictor)
    flags = [checkpoint, "--format", "torch_export", "--output", tmp_path / "network.pt2"]
    status, _, err = script("export", *flags)
    assert status == 2
    assert "--size: got none, expected the images' height and width" in err
    status, printed, err = script("export", *flags, "--size", "24", "40")
    assert status == 0, err
    assert "logits of images of 24 x 40" in printed
