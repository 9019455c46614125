import itertools
import math
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exp.checkpoints.checkpoint import load_checkpoint
from exp.checkpoints.checkpoint_files import find_checkpoint
from exp.config.experiment import CONFIG_DIR
from exp.config.families import LOSS_TABLE
from exp.config.loss import LossConfig
from exp.config.strict_yaml import build_dataclass, load_mapping
from exp.runtime import distributed
from exp.runtime.errors import InputError
from exp.training.losses import CrossEntropy, Focal, Overlap, build_criterion, sum_overlap
from tests.conftest import TINY

YAMLS = sorted(path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml"))
VERSIONS = {"dataset": (1, 0, 0), "image": (0, 1, 0), "class": (0, 0, 1), "mixed": (0.2, 0.3, 0.5)}
INDICES = {"jaccard": (1, 1), "dice": (0.5, 0.5), "tversky": (0.3, 0.7)}


def same(value: Tensor) -> Tensor:
    """Dist.sum of one process."""
    return value


def shipped(name: str) -> LossConfig:
    path = CONFIG_DIR / "loss" / f"{name}.yaml"
    return build_dataclass(LossConfig, {"name": name, **load_mapping(path)}, path, {})


def overlap(version: str = "mixed", index: str = "jaccard", smooth: float = 1.0, both_classes: bool = False) -> Overlap:
    dataset, image, class_ = VERSIONS[version]
    alpha, beta = INDICES[index]
    return Overlap(
        alpha=alpha,
        beta=beta,
        smooth=smooth,
        dataset_weight=dataset,
        image_weight=image,
        class_weight=class_,
        sum_over_ranks=same,
        both_classes=both_classes,
    )


def example(num_classes: int = 4, images: int = 2) -> tuple[Tensor, Tensor]:
    """Logits and labels in which classes are missing here and there, and pixels are ignored, unevenly."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, num_classes, (images, 5, 6), generator=generator, dtype=torch.uint8)
    label[0][label[0] == num_classes - 1] = 0
    label[0, :3] = 255
    return torch.randn(images, num_classes, 5, 6, generator=generator, dtype=torch.float64), label


def alone(loss: nn.Module, logits: object, label: Tensor) -> Tensor:
    """The loss of one process, its whole batch at once."""
    return loss(logits, label, loss.count(label))


def reference(
    prob: Tensor, label: Tensor, version: str, index: str, smooth: float, both_classes: bool = False
) -> float:
    """The definition in loops over numbers; labels are read as 0 and 1. both_classes: of two, the background too."""
    alpha, beta = INDICES[index]
    images, classes = prob.shape[:2]
    active = [1] if classes == 2 and not both_classes else range(classes)
    cells = {}
    for i, c in itertools.product(range(images), active):
        x_sum = y_sum = difference = 0.0
        for row, column in itertools.product(*map(range, prob.shape[2:])):
            if label[i, row, column] == 255:
                continue
            y = float(label[i, row, column] == c)
            x = prob[i, c, row, column].item()
            x_sum, y_sum, difference = x_sum + x, y_sum + y, difference + abs(x - y)
        cells[i, c] = ((x_sum + y_sum - difference) / 2, x_sum, y_sum)

    def index_loss(tp: float, x_sum: float, y_sum: float) -> float:
        return 1 - (tp + smooth) / (tp + alpha * (x_sum - tp) + beta * (y_sum - tp) + smooth)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    def present(i: int, c: int) -> bool:
        return cells[i, c][2] > 0

    pooled = {c: [sum(cells[i, c][k] for i in range(images)) for k in range(3)] for c in active}
    dataset = mean([index_loss(*pooled[c]) for c in active if pooled[c][2] > 0])
    rows = [[index_loss(*cells[i, c]) for c in active if present(i, c)] for i in range(images)]
    columns = [[index_loss(*cells[i, c]) for i in range(images) if present(i, c)] for c in active]
    image, class_ = mean([mean(row) for row in rows if row]), mean([mean(column) for column in columns if column])
    weights = VERSIONS[version]
    return weights[0] * dataset + weights[1] * image + weights[2] * class_


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("version", VERSIONS)
def test_overlap_losses_are_their_definition(version: str, index: str, num_classes: int):
    logits, label = example(num_classes, images=3)
    for smooth in (1.0, 0.1):
        expected = reference(logits.softmax(1), label, version, index, smooth)
        assert alone(overlap(version, index, smooth), logits, label).item() == pytest.approx(expected, rel=1e-6)
        expected = reference(logits.softmax(1), label, version, index, smooth, both_classes=True)
        both = overlap(version, index, smooth, both_classes=True)
        assert alone(both, logits, label).item() == pytest.approx(expected, rel=1e-6)


def test_sums_over_large_images_are_exact_enough():
    """In float32 a class of 100,000 pixels is known to a hundredth of one: FP and FN are differences of the sums."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (1, 400, 500), generator=generator, dtype=torch.uint8)
    label[:, :200], label[:, 200:210] = 0, 255
    logits = torch.randn(1, 4, 400, 500, generator=generator)
    logits[:, 0, :200] += 12
    prob = logits.softmax(1)
    error = sum_overlap(prob, label) - sum_overlap(prob.double(), label)
    assert error.abs().max() < 0.02


def test_overlap_gradient_is_that_of_finite_differences():
    logits, label = example(3)
    torch.autograd.gradcheck(lambda x: alone(overlap(), x, label), logits.requires_grad_())


def test_overlap_losses_against_segmentation_models_pytorch():
    """Where the definitions meet: over the batch, more than two classes, all present (the library divides by all)."""
    logits, label = example(4, images=4)
    label = label.long()
    assert set(label.unique().tolist()) == {0, 1, 2, 3, 255}
    shared = {"mode": "multiclass", "ignore_index": 255}
    theirs = {
        "dice": smp.losses.DiceLoss(smooth=1.0, **shared),
        "tversky": smp.losses.TverskyLoss(smooth=1.0, alpha=0.3, beta=0.7, **shared),
    }
    for index, library in theirs.items():
        torch.testing.assert_close(alone(overlap("dataset", index), logits, label), library(logits, label))
    label[label == 255] = 1  # its Jaccard loss cannot ignore
    torch.testing.assert_close(
        alone(overlap("dataset", "jaccard"), logits, label),
        smp.losses.JaccardLoss(mode="multiclass", smooth=1.0)(logits, label),
    )


def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_everything():
    label = torch.tensor([[[0, 1, 2, 255]]])
    right = F.one_hot(label.where(label != 255, 0), 4).movedim(-1, 1) * 100.0
    for version in VERSIONS:
        assert alone(overlap(version), right, label).item() == pytest.approx(0, abs=1e-6)
        assert alone(overlap(version, smooth=1e-6), right.roll(1, 1), label).item() == pytest.approx(1, abs=1e-4)


def test_focal_loss_is_its_definition():
    logits, label = example()
    terms = []
    for b, y, x in torch.nonzero(label != 255).tolist():
        p = logits.softmax(1)[b, int(label[b, y, x]), y, x].item()
        terms.append(-((1 - p) ** 2) * math.log(p))
    assert alone(Focal(2), logits, label).item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    torch.testing.assert_close(alone(Focal(0), logits, label), alone(CrossEntropy(), logits, label))


def test_focal_loss_against_segmentation_models_pytorch():
    """Where the definitions meet: one logit z there is the pair (0, z) here."""
    logits, label = example(2)
    logits[:, 0] = 0
    theirs = smp.losses.FocalLoss(mode="binary", gamma=2.0, ignore_index=255)(logits[:, 1:], label[:, None].long())
    torch.testing.assert_close(alone(Focal(2), logits, label), theirs)


def test_focal_gradient_is_finite_where_the_model_is_sure():
    logits = torch.tensor([200.0, -200.0]).reshape(1, 2, 1, 1).requires_grad_()
    alone(Focal(0.5), logits, torch.zeros(1, 1, 1, dtype=torch.uint8)).backward()
    assert logits.grad.isfinite().all()


def test_cross_entropy_is_the_mean_over_counted_pixels():
    logits, label = example()
    total, counted = 0.0, 0
    for b, y, x in torch.nonzero(label != 255).tolist():
        row = logits[b, :, y, x]
        total += math.log(row.exp().sum()) - row[int(label[b, y, x])].item()
        counted += 1
    assert alone(CrossEntropy(), logits, label).item() == pytest.approx(total / counted, rel=1e-12)
    torch.testing.assert_close(
        alone(CrossEntropy(), logits, label), F.cross_entropy(logits, label.long(), ignore_index=255)
    )


@pytest.mark.parametrize("name", YAMLS)
def test_no_counted_pixel_gives_zero_and_a_finite_gradient(name: str):
    logits, label = example()
    logits.requires_grad_()
    loss = build_criterion(shipped(name), same)
    value = alone(loss, (logits, logits), torch.full_like(label, 255))
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("name", YAMLS)
def test_ignored_pixels_have_no_influence(name: str):
    logits, label = example()
    other = torch.where((label == 255)[:, None], -logits, logits)
    loss = build_criterion(shipped(name), same)
    leaf = logits.clone().requires_grad_()
    value = alone(loss, (leaf, leaf), label)
    value.backward()
    torch.testing.assert_close(value, alone(loss, (other, other), label))
    assert leaf.grad.movedim(1, -1)[label == 255].abs().max() == 0


WHOLE = ("ce", "focal", "jaccard_ic_present_all", "dice_ic_present_all", "tversky_ic_present_all")


@pytest.mark.parametrize("name", WHOLE)
def test_uneven_micro_batches_add_up_to_the_whole(name: str):
    logits, label = example(images=3)
    loss = build_criterion(shipped(name), same)
    counted = loss.count(label)
    parts = [loss((logits[i : i + 1], logits[i : i + 1]), label[i : i + 1], counted) for i in range(3)]
    torch.testing.assert_close(sum(parts), alone(loss, (logits, logits), label))


def test_the_data_set_version_of_micro_batches_is_their_mean():
    logits, label = example(images=4)
    loss = overlap("dataset")
    parts = [(logits[:2], label[:2]), (logits[2:], label[2:])]
    torch.testing.assert_close(
        sum(loss(x, y, loss.count(label)) for x, y in parts), sum(alone(loss, x, y) for x, y in parts) / 2
    )


def losses_of_a_share(dist: distributed.Dist, rank: int, share: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Each YAML's value and gradient on images [rank * share, (rank + 1) * share) of a batch of four."""
    logits, label = example(images=4)
    mine = slice(rank * share, (rank + 1) * share)
    out = {}
    for name in YAMLS:
        loss = build_criterion(shipped(name), dist.sum)
        leaf = logits[mine].clone().requires_grad_()
        value = loss((leaf, leaf.flip(1)), label[mine], dist.mean(loss.count(label[mine])))
        value.backward()
        out[name] = value.detach(), leaf.grad
    return out


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.3])
@pytest.mark.parametrize("loss", ["ce", "focal"])
def test_the_yaml_weighs_main_and_auxiliary(loss: str, weight: float):
    logits, label = example()
    other = logits.flip(1)
    options = {"focal": {"gamma": 2.0}}.get(loss, {})
    criterion = build_criterion(LossConfig("x", loss, aux_weight=weight, **options), same)
    single = Focal(2) if loss == "focal" else CrossEntropy()
    main, auxiliary = (alone(single, x, label) for x in (logits, other))
    torch.testing.assert_close(alone(criterion, (logits, other), label), (1 - weight) * main + weight * auxiliary)
    torch.testing.assert_close(alone(criterion, (logits,), label), (1 - weight) * main)  # no auxiliary head


@pytest.mark.parametrize(
    ("name", "index", "version"),
    [
        ("jaccard_d_present_all", "jaccard", (1, 0, 0)),
        ("jaccard_ic_present_all", "jaccard", (0, 0.5, 0.5)),
        ("dice_d_present_all", "dice", (1, 0, 0)),
        ("dice_ic_present_all", "dice", (0, 0.5, 0.5)),
        ("tversky_ic_present_all", "tversky", (0, 0.5, 0.5)),
    ],
)
def test_overlap_yamls_are_what_their_names_say(monkeypatch, name: str, index: str, version: tuple):
    """A quarter of cross-entropy, three quarters of the loops above, on both heads."""
    monkeypatch.setitem(VERSIONS, "asked", version)
    logits, label = example(5, images=3)
    expected = 0.0
    for x in (logits, logits.flip(1)):
        ce = F.cross_entropy(x, label.long(), ignore_index=255).item()
        expected += 0.5 * (0.25 * ce + 0.75 * reference(x.softmax(1), label, "asked", index, 1.0))
    assert alone(build_criterion(shipped(name), same), (logits, logits.flip(1)), label).item() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("name", ["jaccard_d", "jaccard_ic", "dice_d", "dice_ic"])
def test_of_two_classes_both_count_or_the_foreground_alone_and_of_more_the_yamls_are_equal(name: str):
    both, foreground = (build_criterion(shipped(f"{name}_present_{kind}"), same) for kind in ("all", "foreground"))
    for num_classes, differs in ((2, True), (4, False)):
        logits, label = example(num_classes)
        values = [alone(loss, (logits, logits), label) for loss in (both, foreground)]
        assert (abs(values[0] - values[1]) > 1e-6) == differs


def test_every_yaml_has_gradients_of_its_own():
    logits, label = example(2)
    grads = []
    for name in YAMLS:
        leaf = logits.clone().requires_grad_()
        alone(build_criterion(shipped(name), same), (leaf, leaf), label).backward()
        grads.append(leaf.grad / leaf.grad.norm())
    for first, second in itertools.combinations(grads, 2):
        assert (first - second).norm() > 1e-2


def test_the_program_trains_with_the_loss_it_is_given(program, tmp_path: Path):
    """One step of plain descent from the same weights on the same images, under every YAML: another one each time."""
    flags = [
        *TINY,
        "--data_yaml",
        "shapes_binary",
        "--set",
        "schedule.train_iters=1",
        "data.val_samples=1",
        "optim.warmup_fraction=0",
        "--optim_yaml",
        "sgd_lr1e-2",
    ]
    weights = []
    for name in YAMLS:
        out = tmp_path / name
        status, _, stderr = program(*flags, "--loss_yaml", name, "--output_dir", out, "--predict_yaml", "argmax")
        assert status == 0, stderr
        (run,) = out.iterdir()
        assert f".{name}." in run.name
        model = load_checkpoint(find_checkpoint(run / "checkpoints")).model
        weights.append(torch.cat([value.flatten().double() for key, value in model.items() if "weight" in key]))
    closest = min((first - second).norm().item() for first, second in itertools.combinations(weights, 2))
    assert closest > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", YAMLS)
def test_losses_are_computed_in_float32(name: str, dtype: torch.dtype):
    """Under autocast, and of logits in half precision."""
    logits, label = example(4)
    half = logits.to(dtype)
    loss = build_criterion(shipped(name), same)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = alone(loss, (half, half), label)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, alone(loss, (half.float(), half.float()), label), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ce", "gamma": 2.0}, "key 'gamma': got 2.0, expected no such key with the loss ce"),
        ({"loss": "focal"}, "key 'gamma': got None, expected a value: the loss focal reads it"),
        ({"loss": "jaccard", "alpha": 1.0}, "key 'alpha': got 1.0, expected no such key"),
        ({"loss": "tversky"}, "key 'alpha': got None"),
        ({"loss": "dice", "class_weight": 0.25}, "key 'dataset_weight': got 0.75, expected 1"),
        ({"loss": "dice", "ce_weight": 1.0}, "key 'ce_weight': got 1.0"),
        ({"loss": "dice", "smooth": 0.0}, "key 'smooth': got 0.0, expected a value above 0"),
        ({"loss": "dice", "image_weight": -0.5, "class_weight": 1.5}, "key 'image_weight': got -0.5"),
    ],
)
def test_keys_that_a_loss_does_not_read_are_refused(options: dict, message: str):
    versions = {"ce_weight": 0.25, "dataset_weight": 0.0, "image_weight": 0.5, "class_weight": 0.5, "smooth": 1.0}
    given = versions if "smooth" in LOSS_TABLE[options["loss"]].keys else {}
    with pytest.raises(InputError) as error:
        LossConfig("x", **(given | options))
    assert message in str(error.value)
