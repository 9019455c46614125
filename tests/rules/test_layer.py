"""The rules as the last layer of a network: `RankSEG`, as it decides by itself and in a graph."""

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rankseg_rma as module
from exp.evaluation.probability_maps import Decoding
from rankseg_rma import RankSEG, rankseg_levelset, rankseg_rma
from tests.rules.test_rankseg_rma import softmax_map

RMA_OPTIONS = (
    {},
    {"allow_overlap": True},
    {"contested": "all", "unassigned": "first"},
    {"to_nonoverlap_method": "prob", "contested": "all"},
    {"to_nonoverlap_method": "weight_prob"},
    {"unassigned": 1, "pruning_prob": 0.6},
    {"binary_threshold": False},
    {"pruning_prob": 1.0},
)
LEVELSET_OPTIONS = ({}, {"allow_overlap": True}, {"pruning_prob": 0.6}, {"pruning_prob": 1.0})
CASES = [("rankseg_rma", o) for o in RMA_OPTIONS] + [("rankseg_levelset", o) for o in LEVELSET_OPTIONS]


def smooth_map(classes: int, height: int, width: int, sharpness: float = 4, batch: int = 2) -> Tensor:
    """Regions of a few pixels to some hundred, as networks give them; two images."""
    coarse = torch.randn(batch, classes, 6, 7, generator=torch.Generator().manual_seed(classes))
    return nn.functional.interpolate(sharpness * coarse, (height, width), mode="bilinear").softmax(1)


class Net(nn.Module):
    """Logits -> labels, with the rule as the last layer."""

    def __init__(self, rule: nn.Module) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, logits: Tensor) -> Tensor:
        return self.rule(logits.softmax(1))


def test_a_layer_is_its_function_with_its_options():
    prob = softmax_map(2, 5, 9, 11)
    valid = torch.arange(11).expand(2, 9, 11) < 8
    assert torch.equal(RankSEG()(prob), rankseg_rma(prob))
    assert torch.equal(RankSEG("rankseg_rma", opt_metric="iou")(prob), rankseg_rma(prob, "iou"))
    assert torch.equal(RankSEG("rankseg_levelset")(prob), rankseg_levelset(prob))
    assert torch.equal(RankSEG()(prob, valid), rankseg_rma(prob, valid=valid))
    labels, tau = RankSEG(return_tau=True)(prob)
    assert tau.shape == (2, 5)
    one = RankSEG(in_batch=False)(prob[0].numpy())
    assert isinstance(one, np.ndarray)
    assert (one == labels[0].numpy()).all()


def test_a_layer_is_pickled_printed_and_has_no_state():
    layer = RankSEG("rankseg_levelset", traceable=True, opt_metric="dice")
    again = pickle.loads(pickle.dumps(layer))
    prob = smooth_map(4, 20, 30)
    assert torch.equal(again(prob), layer(prob))
    assert repr(again) == "RankSEG(rankseg_levelset, opt_metric='dice', traceable=True)"
    assert not layer.state_dict()


@pytest.mark.parametrize(
    ("given", "error", "part"),
    [
        ({"rule": "argmax"}, ValueError, "rule must be one of ('rankseg_rma', 'rankseg_levelset'), got 'argmax'"),
        ({"metric": "dice"}, TypeError, "got 'metric'"),
        ({"rule": "rankseg_levelset", "unassigned": "first"}, TypeError, "got 'unassigned'"),
        ({"opt_metric": "accuracy"}, ValueError, "opt_metric must be one of ('dice', 'iou'), got 'accuracy'"),
        ({"rule": "rankseg_levelset", "pruning_prob": 2}, ValueError, "pruning_prob must lie in [0, 1], got 2"),
        ({"traceable": True, "return_tau": True}, ValueError, "return_tau must be False with traceable=True"),
    ],
)
def test_wrong_options_are_told_before_a_map_comes(given: dict, error: type, part: str):
    with pytest.raises(error) as caught:
        RankSEG(**given)
    assert part in str(caught.value)


@pytest.mark.parametrize("metric", ["dice", "iou"])
@pytest.mark.parametrize(("rule", "options"), CASES, ids=str)
def test_the_form_for_graphs_decides_as_the_function(rule: str, options: dict, metric: str):
    for classes, height, width, sharpness in ((2, 31, 17, 4), (5, 12, 40, 1), (5, 90, 70, 12), (19, 60, 50, 6)):
        prob = smooth_map(classes, height, width, sharpness)
        expected = RankSEG(rule, opt_metric=metric, **options)(prob)
        found = RankSEG(rule, traceable=True, opt_metric=metric, **options)(prob)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_the_form_for_graphs_on_large_maps_volumes_and_other_precisions():
    large = smooth_map(3, 500, 400, batch=1)  # of which level sets are counted on a grid of pixels
    volume = smooth_map(4, 24, 21).unflatten(-1, (3, 7))
    for rule in ("rankseg_rma", "rankseg_levelset"):
        for prob in (large, volume, volume.half(), volume.double()):
            assert torch.equal(RankSEG(rule, traceable=True)(prob), RankSEG(rule)(prob))
        alone = RankSEG(rule, traceable=True, in_batch=False)(volume[0])
        assert torch.equal(alone, RankSEG(rule)(volume)[0])


def test_the_form_for_graphs_on_trained_networks(real_data):
    """On confident maps of real images the fixed number of passes is enough, and no label differs."""
    files = sorted((real_data / "voc" / "logits" / "deeplabv3_mobilenetv2").glob("*.npz"))[:4]
    for path in files:
        stored, decoding = Decoding(input_size=(513, 513), align_corners=True).read(path, None)
        prob = torch.from_numpy(decoding.decode(stored, (240, 320), False, path))[None]
        for rule in ("rankseg_rma", "rankseg_levelset"):
            assert torch.equal(RankSEG(rule, traceable=True)(prob), RankSEG(rule)(prob))


def test_the_edges_of_levels_are_the_same_in_a_graph():
    like = torch.zeros(1)
    assert torch.equal(module._trace_edges(like), module._level_edges(like))


@pytest.mark.parametrize("rule", ["rankseg_rma", "rankseg_levelset"])
def test_a_graph_decides_for_maps_that_it_was_not_traced_with(rule: str):
    """The second map has other classes present, another number of pruned ones and another batch."""
    first, second = smooth_map(5, 20, 30, 2).log(), smooth_map(5, 20, 30, 9, batch=3).log()
    shapes = ({0: torch.export.Dim("batch")},)
    graph = torch.export.export(Net(RankSEG(rule, traceable=True)), (first,), dynamic_shapes=shapes).module()
    assert torch.equal(graph(second), RankSEG(rule)(second.softmax(1)))
