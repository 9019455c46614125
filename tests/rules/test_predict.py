import pytest
import torch

from exp.config.experiment import CONFIG_DIR, find_yaml
from exp.rules.registry import RULES, build_rule
from exp.runtime.errors import InputError
from rankseg_rma import rankseg_rma
from tests.config.test_config import compose

NAMES = sorted(path.stem for path in (CONFIG_DIR / "predict").glob("*.yaml"))
WIDER = tuple(name for name in NAMES if find_yaml("predict", name).read_text().count("_pooled") or "fixed" in name)
OF_TWO_CLASSES = ("threshold", "rankseg_ba", "rankseg_trna", "rankseg_exact", "rankseg_exact_iou")


def rule(name: str, num_classes: int):
    return build_rule(compose(predict=[name]).predict[0], num_classes)


def prob(num_classes: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_classes)
    return torch.randn(batch, num_classes, 12, 15, generator=generator).mul(2).softmax(1)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(WIDER)))  # those are tested in test_scopes.py
@pytest.mark.parametrize("num_classes", [2, 5])
def test_every_rule_turns_probabilities_into_labels(name: str, num_classes: int):
    if name in OF_TWO_CLASSES and num_classes > 2:
        with pytest.raises(InputError, match=f"{name}: got 5 classes, expected 2"):
            rule(name, num_classes)
        return
    values = prob(num_classes)
    before = values.clone()
    labels = rule(name, num_classes)(values)
    assert labels.shape == (2, 12, 15)
    assert labels.dtype == torch.int64
    assert labels.min() >= 0
    assert labels.max() < num_classes
    assert torch.equal(values, before)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(WIDER) - {"rankseg_dep"}))  # that one measures distances
def test_a_volume_is_decided_like_an_image_of_its_pixels(name: str):
    values = prob(2)
    volume = values.reshape(2, 2, 3, 4, 15)
    assert torch.equal(rule(name, 2)(volume), rule(name, 2)(values).view(2, 3, 4, 15))


def test_every_rule_has_a_yaml():
    used = {compose(predict=[name]).predict[0].rule for name in NAMES}
    assert used == RULES.keys()


def test_argmax_and_threshold():
    values = prob(2)
    assert torch.equal(rule("argmax", 2)(values), values.argmax(1))
    assert torch.equal(rule("threshold", 2)(values), (values[:, 1] > 0.5).long())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rankseg_rma", {}),
        ("rankseg_rma_iou", {"opt_metric": "iou"}),
        ("rankseg_rma_paper", {"unassigned": "first", "contested": "all"}),
        ("rankseg_rma_prob", {"to_nonoverlap_method": "prob"}),
        ("rankseg_rma_weight_prob", {"to_nonoverlap_method": "weight_prob"}),
        ("rankseg_rma_paper_prob", {"to_nonoverlap_method": "prob", "unassigned": "first", "contested": "all"}),
        (
            "rankseg_rma_paper_weight_prob",
            {"to_nonoverlap_method": "weight_prob", "unassigned": "first", "contested": "all"},
        ),
    ],
)
def test_yamls_reach_the_rule(name: str, options: dict):
    values = prob(5)
    labels = rule(name, 5)(values)
    assert torch.equal(labels, rankseg_rma(values, **options))
    if options:
        assert not torch.equal(labels, rankseg_rma(values)), "the option makes no difference on these maps"


@pytest.mark.parametrize("name", ["rankseg_ba", "rankseg_trna"])
def test_the_package_decides_like_rma_on_two_classes(name: str):
    """Different approximations of one optimum: their labels differ on few pixels."""
    values = prob(2, batch=4)
    assert (rule(name, 2)(values) != rankseg_rma(values)).float().mean() < 0.02


def test_rankseg_ba_prunes_as_the_papers_code_does():
    """A foreground whose largest probability is 0.5 is none."""
    values = torch.full((1, 2, 12, 15), 0.5)
    assert not rule("rankseg_ba", 2)(values).any()
    values[:, 0], values[:, 1] = 0.45, 0.55
    assert rule("rankseg_ba", 2)(values).all()


def test_yaml_headers_say_what_the_rule_is():
    for name in NAMES:
        assert find_yaml("predict", name).read_text().startswith("# ")


@pytest.mark.parametrize(("label", "expected"), [(-1, "a class"), (5, r"a label in 0\.\.4"), (255, "a class")])
def test_a_label_for_unassigned_pixels_must_be_a_class(label: int, expected: str):
    with pytest.raises(InputError, match=rf"predict\.unassigned.*: got {label}, expected {expected}"):
        build_rule(compose(f"predict.unassigned={label}", predict=["rankseg_rma"]).predict[0], 5)


def test_the_rule_leaves_the_number_of_threads_as_it_was():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values = torch.randn(1, 5, 600, 700).softmax(1)
        assert torch.equal(rule("rankseg_rma", 5)(values), rankseg_rma(values))
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="finite"):
            rule("rankseg_rma", 5)(values * torch.nan)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
