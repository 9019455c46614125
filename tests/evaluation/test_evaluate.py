import dataclasses
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from exp.data.base import Sample
from exp.data.sets.camvid import CamVid
from exp.data.sets.shapes import Shapes
from exp.data.transforms import Normalize
from exp.evaluation.calibration import count_calibration
from exp.evaluation.evaluator import Evaluator, add_timings, build_evaluator, format_timing
from exp.evaluation.inference import Inference
from exp.evaluation.metrics import count
from exp.rules import registry
from exp.rules.pooled import Pool, PooledRule, Thresholds
from exp.rules.registry import SeesPadding, build_rule
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from rankseg_rma import rankseg_rma
from tests.config.test_config import compose
from tests.conftest import ROOT

LARGE, MANY = (2000, 3000), 150  # pixels, classes


class Colours(nn.Module):
    """A network without weights: logits are colour channels."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image, image, image, image[:, :2]], dim=1)


class Counting(Colours):
    calls = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(image)


def evaluator(data_dir: Path, rules: dict, rank: int = 0, world_size: int = 1, dist_class: type = Dist) -> Evaluator:
    return Evaluator(
        dataset=CamVid(data_dir, "val"),
        rules=rules,
        inference=Inference((32, 32), (22, 22), 3),
        normalize=Normalize((127.5, 127.5, 127.5), (51.0, 51.0, 51.0)),
        num_workers=0,
        dist=dist_class(rank, world_size, torch.device("cpu")),
    )


def argmax(prob: torch.Tensor) -> torch.Tensor:
    return prob.argmax(1)


def test_every_rule_sees_the_same_probabilities_of_one_forward_pass(camvid_dir: Path):
    seen = {"a": [], "b": []}

    def recorder(name: str):
        def rule(prob: torch.Tensor) -> torch.Tensor:
            seen[name].append(prob)
            return prob.argmax(1)

        return rule

    results = evaluator(camvid_dir, {"a": recorder("a"), "b": recorder("b")})(Colours()).results
    assert [r.rule for r in results] == ["a", "b"]
    assert len(seen["a"]) == 3
    assert all(first is second for first, second in zip(seen["a"], seen["b"], strict=True))
    assert (results[0].counts == results[1].counts).all()


def test_a_rule_that_sees_the_padding_decides_on_the_padded_map_and_the_others_do_not(camvid_dir: Path):
    """Images of 48 x 64 in windows of 60 x 64; the labels of the first rule are those of the map's middle."""
    seen = {"whole": [], "own": []}

    def recorder(name: str):
        def rule(prob: torch.Tensor) -> torch.Tensor:
            seen[name].append(prob)
            return prob.argmax(1)

        return rule

    rules = {"whole": SeesPadding(recorder("whole")), "own": recorder("own")}
    padded = Inference((60, 64), (40, 40), 3, padding="centred", keep_padding=True)
    own = dataclasses.replace(evaluator(camvid_dir, rules), inference=padded)
    results = own(Colours()).results
    assert [prob.shape for prob in seen["whole"]] == [(1, 11, 60, 64)] * 3
    assert all(torch.equal(a[..., 6:54, :], b) for a, b in zip(seen["whole"], seen["own"], strict=True))
    assert (results[0].counts == results[1].counts).all()
    image = own.dataset[0].image[None]
    assert own.probabilities(Colours(), image).shape == (1, 11, 48, 64)
    assert torch.equal(*own.decide(Colours(), image).values())
    config = compose("data.crop_size=[512,512]", data="camvid", predict=["rankseg_rma_paper", "rankseg_rma"])
    built = build_evaluator(config, str(camvid_dir), Dist(0, 1, torch.device("cpu")))
    assert built.inference.keep_padding
    assert [isinstance(rule, SeesPadding) for rule in built.rules.values()] == [True, False]


def test_counts_are_those_of_each_image(camvid_dir: Path):
    own = evaluator(camvid_dir, {"argmax": argmax})
    (result,) = own(Colours()).results
    assert result.names == ("val_0", "val_1", "val_2")
    confusion = np.zeros((11, 11), np.int64)
    for i in range(3):
        item = own.dataset[i]
        pred = own.decide(Colours(), item.image[None])["argmax"]
        assert (result.counts[i] == count(pred, item.label, 11).numpy()).all()
        assert result.counts[i][[0, 2]].sum() == (item.label != 255).sum()
        valid = item.label != 255
        np.add.at(confusion, (item.label[valid].numpy(), pred[valid].numpy()), 1)
    assert (result.confusion == confusion).all()


def test_decisions_are_timed_beside_the_forward_pass(camvid_dir: Path):
    def slow(prob: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return prob.argmax(1)

    timing = evaluator(camvid_dir, {"slow": slow, "argmax": argmax})(Colours()).timing
    assert timing.num_images == 3
    assert list(timing.decisions) == ["slow", "argmax"]
    assert timing.decisions["slow"] >= 0.06 > timing.decisions["argmax"]
    assert timing.to_dict()["decision_milliseconds_per_image"]["slow"] >= 20
    assert timing.steps.keys() == {"load", "forward", "score"}
    both = add_timings([timing, timing])
    assert both.num_images == 6
    assert both.to_dict() == {**timing.to_dict(), "images": 6, "forward_passes": 6}
    assert format_timing(timing).splitlines()[2].startswith("slow ")
    timing.steps["pool"] = 0.03  # the price of pooled rules besides their decision
    assert format_timing(timing).splitlines()[2].split() == ["gathering", "thresholds", "10.00"]


def test_each_rule_is_evaluated_as_if_it_were_alone(camvid_dir: Path):
    names = ("argmax", "rankseg_rma", "rankseg_rma_iou", "rankseg_rma_dataset", "rankseg_rma_paper")
    rules = {name: build_rule(compose(predict=[name]).predict[0], 11) for name in names}
    together = evaluator(camvid_dir, rules)(Colours())
    for i, name in enumerate(names):
        alone = evaluator(camvid_dir, {name: rules[name]})(Colours())
        assert (alone.results[0].counts == together.results[i].counts).all(), name


def test_n_rules_cost_one_forward_pass_per_image(camvid_dir: Path):
    """Rules of one image: one pass; with a pooled rule: one where the cache holds the maps, else two."""
    image_wise = {"argmax": argmax, "again": argmax}
    pooled = {**image_wise, "pooled": PooledRule("dataset", "dice", 0.1)}
    one_map = 4 * 11 * 48 * 64
    for rules, cache_bytes, expected in ((image_wise, 0, 3), (pooled, 3 * one_map, 3), (pooled, 2 * one_map, 4)):
        network = Counting()
        own = dataclasses.replace(evaluator(camvid_dir, rules), cache_bytes=cache_bytes)
        evaluation = own(network)
        windows = 4  # of 32 x 32, three at a time, in an image of 48 x 64: two calls
        assert evaluation.timing.num_forwards == expected
        assert network.calls == expected * math.ceil(windows / 3)


def test_the_cache_changes_nothing(camvid_dir: Path):
    own = evaluator(camvid_dir, {"pooled": PooledRule("dataset", "iou", 0.1)})
    kept = dataclasses.replace(own, cache_bytes=10**9)
    assert (own(Colours()).results[0].counts == kept(Colours()).results[0].counts).all()


def test_further_images_are_decided_under_the_thresholds_found(camvid_dir: Path):
    own = evaluator(camvid_dir, {"argmax": argmax, "pooled": PooledRule("dataset", "dice", 0.1)})
    evaluation = own(Colours())
    item = own.dataset[1]
    preds = own.decide(Colours(), item.image[None], evaluation.thresholds)
    assert (count(preds["pooled"], item.label, 11).numpy() == evaluation.results[1].counts[1]).all()


def test_non_finite_logits_end_an_evaluation(camvid_dir: Path):
    class Broken(Colours):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image) * math.inf

    for rule in (argmax, PooledRule("dataset", "dice", 0.1)):
        with pytest.raises(InputError, match="got an image whose logits are non-finite"):
            evaluator(camvid_dir, {"rule": rule})(Broken())


def test_labels_are_not_read_for_thresholds(camvid_dir: Path):
    own = evaluator(camvid_dir, {"pooled": PooledRule("dataset", "dice", 0.1)})
    before = own(Colours()).thresholds
    for path in (camvid_dir / "camvid" / "valannot").iterdir():
        Image.fromarray(np.full((48, 64), 11, np.uint8)).save(path)
    assert own(Colours()).thresholds == before


def test_calibration_is_counted_per_image(camvid_dir: Path):
    own = dataclasses.replace(evaluator(camvid_dir, {"argmax": argmax}), calibration=True)
    evaluation = own(Colours())
    item = own.dataset[2]
    expected = count_calibration(own.probabilities(Colours(), item.image[None]), item.label)
    assert (evaluation.calibration[2] == expected.numpy()).all()
    assert len(evaluation.calibration) == 3
    assert evaluator(camvid_dir, {"argmax": argmax})(Colours()).calibration is None


def test_scope_case_needs_cases(camvid_dir: Path):
    config = compose(data="camvid", predict=["rankseg_rma_case"])
    with pytest.raises(InputError, match="rankseg_rma_case: got camvid, whose images are in no cases"):
        build_evaluator(config, camvid_dir, Dist(0, 1, torch.device("cpu")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_what_a_cpu_finds_and_is_not_waited_for(camvid_dir: Path, monkeypatch):
    """The logits are colours, the same on both; only the calibration's sums and the entropy are rounded otherwise."""
    rules = {"argmax": argmax, "pooled": PooledRule("dataset", "dice", 0.1), "iou": PooledRule("dataset", "iou", 0.1)}
    options = {"calibration": True, "metrics": ("boundary_iou",), "cache_bytes": 2 * 4 * 11 * 48 * 64}
    on_cpu = dataclasses.replace(evaluator(camvid_dir, rules), **options)
    on_gpu = dataclasses.replace(on_cpu, dist=Dist(0, 1, torch.device("cuda", 0)))
    expected = on_cpu(Colours())
    on_gpu(Colours())  # libraries wait when they are used for the first time
    waits, cpu = [], Pool.cpu

    def once(pool: Pool) -> Pool:
        torch.cuda.set_sync_debug_mode("default")  # the thresholds of all images are waited for
        found = cpu(pool)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(Pool, "cpu", once)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append(1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = on_gpu(Colours())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waits
    assert found.timing.num_forwards == expected.timing.num_forwards == 4
    assert found.thresholds == expected.thresholds
    for one, other in zip(found.results, expected.results):
        assert (one.counts == other.counts).all()
        assert (one.confusion == other.confusion).all()
    assert np.allclose(found.calibration, expected.calibration, atol=1e-3)
    assert np.allclose(found.entropy, expected.entropy, atol=1e-5)
    assert all(value > 0 for value in (*found.timing.steps.values(), *found.timing.decisions.values()))


def evaluate_large() -> None:
    """A network of one small layer over one large image under three rules; prints the peak in GiB."""

    class Large(Shapes):
        classes = tuple(f"class {i}" for i in range(MANY))
        palette = ((0, 0, 0),) * MANY

        def list_samples(self) -> list[Sample]:
            return [Sample("large", None, None)]

        def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            rng = np.random.default_rng(0)
            image = rng.integers(0, 256, (LARGE[0] // 50, LARGE[1] // 50, 3), np.uint8).repeat(50, 0).repeat(50, 1)
            return image, (image[..., 0] % MANY).astype(np.uint8)

    torch.manual_seed(0)
    network = nn.Conv2d(3, MANY, 1)
    network.weight.data *= 10
    fixed = Thresholds("dice", *([value] * MANY for value in (0.3, 1e5, 8e4, 1e5, True, 0.0)))
    own = Evaluator(
        dataset=Large(None, "val"),
        rules={"argmax": registry.argmax, "rankseg_rma": rankseg_rma, "fixed": fixed.decide},
        inference=Inference((512, 512), (512, 512), 1),
        normalize=lambda image: image / 255,
        num_workers=0,
        dist=Dist(0, 1, torch.device("cpu")),
        calibration=True,
        cache_bytes=2**30,
    )
    evaluation = own(network)
    assert evaluation.results[0].counts.shape == (1, 3, MANY)
    print(evaluation.timing, file=sys.stderr)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


@pytest.mark.slow
def test_a_large_image_of_many_classes_fits_in_six_gib():
    """150 classes at 2000 x 3000 pixels, of which the float32 logits alone are 3.4."""
    code = "from tests.evaluation.test_evaluate import evaluate_large; evaluate_large()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    print(done.stdout, done.stderr[-600:])
    assert float(done.stdout) < 6


def test_images_that_share_forward_passes_are_evaluated_alike(camvid_dir: Path):
    rules = {"argmax": registry.argmax, "pooled": PooledRule("dataset", "dice", 0.1)}
    alone, shared = evaluator(camvid_dir, rules), evaluator(camvid_dir, rules)
    shared = dataclasses.replace(
        shared, images_per_forward=2, inference=dataclasses.replace(shared.inference, window_batch=100)
    )
    alone = dataclasses.replace(alone, inference=dataclasses.replace(alone.inference, window_batch=100))
    first, second = Counting(), Counting()
    expected, found = alone(first), shared(second)
    for one, other in zip(expected.results, found.results, strict=True):
        assert np.array_equal(one.counts, other.counts)
    assert (first.calls, second.calls) == (2 * 3, 2 * 2)  # two passes over three images: one by one, and two and one
