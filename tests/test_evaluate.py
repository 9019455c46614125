import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from exp.data.camvid import CamVid
from exp.data.transforms import Normalize
from exp.distributed import Dist
from exp.evaluate import Evaluator, Timing, add_timings, format_timing
from exp.inference import Inference
from exp.metrics import count


class Colours(nn.Module):
    """A network without weights: logits are colour channels."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image, image, image, image[:, :2]], dim=1)


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
    assert both.to_dict() == {**timing.to_dict(), "images": 6}
    assert format_timing(timing).splitlines()[2].startswith("slow ")


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_several_processes_count_every_image_once(camvid_dir: Path, world_size: int):
    """The ranks run one after the other here; what they gather is put together as gather() would."""
    parts: list[tuple] = []

    class Recording(Dist):
        def gather(self, item: tuple) -> list[tuple]:
            parts.append(item)
            last = self.rank == self.world_size - 1
            return parts if last else [({i: np.zeros((1, 3, 11)) for i in range(3)}, Timing())]

    for rank in range(world_size):
        (result,) = evaluator(camvid_dir, {"argmax": argmax}, rank, world_size, Recording)(Colours()).results
    assert sorted(i for rows, _ in parts for i in rows) == [0, 1, 2]
    (alone,) = evaluator(camvid_dir, {"argmax": argmax})(Colours()).results
    assert (result.counts == alone.counts).all()
