import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from exp.data.sets.camvid import CamVid
from exp.data.transforms import Normalize
from exp.evaluation.calibration import count_calibration
from exp.evaluation.evaluator import Evaluator, add_timings, build_evaluator, format_timing
from exp.evaluation.inference import Inference
from exp.evaluation.metrics import count
from exp.rules.pooled import PooledRule
from exp.rules.registry import build_rule
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from tests.config.test_config import compose


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


def test_counts_are_those_of_each_image(camvid_dir: Path):
    judge = evaluator(camvid_dir, {"argmax": argmax})
    (result,) = judge(Colours()).results
    assert result.names == ("val_0", "val_1", "val_2")
    for i in range(3):
        item = judge.dataset[i]
        pred = judge.decide(Colours(), item.image[None])["argmax"]
        assert (result.counts[i] == count(pred, item.label, 11).numpy()).all()
        assert result.counts[i][[0, 2]].sum() == (item.label != 255).sum()


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
    timing.steps["pool"] = 0.03  # the price of rules of a wider scope besides their decision
    assert format_timing(timing).splitlines()[2].split() == ["gathering", "thresholds", "10.00"]


def test_each_rule_is_judged_as_if_it_were_alone(camvid_dir: Path):
    names = ("argmax", "rankseg_rma", "rankseg_rma_iou", "rankseg_rma_dataset", "rankseg_rma_paper")
    rules = {name: build_rule(compose(predict=[name]).predict[0], 11) for name in names}
    together = evaluator(camvid_dir, rules)(Colours())
    for i, name in enumerate(names):
        alone = evaluator(camvid_dir, {name: rules[name]})(Colours())
        assert (alone.results[0].counts == together.results[i].counts).all(), name


def test_n_rules_cost_one_forward_pass_an_image(camvid_dir: Path):
    """Image-wise rules: one pass; with a rule of a wider scope: one where the cache holds the maps, else two."""
    image_wise = {"argmax": argmax, "again": argmax}
    pooled = {**image_wise, "pooled": PooledRule("dataset", "dice", 0.1)}
    one_map = 4 * 11 * 48 * 64
    for rules, cache_bytes, expected in ((image_wise, 0, 3), (pooled, 3 * one_map, 3), (pooled, 2 * one_map, 4)):
        network = Counting()
        judge = dataclasses.replace(evaluator(camvid_dir, rules), cache_bytes=cache_bytes)
        evaluation = judge(network)
        windows = 4  # of 32 x 32, three at a time, in an image of 48 x 64: two calls
        assert evaluation.timing.num_forwards == expected
        assert network.calls == expected * math.ceil(windows / 3)


def test_the_cache_changes_nothing(camvid_dir: Path):
    judge = evaluator(camvid_dir, {"pooled": PooledRule("dataset", "iou", 0.1)})
    kept = dataclasses.replace(judge, cache_bytes=10**9)
    assert (judge(Colours()).results[0].counts == kept(Colours()).results[0].counts).all()


def test_further_images_are_decided_under_the_thresholds_found(camvid_dir: Path):
    judge = evaluator(camvid_dir, {"argmax": argmax, "pooled": PooledRule("dataset", "dice", 0.1)})
    evaluation = judge(Colours())
    item = judge.dataset[1]
    preds = judge.under(evaluation.thresholds).decide(Colours(), item.image[None])
    assert (count(preds["pooled"], item.label, 11).numpy() == evaluation.results[1].counts[1]).all()


def test_labels_are_not_read_for_thresholds(camvid_dir: Path):
    judge = evaluator(camvid_dir, {"pooled": PooledRule("dataset", "dice", 0.1)})
    before = judge(Colours()).thresholds
    for path in (camvid_dir / "camvid" / "valannot").iterdir():
        Image.fromarray(np.full((48, 64), 11, np.uint8)).save(path)
    assert judge(Colours()).thresholds == before


def test_calibration_is_counted_per_image(camvid_dir: Path):
    judge = dataclasses.replace(evaluator(camvid_dir, {"argmax": argmax}), calibration=True)
    evaluation = judge(Colours())
    item = judge.dataset[2]
    expected = count_calibration(judge.probabilities(Colours(), item.image[None]), item.label)
    assert (evaluation.calibration[2] == expected).all()
    assert len(evaluation.calibration) == 3
    assert evaluator(camvid_dir, {"argmax": argmax})(Colours()).calibration is None


def test_scope_case_needs_cases(camvid_dir: Path):
    config = compose(data="camvid", predict=["rankseg_rma_case"]).with_window((32, 32))
    with pytest.raises(InputError, match="rankseg_rma_case: got camvid, whose images are in no cases"):
        build_evaluator(config, camvid_dir, Dist(0, 1, torch.device("cpu")))
