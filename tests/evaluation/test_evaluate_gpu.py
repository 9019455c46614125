"""Evaluation on a CUDA device: the CPU's counts but for ties, caches in host memory, and how much memory it takes."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exp.evaluation.inference import Inference
from exp.rules.pooled import PooledRule
from exp.rules.registry import build_rule
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from rankseg_rma import rankseg_rma
from tests.config.test_config import compose
from tests.conftest import TINY, TINY_RUN
from tests.data.trees import write_camvid
from tests.evaluation.test_evaluate import Colours, argmax, evaluator

pytestmark = pytest.mark.gpu
RULES = ("argmax", "rankseg_rma", "rankseg_rma_iou", "rankseg_rma_dataset", "rankseg_rma_dataset_iou")
MAP = 4 * 11 * 48 * 64  # bytes of an image's probabilities


def on(data_dir: Path, rules: dict, device: torch.device, **changes: object):
    """The evaluator of the other tests, on a device."""
    return dataclasses.replace(evaluator(data_dir, rules), dist=Dist(0, 1, device), **changes)


def test_every_rule_counts_as_on_the_cpu(gpu: torch.device, camvid_dir: Path):
    rules = {name: build_rule(compose(predict=[name]).predict[0], 11) for name in RULES}
    options = {"calibration": True, "cache_bytes": 2 * MAP}  # the third image's map is computed twice
    one, other = (on(camvid_dir, rules, device, **options)(Colours()) for device in (torch.device("cpu"), gpu))
    for own, expected in zip(other.results, one.results, strict=True):
        assert own.rule == expected.rule
        assert abs(own.counts - expected.counts).sum() <= 2 * 6, own.rule  # six pixels, of 9,216
        assert (other.results[0].confusion.sum(1) == one.results[0].confusion.sum(1)).all()  # the labels' pixels
    assert abs(np.asarray(other.calibration, float) - np.asarray(one.calibration, float)).max() < 10
    np.testing.assert_allclose(other.entropy, one.entropy, rtol=1e-4)
    assert other.timing.num_images == 3
    assert other.timing.num_forwards == 4
    assert all(seconds >= 0 for seconds in (*other.timing.steps.values(), *other.timing.decisions.values()))


def test_probabilities_are_kept_in_host_memory(gpu: torch.device, tmp_path: Path):
    """Of 24 maps the device holds a few at a time, although all of them are kept for the second pass."""
    write_camvid(tmp_path, {"train": 1, "val": 24})
    held = []

    def probe(prob: Tensor) -> Tensor:
        held.append(torch.cuda.memory_allocated(gpu) if gpu.type == "cuda" else 0)
        return prob.argmax(1)

    rules = {"probe": probe, "pooled": PooledRule("dataset", "dice", 0.1)}
    before = torch.cuda.memory_allocated(gpu) if gpu.type == "cuda" else 0
    evaluation = on(tmp_path, rules, gpu, cache_bytes=24 * MAP)(Colours())
    assert evaluation.timing.num_forwards == 24
    assert max(held) - before < 8 * MAP


def test_the_cache_changes_nothing(gpu: torch.device, camvid_dir: Path):
    rules = {"argmax": argmax, "pooled": PooledRule("dataset", "iou", 0.1)}
    counts = [
        [result.counts for result in on(camvid_dir, rules, gpu, cache_bytes=size)(Colours()).results]
        for size in (0, 10**9)
    ]
    assert np.array_equal(counts[0], counts[1])


def test_a_run_is_evaluated_as_on_the_cpu_but_for_ties(gpu: torch.device, program, tmp_path: Path):
    """All results files of one checkpoint; where a probability is a tie, rounding decides a pixel."""
    rules = (*RULES, "rankseg_levelset")
    flags = [*TINY, "--output_dir", tmp_path, "--predict_yaml", *rules, "--set", "schedule.tf32=off"]
    status, _, err = program(*flags, "--device", "cpu")
    assert status == 0, err
    results = tmp_path / TINY_RUN / "results"
    expected = shutil.copytree(results, tmp_path / "expected")
    status, _, err = program(*flags, "--device", gpu.type, "--test-only")
    assert status == 0, err
    assert_same_but_for_ties(results, expected, rules)


def assert_same_but_for_ties(found: Path, expected: Path, rules: Sequence[str], most: int = 12) -> None:
    """Two folders of results: counts per image, confusion matrices, scores, reliability diagrams, entropies.

    most: pixels that a rule may decide otherwise.
    """
    for rule in rules:
        own, other = (read_counts(folder / f"{rule}.csv") for folder in (found, expected))
        ties = {image: change for image in own if (change := abs(own[image] - other[image]).sum() // 2)}
        assert own.keys() == other.keys()
        assert sum(ties.values()) <= most, (rule, ties)
        own, other = (read_matrix(folder / f"{rule}.confusion.csv") for folder in (found, expected))
        assert np.array_equal(own.sum(1), other.sum(1)), rule  # the labels' pixels
        assert abs(own - other).sum() <= 2 * most, rule
        own, other = (json.loads((folder / f"{rule}.json").read_text()) for folder in (found, expected))
        points = 5 if ties else 1e-9
        assert own["metrics"] == pytest.approx(other["metrics"], abs=points), rule
        assert own["per_class"].keys() == other["per_class"].keys()
        for name, scores in own["per_class"].items():
            assert scores == pytest.approx(other["per_class"][name], abs=points), (rule, name)
    own, other = (json.loads((folder / "calibration.json").read_text()) for folder in (found, expected))
    assert own["metrics"] == pytest.approx(other["metrics"], abs=0.5)
    for one, two in ((own["top_label"], other["top_label"]), *zip(*(d["per_class"].values() for d in (own, other)))):
        pixels, before = (np.array(diagram["pixels"], float) for diagram in (one, two))
        assert abs(pixels - before).max() <= most
        for what in ("confidence", "accuracy"):  # means; their sums over a bin move by what goes to another bin
            sums = (n * np.array(d[what], float) for n, d in ((pixels, one), (before, two)))
            np.testing.assert_allclose(*map(np.nan_to_num, sums), atol=most)
    own, other = (
        np.genfromtxt(folder / "images.csv", delimiter=",", skip_header=1)[:, 1] for folder in (found, expected)
    )
    np.testing.assert_allclose(own, other, rtol=1e-4)


def test_a_network_that_overflows_is_told_by_its_key(gpu: torch.device, camvid_dir: Path):
    """On a GPU a rule meets the non-finite probabilities before anybody has looked at their sum."""

    class Overflowing(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.mean(1, keepdim=True).expand(-1, 11, -1, -1) * torch.inf

    on_gpu = dataclasses.replace(evaluator(camvid_dir, {"rankseg_rma": rankseg_rma}), dist=Dist(0, 1, gpu))
    with pytest.raises(InputError, match=r"test\.amp: got an image whose logits are non-finite"):
        on_gpu(Overflowing())


def read_counts(path: Path) -> dict[str, np.ndarray]:
    """A rule's CSV -> the counts by image."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    first = next(i for i, name in enumerate(header) if name.startswith("tp."))
    return {row[0]: np.array(row[first:], np.int64) for row in rows}


def read_matrix(path: Path) -> np.ndarray:
    with open(path, newline="", encoding="utf-8") as file:
        return np.array([row[1:] for row in csv.reader(file)][1:], np.int64)


class Wide(nn.Module):
    """A network of one layer with 150 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 150, 1)

    def forward(self, image: Tensor) -> Tensor:
        return 8 * self.layer(image)


@torch.inference_mode()
def test_memory_of_150_classes_on_2000_by_3000_pixels(gpu: torch.device):
    """One map for inference and little besides; the rule takes less than another one."""
    size, crop = ((2000, 3000), 512) if gpu.type == "cuda" else ((64, 96), 32)
    torch.manual_seed(0)
    model, image = Wide().to(gpu).eval(), torch.randn(1, 3, *size, device=gpu)
    inference = Inference((crop, crop), (crop * 2 // 3, crop * 2 // 3), 2)
    one_map = 4 * 150 * size[0] * size[1]
    prob, peak = measured(lambda: inference(model, image), gpu)
    assert prob.shape == (1, 150, *size)
    print(f"inference: {peak / one_map:.2f} maps")
    assert peak < 1.5 * one_map
    labels, peak = measured(lambda: rankseg_rma(prob), gpu)
    assert labels.shape == (1, *size)
    print(f"rankseg_rma: {peak / one_map:.2f} maps")
    assert peak < one_map


def measured(work, device: torch.device) -> tuple[Tensor, int]:
    """What work() returns, and the bytes of device memory that it took at most, its result included."""
    if device.type != "cuda":
        return work(), 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before
