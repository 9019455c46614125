"""Networks that others trained in the programs: evaluation, prediction, fine-tuning, and the plan of checks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from PIL import Image
from torch import nn

from exp.config.experiment import check_files, load_published, training_digest
from exp.config.published import weights_sha256
from exp.data.sets.pascal_voc import PascalVOC
from exp.data.sets.shapes import Shapes
from exp.models import build_model, sources
from exp.models.weights import load_encoder_weights
from exp.reproduction import plans
from exp.reproduction.existing import Existing, differences
from exp.reproduction.job import _load_config
from exp.reproduction.measured import Measured
from exp.reproduction.plans import table_jobs, with_settings
from exp.reproduction.report.published_networks import evaluated_networks
from exp.runtime.errors import InputError
from tests.config.test_config import compose
from tests.conftest import ROOT, write_png
from tests.evaluation.test_evaluate_gpu import assert_same_but_for_ties

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
NAME = "lraspp_mobilenet_v3_large"
TINY_DATA = ("--data_yaml", "shapes", "--set", "data.val_samples=3", "schedule.num_workers=0")


def make_network(num_classes: int) -> nn.Module:
    """A network of torchvision with random weights that make it decide for all classes, in eval mode."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(NAME, weights=None, weights_backbone=None, num_classes=num_classes).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return net


def write_network(folder: Path, net: nn.Module, **keys: object) -> Path:
    """The network's .pth and its YAML -> the latter."""
    torch.save(net.state_dict(), folder / "net.pth")
    content = {"source": "torchvision", "architecture": NAME, "weights": str(folder / "net.pth"), **keys}
    path = folder / "network.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def theirs(net: nn.Module, pixels: torch.Tensor, short_side: int | None = None) -> torch.Tensor:
    """(3, H, W) uint8 -> (1, C, H, W) probabilities by the library alone."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    image, size = ((pixels / 255 - mean) / std)[None], pixels.shape[-2:]
    if short_side is not None:
        new = [round(side * short_side / min(size)) for side in size]
        image = F.interpolate(image, new, mode="bilinear", antialias=short_side < min(size))
    with torch.inference_mode():
        logits = net(image)["out"]
    return F.interpolate(logits, size, mode="bilinear", antialias=logits.shape[-1] > size[-1]).softmax(1)


@pytest.fixture
def shapes_network(tmp_path: Path) -> tuple[nn.Module, Path]:
    net = make_network(len(Shapes.classes))
    return net, write_network(tmp_path, net, classes=["shapes"], mean=list(MEAN), std=list(STD), data="shapes")


@pytest.mark.parametrize("short_side", [None, 150])
def test_probabilities_are_the_librarys(program, shapes_network, tmp_path: Path, short_side: int | None):
    """Whole images by the YAML's normalisation, whatever that of the data YAML is; no checkpoint is asked for."""
    net, path = shapes_network
    more = () if short_side is None else (f"model.short_side={short_side}",)
    flags = ("--test-only", "--model_yaml", path, *TINY_DATA, *more, "--save_prob", 2, "--output_dir", tmp_path / "out")
    status, _, err = program(*flags)
    assert status == 0, err
    run = tmp_path / "out" / "network.shapes.published"
    dataset = Shapes(None, "val", max_samples=3)
    for i in range(2):
        found = np.load(run / "probabilities" / f"{dataset.samples[i].name}.npy")
        expected = theirs(net, dataset[i].image, short_side)[0].numpy()
        assert len(np.unique(expected.argmax(0))) > 1
        np.testing.assert_allclose(found, expected, atol=1e-5 if short_side is None else 5e-5)
    result = json.loads((run / "results" / "argmax.json").read_text())
    assert result["training"]["published"]["weights"].endswith("net.pth")
    assert result["config"]["test"]["whole"]
    assert result["config"]["data"]["mean"] == list(MEAN)


@pytest.mark.gpu
def test_probabilities_on_a_gpu_are_the_cpus_but_for_ties(gpu: torch.device, program, shapes_network, tmp_path: Path):
    _, path = shapes_network
    rules = ("argmax", "rankseg_rma", "rankseg_levelset")
    for device, folder in (("cpu", "one"), (gpu.type, "two")):
        flags = ("--test-only", "--device", device, "--model_yaml", path, "--output_dir", tmp_path / folder)
        status, _, err = program(*flags, "--predict_yaml", *rules, *TINY_DATA, "schedule.tf32=off")
        assert status == 0, err
    one, two = (tmp_path / folder / "network.shapes.published" / "results" for folder in ("one", "two"))
    assert_same_but_for_ties(two, one, rules)


def test_windows_of_the_owner_give_way_to_those_of_the_user(program, shapes_network, tmp_path: Path):
    _, path = shapes_network
    flags = ("--test-only", "--model_yaml", path, "--print_config", *TINY_DATA)
    for settings, expected in (
        (("model.window=[64,96]",), {"crop_size": [64, 96], "stride": [43, 64]}),
        (("model.window=[64,96]", "test.crop_size=[32,32]"), {"crop_size": [32, 32], "stride": [22, 22]}),
        (("model.window=[64,96]", "test.whole=true"), {"crop_size": None, "stride": None, "whole": True}),
    ):
        test = yaml.safe_load(program(*flags, *settings)[1])["test"]
        assert {key: test[key] for key in expected} == expected
        assert ("whole" in test) == ("whole" in expected)
    for settings, expected in ((("test.short_side=null",), 64), (("model.short_side=null",), None)):
        test = yaml.safe_load(program(*flags, "model.short_side=64", *settings)[1])["test"]
        assert test.get("short_side") == expected


def test_training_such_a_network_is_refused(program, shapes_network, tmp_path: Path):
    _, path = shapes_network
    status, _, err = program("--model_yaml", path, *TINY_DATA, "--output_dir", tmp_path)
    assert status == 2
    assert "got a network that others trained, expected it together with --test-only" in err
    status, _, err = program("--test-only", "--model_checkpoint", "x.pt", "--model_yaml", path, *TINY_DATA)
    assert status == 2
    assert "--model_checkpoint x.pt: expected none with a network that others trained" in err


def test_such_a_run_has_a_page(program, script, shapes_network, tmp_path: Path):
    """By the command that the run ends with; and the report of the folder above has it once."""
    _, path = shapes_network
    flags = ("--test-only", "--model_yaml", path, *TINY_DATA, "--predict_yaml", "argmax", "rankseg_levelset")
    status, out, err = program(*flags, "--output_dir", tmp_path / "out")
    assert status == 0, err
    run = tmp_path / "out" / "network.shapes.published"
    assert f"report.py {run}" in out
    status, _, err = script("report", run)
    assert status == 0, err
    title = f"torchvision {NAME} net.pth, shapes"
    assert (run / "report" / "tables.md").read_text().startswith(f"# {title}\n")
    assert f"<title>{title}</title>" in (run / "report" / "index.html").read_text()
    assert script("report", tmp_path / "out")[0] == 0
    table = (tmp_path / "out" / "report" / "tables.md").read_text()
    assert table.count("From `network.shapes.published`.") == 1
    assert f"| {title} | argmax |" in " ".join(table.split())


@pytest.mark.slow
def test_two_processes_find_the_same(program, shapes_network, tmp_path: Path):
    _, path = shapes_network
    flags = ["--device", "cpu", "--test-only", "--model_yaml", path, "--predict_yaml", "argmax", "rankseg_levelset"]
    flags += [*TINY_DATA, "--output_dir"]
    status, _, err = program(*flags, tmp_path / "1")
    assert status == 0, err
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "exp/main.py"]
    done = subprocess.run([*map(str, [*launch, *flags, tmp_path / "2"])], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / name / "network.shapes.published" / "results" for name in "12")
    for rule in ("argmax", "rankseg_levelset"):
        assert (one / f"{rule}.csv").read_bytes() == (two / f"{rule}.csv").read_bytes()


def test_masks_of_images_of_ones_own(script, shapes_network, tmp_path: Path):
    """Decided by the library's probabilities, under the names of the data set that the YAML names."""
    net, path = shapes_network
    pixels = Shapes(None, "val", max_samples=1)[0].image
    write_png(tmp_path / "photo.png", np.ascontiguousarray(pixels.permute(1, 2, 0)))
    flags = (path, tmp_path / "photo.png", "--predict_yaml", "argmax", "--output_dir", tmp_path / "out")
    status, _, err = script("predict", *flags)
    assert status == 0, err
    mask = np.array(Image.open(tmp_path / "out" / "masks" / "argmax" / "photo.png"))
    assert (mask == theirs(net, pixels)[0].argmax(0).numpy()).mean() > 0.999
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert [row["name"] for row in classes] == list(Shapes.classes)
    other = ("--set", 'model.classes=["a","b","c","d","e","f"]', "model.data=null", "--overwrite")
    status, _, err = script("predict", *flags, *other)
    assert status == 0, err
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert [row["name"] for row in classes] == list("abcdef")
    keys = {"label_map": {10 * i: i for i in range(6)}, "palette": [[i, 0, 9] for i in range(6)]}
    own = {"dataset": "folder", "images": "images", "labels": "labels", "classes": list("abcdef"), **keys}
    own |= {"train_split": "train", "val_split": "val", "crop_size": [64, 64]}
    (tmp_path / "folder.yaml").write_text(yaml.safe_dump(own))
    other = ("--set", 'model.classes=["a","b","c","d","e","f"]', f"model.data={tmp_path / 'folder.yaml'}")
    status, _, err = script("predict", *flags, *other, "--overwrite")
    assert status == 0, err
    assert json.loads((tmp_path / "out" / "classes.json").read_text())[2] == {
        "value": 20, "name": "c", "colour": [2, 0, 9],
    }  # fmt: skip
    assert (np.array(Image.open(tmp_path / "out" / "masks" / "argmax" / "photo.png")) == 10 * mask).all()


def test_a_training_starts_from_the_encoder(tmp_path: Path, monkeypatch):
    """ResNet-18 of timm has torchvision's names; a network without them is refused by the first that is missing."""
    net = nn.ModuleDict({"backbone": torchvision.models.resnet18(weights=None), "classifier": nn.Conv2d(512, 2, 1)})

    class Source(sources.Source):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

    path = write_network(tmp_path, net, classes=["a", "b"])
    monkeypatch.setitem(sources.SOURCES, "torchvision", lambda config, path: Source())
    settings = ["model.encoder=resnet18", "model.aux_channels=8", "model.decoder_channels=[8,8,8,8,8]"]
    configs = [compose(*settings, f"model.pretrained={value}") for value in (path, "true")]
    check_files(configs[0], from_scratch=True)
    model = build_model(configs[0].model, 3)
    assert torch.equal(model.encoder.model.conv1.weight, net["backbone"].conv1.weight)
    assert torch.equal(model.encoder.model.layer4[1].bn2.weight, net["backbone"].layer4[1].bn2.weight)
    assert len({training_digest(config.to_dict()) for config in configs}) == 2
    with pytest.raises(InputError, match=r"network\.yaml: got no tensor 'conv_stem.weight' of the encoder"):
        load_encoder_weights(nn.ModuleDict({"conv_stem": nn.Conv2d(3, 8, 3)}), str(path))
    (tmp_path / "other.yaml").write_text("decoder: unet")
    with pytest.raises(InputError, match="missing key 'encoder'"):
        check_files(compose(f"model.pretrained={tmp_path / 'other.yaml'}"), from_scratch=True)


# The plan


@pytest.fixture
def plan(monkeypatch, tmp_path: Path, voc_dir: Path):
    """A function: keys of the YAML -> flags of scripts/reproduce.py, with that network as the only one of the plan."""
    net = make_network(21)

    def make(**keys: object) -> tuple[object, ...]:
        path = write_network(tmp_path, net, classes=["pascal_voc"], data="pascal_voc", **keys)
        monkeypatch.setattr(plans, "published_networks", lambda: [str(path)])
        _load_config.cache_clear()  # of the YAML as it was before
        return ("published", "--data_dir", voc_dir, "--output_dir", tmp_path / "out")

    return make


def test_the_plan_says_what_it_takes(script, plan):
    keys = {"megabytes": 12.5, "licence": "BSD", "miou": 57.9, "miou_on": "other images", "like": "unet_resnet18d"}
    status, out, err = script("reproduce", *plan(**keys), "--dry_run")
    assert status == 0, err
    assert "12.5 MB, licence BSD; its owner: mIoU 57.9 on other images; of the architecture: unet_resnet18d" in out
    assert "1 networks that others trained, 0 of them done" in out
    status, out, _ = script("reproduce", *plan(), "--dry_run")
    assert "size not stated, licence not stated; its owner: mIoU not stated; of the architecture: no network" in out


def test_every_published_network_has_its_facts():
    networks = plans.published_networks()
    assert len(networks) == 84
    for like in {load_published(name).like for name in networks} - {None}:
        assert (ROOT / "configs" / "model" / f"{like}.yaml").is_file()


def facts_table() -> list[str]:
    """The rows of docs/models.md: networks of the architectures that are here, by these."""
    rows = []
    for name in plans.published_networks():
        model = load_published(name)
        if model.like is None:
            continue
        size = "not stated" if model.megabytes is None else f"{model.megabytes:g}"
        score = "not stated" if model.miou is None else f"{model.miou:g}"
        on = "" if model.miou is None or model.miou_on is None else f", {model.miou_on}"
        rows.append((model.like, model.data, f"| `{model.like}` | {model.data} | `{name}` | {size} | {score}{on} |"))
    return [row for *_, row in sorted(rows)]


def test_the_documentation_has_all_networks_of_architectures_that_are_here():
    """Where it does not: print("\\n".join(facts_table())) is what belongs between the marks."""
    text = (ROOT / "docs" / "models.md").read_text()
    table = text.partition("<!-- published -->\n")[2].partition("<!-- end -->")[0]
    assert table.splitlines()[2:] == facts_table()


def test_a_network_is_judged_by_argmax_alone(program, script, plan, tmp_path: Path):
    """Evaluated by fewer rules than the plan has, it is in the report's section with those, and nowhere else."""
    (_, *flags), path = plan(miou=99.0), tmp_path / "network.yaml"
    flags += ["--test-only", "--model_yaml", path, "--data_yaml", "pascal_voc", "--set", "schedule.num_workers=0"]
    status, _, err = program(*flags, "--predict_yaml", "argmax", "rankseg_levelset")
    assert status == 0, err
    (network,) = evaluated_networks(Measured(tmp_path / "out"))
    assert [result.rule for result in network.results] == ["argmax", "rankseg_levelset"]
    assert "99 by its owner: not to be compared (3 of 1449 images)" in network.verdict
    assert script("report", tmp_path / "out")[0] == 0
    table = (tmp_path / "out" / "report" / "tables.md").read_text()
    assert network.verdict in table
    assert "From `network.pascal_voc.published`." not in table
    path = tmp_path / "out" / "network.pascal_voc.published" / "results" / "rankseg_levelset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights_checksum": "other"}))
    (network,) = evaluated_networks(Measured(tmp_path / "out"))
    assert [result.rule for result in network.results] == ["argmax"]


def test_results_belong_to_the_content_of_the_files(program, plan, tmp_path: Path):
    """Wherever they lie; those of an earlier version, which do not tell the content, to the path."""
    (_, *flags), path, weights = plan(), tmp_path / "network.yaml", tmp_path / "net.pth"
    flags += ["--test-only", "--model_yaml", path, "--data_yaml", "pascal_voc", "--set", "schedule.num_workers=0"]
    status, _, err = program(*flags, "--predict_yaml", "argmax")
    assert status == 0, err

    def is_done(at: Path = weights) -> bool:
        (job,) = with_settings(table_jobs("published"), [f"model.weights={at}"], None)
        return Existing(tmp_path / "out").find(job, "argmax") is not None

    assert is_done()
    moved = weights.rename(tmp_path / "moved.pth")
    assert is_done(moved)
    torch.save({"another": torch.zeros(1)}, weights)
    assert not is_done(weights), "another file in its place"

    results = tmp_path / "out" / "network.pascal_voc.published" / "results" / "argmax.json"
    content = json.loads(results.read_text())
    before = json.loads(results.read_text())
    assert before["training"]["published"].pop("sha256") == weights_sha256(moved)
    elsewhere = {**content["training"]["published"], "weights": "moved.pth"}
    assert differences(before, content) == []
    assert differences(content, {**content, "training": {"published": elsewhere}}) == []
    (difference,) = differences(content, {**content, "training": {"published": {**elsewhere, "sha256": "0"}}})
    assert difference.startswith("published.sha256 ")
    results.write_text(json.dumps(before))
    assert is_done(weights)
    assert not is_done(moved)


@pytest.mark.slow
def test_a_score_that_is_missed_is_called_wrong(script, plan, monkeypatch, tmp_path: Path):
    """On all of the owner's images; done once, it is judged again by what the YAML says then."""
    monkeypatch.setattr(plans, "ONE_PASS", ("argmax", "rankseg_levelset", "rankseg_rma_paper"))
    monkeypatch.setattr(PascalVOC, "totals", {"val": 3})
    status, out, err = script("reproduce", *plan(miou=99.0), "--device", "cpu")
    assert status == 2
    assert "99 by its owner: WRONG: more than 1 point from it" in out
    assert "1 network(s) miss their owner's score by more than a point: network" in err
    measured = float(out.rpartition("mIoU ")[2].partition(" under")[0])
    status, out, err = script("reproduce", *plan(miou=measured + 0.9), "--device", "cpu")
    assert status == 0, err
    assert "1 networks that others trained, 1 done before, 0 now, 0 failed" in out
    assert f"{measured + 0.9:g} by its owner: as stated" in out
    monkeypatch.setattr(PascalVOC, "totals", {"val": 1449})
    status, out, _ = script("reproduce", *plan(miou=99.0), "--device", "cpu")
    assert status == 0
    assert "not to be compared (3 of 1449 images)" in out
    plan(miou=99.0, like="segformer_mit_b4")
    assert script("report", tmp_path / "out")[0] == 0
    table = (tmp_path / "out" / "report" / "tables.md").read_text()
    assert "Networks that others trained" in table
    assert "other weights" in table
    (row,) = (line for line in table.splitlines() if line.startswith("| network | pascal_voc | rankseg_rma_paper "))
    assert "| 87.28 | +0.42 |" in row.replace("  ", " ")
    status, out, _ = script("reproduce", *plan()[:1], "--data_dir", tmp_path, "--output_dir", tmp_path / "none")
    assert "left out: 1 networks that others trained for pascal_voc" in out
