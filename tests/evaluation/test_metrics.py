"""The scores against a slow, literal reading of their definitions."""

import math

import numpy as np
import pytest
import torch

from exp.config.families import METRIC_TABLE
from exp.evaluation.metrics import (
    METRICS,
    average_folds,
    boundary_iou,
    build_results,
    case_scores,
    compute_scores,
    count,
    count_rules,
    image_scores,
    lowest_mean,
    per_class_scores,
    unit_class_scores,
)

NAMES = ("Acc", "IoU", "Dice")
Counts = list[tuple[int, int, int]]  # TP, FP, FN by class


def literal_counts(pred: np.ndarray, label: np.ndarray, num_classes: int) -> Counts:
    keep = label != 255
    pairs = list(zip(pred[keep].tolist(), label[keep].tolist()))
    return [
        (
            sum(p == c and t == c for p, t in pairs),
            sum(p == c and t != c for p, t in pairs),
            sum(p != c and t == c for p, t in pairs),
        )
        for c in range(num_classes)
    ]


def ratio(name: str, tp: int, fp: int, fn: int) -> float:
    top, bottom = {"Acc": (tp, tp + fn), "IoU": (tp, tp + fp + fn), "Dice": (2 * tp, 2 * tp + fp + fn)}[name]
    return 100 * top / bottom if bottom else math.nan


def mean(values: list[float]) -> float:
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan


def worst(values: list[float], percent: int) -> float:
    kept = sorted(v for v in values if not math.isnan(v))
    return mean(kept[: max(1, percent * len(kept) // 100)])


def summed(images: list[Counts]) -> Counts:
    return [tuple(sum(image[c][k] for image in images) for k in range(3)) for c in range(len(images[0]))]


def active(image: Counts, c: int) -> bool:
    tp, fp, fn = image[c]
    return tp + fn > 0 or (len(image) == 2 and fp > 0)


def image_score(name: str, image: Counts) -> float:
    present = [c for c in range(len(image)) if active(image, c)]
    if len(image) == 2:
        return 100.0 if len(present) < 2 else ratio(name, *image[1])
    return mean([ratio(name, *image[c]) for c in present])


def reductions(values: list[float]) -> dict[str, float]:
    return {
        "": mean(values),
        "5": worst(values, 5),
        "10": worst(values, 10),
        "Q": mean([worst(values, q) for q in range(10, 101, 10)]),
    }


def literal_scores(images: list[Counts], cases: list[str] | None) -> dict[str, float]:
    """Counts by image and class -> the scores, by loops; with cases everything but D within a case first."""
    num_classes = len(images[0])
    total = summed(images)
    right, pixels = sum(t[0] for t in total), sum(t[0] + t[2] for t in total)
    scores = {"Acc": 100 * right / pixels if pixels else math.nan}
    groups = [images] if cases is None else [[i for i, k in zip(images, cases) if k == case] for case in set(cases)]
    for name in NAMES:
        scores[f"m{name}D"] = mean([ratio(name, *total[c]) for c in ([1] if num_classes == 2 else range(num_classes))])
        for end in ("", "5", "10", "Q"):
            scores[f"m{name}I{end}"] = mean([reductions([image_score(name, i) for i in g])[end] for g in groups])
            scores[f"m{name}C{end}"] = mean(
                [
                    mean(
                        [
                            reductions([ratio(name, *i[c]) for i in group if active(i, c)])[end]
                            for c in range(num_classes)
                        ]
                    )
                    for group in groups
                ]
            )
        if cases is not None:
            scores[f"m{name}3D"] = mean([image_score(name, summed(group)) for group in groups])
    return scores


def random_images(rng: np.random.Generator, num_classes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Predictions and labels: single pixels, few or all classes, parts or all of an image ignored."""
    images = []
    for _ in range(rng.integers(1, 4 if num_classes > 5 else 31)):
        shape = tuple(rng.integers(1, 7, 2)) if rng.random() < 0.9 else (1, 1)
        present = rng.choice(num_classes, min(num_classes, int(rng.integers(1, 9))), replace=False)
        label = rng.choice(present, shape)
        pred = np.where(rng.random(shape) < rng.choice([0.2, 0.8, 1.0]), label, rng.integers(0, num_classes, shape))
        ignored = rng.random(shape) < rng.choice([0.0, 0.3, 1.0], p=[0.6, 0.3, 0.1])
        images.append((pred, np.where(ignored, 255, label).astype(np.uint8)))
    return images


@pytest.mark.parametrize("block", range(20))
def test_scores_equal_the_literal_definitions(block: int):
    """1,000 random data sets: two classes and up to 150, with and without cases."""
    for seed in range(50 * block, 50 * block + 50):
        rng = np.random.default_rng(seed)
        num_classes = int(rng.choice([2, 3, 5, 21, 150], p=[0.3, 0.25, 0.25, 0.15, 0.05]))
        images = random_images(rng, num_classes)
        cases = [f"case{k}" for k in rng.integers(0, 4, len(images))] if seed % 2 else None
        counts = np.stack([count(torch.from_numpy(p), torch.from_numpy(t), num_classes).numpy() for p, t in images])
        expected = [literal_counts(p, t, num_classes) for p, t in images]
        assert counts.transpose(0, 2, 1).tolist() == [[list(row) for row in image] for image in expected]
        got, want = compute_scores(counts, cases), literal_scores(expected, cases)
        assert got.keys() == want.keys()
        for name in want:
            assert got[name] == pytest.approx(want[name], abs=1e-9, nan_ok=True), (seed, name)
        rows = image_scores(counts)
        for name in NAMES:
            assert rows[f"m{name}I"].tolist() == pytest.approx(
                [image_score(name, image) for image in expected], abs=1e-9, nan_ok=True
            )


def test_a_small_case_by_hand():
    """Image 1: label 0 0 1 1, prediction 0 1 1 2. Image 2: label 1 255, prediction 1 0. Three classes."""
    first = count(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8), 3)
    second = count(torch.tensor([[1, 0]]), torch.tensor([[1, 255]], dtype=torch.uint8), 3)
    assert first.tolist() == [[1, 1, 0], [0, 1, 1], [1, 1, 0]]
    assert first.dtype == torch.int64
    counts = torch.stack([first, second]).numpy()
    scores, rows, by_class = compute_scores(counts), image_scores(counts), per_class_scores(counts)
    assert rows["mIoUI"].tolist() == pytest.approx([100 * (1 / 2 + 1 / 3) / 2, 100])
    assert scores["mIoUI"] == pytest.approx((100 * 5 / 12 + 100) / 2)
    assert scores["mIoUC"] == pytest.approx((50 + (100 / 3 + 100) / 2) / 2)
    assert scores["mIoUI5"] == scores["mIoUI10"] == pytest.approx(100 * 5 / 12)
    assert scores["mIoUC5"] == pytest.approx((50 + 100 / 3) / 2)
    assert scores["mIoUD"] == pytest.approx((50 + 50 + 0) / 3)  # class 2: predicted only
    assert scores["Acc"] == pytest.approx(60)
    assert np.isnan(by_class["IoUC"][2])
    assert by_class["IoUC5"][:2].tolist() == pytest.approx([50, 100 / 3])


def test_lowest_and_quantiles_of_twenty_images():
    values = np.arange(20.0)[::-1]
    assert lowest_mean(values, 5) == 0
    assert lowest_mean(values, 10) == 0.5
    assert lowest_mean(values, 14) == 0.5, "2.8 images are two"
    assert lowest_mean(values, 100) == values.mean()
    assert lowest_mean(values[:3], 10) == 17, "never fewer than one"
    assert lowest_mean(np.append(values, np.nan), 10) == 0.5, "an undefined score is no image"
    assert np.isnan(lowest_mean(np.array([np.nan]), 10))
    assert lowest_mean(np.zeros(100), 7).shape == ()


def test_slices_are_averaged_within_cases_and_volumes_are_scored_as_images():
    """Case a: one slice; case b: two slices, one of them without a pixel of class 2."""
    counts = np.zeros((3, 3, 3), np.int64)
    counts[0, 0] = [4, 4, 4]
    counts[1] = [[2, 0, 4], [2, 0, 0], [0, 2, 0]]
    counts[2] = [[6, 6, 0], [0, 0, 0], [0, 0, 0]]
    cases = ("b", "a", "b")
    names, rows = case_scores(counts, cases)
    assert names == ("b", "a")
    assert rows["mIoUI"].tolist() == pytest.approx([100, 50])
    assert rows["mDice3D"].tolist() == pytest.approx([100, (200 * 2 / 6 + 0 + 100) / 3])
    scores = compute_scores(counts, cases)
    assert scores["mIoUI"] == pytest.approx(75)
    assert scores["mIoUI10"] == pytest.approx(75), "the worst slice of each case"
    assert scores["mIoU3D"] == pytest.approx(75)
    assert compute_scores(counts)["mIoUI"] == pytest.approx(250 / 3)
    assert "mIoU3D" not in compute_scores(counts)
    assert per_class_scores(counts, cases)["AccC"].tolist() == pytest.approx([100, 50, 100])
    for grouped in (None, cases):
        by_class, units = per_class_scores(counts, grouped), unit_class_scores(counts, grouped)
        for name in ("Acc", "IoU", "Dice"):
            assert np.nanmean(units[name], 0).tolist() == pytest.approx(by_class[f"{name}C"].tolist())


def test_folds_are_averaged_last():
    folds = [{"mIoUI": 50.0, "mIoU3D": None}, {"mIoUI": 60.0, "mIoU3D": 10.0}, {"mIoUI": 70.0, "mIoU3D": 20.0}]
    assert average_folds(folds) == {"mIoUI": 60.0, "mIoU3D": 15.0}
    assert math.isnan(average_folds([{"x": None}])["x"])


@pytest.mark.parametrize(
    ("pred", "label", "iou", "acc"),
    [
        ([0, 0], [0, 0], 100.0, 100.0),  # no foreground anywhere
        ([1, 1], [1, 1], 100.0, 100.0),  # nothing but foreground
        ([0, 1], [0, 0], 0.0, math.nan),  # foreground predicted alone
        ([0, 0], [0, 1], 0.0, 0.0),
        ([1, 1, 0, 0], [1, 0, 1, 0], 100 / 3, 50.0),
    ],
)
def test_binary_images(pred: list[int], label: list[int], iou: float, acc: float):
    counts = count(torch.tensor([pred]), torch.tensor([label], dtype=torch.uint8), 2).numpy()[None]
    rows = image_scores(counts)
    assert rows["mIoUI"][0] == pytest.approx(iou)
    assert rows["mAccI"][0] == pytest.approx(acc, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_predictions_of_any_integer_type_and_the_most_classes(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    pred, label = (torch.randint(0, 255, (30, 40), generator=generator) for _ in range(2))
    pred[:15], label[0] = label[:15], 255
    before = pred.clone(), label.clone()
    got = count(pred.to(dtype), label.to(torch.uint8), 255)
    assert got.transpose(0, 1).tolist() == [list(row) for row in literal_counts(pred.numpy(), label.numpy(), 255)]
    assert torch.equal(pred, before[0])
    assert torch.equal(label, before[1])


def predictions_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (3, 32, 32), generator=generator)
    other = torch.randint(0, 5, (3, 32, 32), generator=generator)
    return torch.where(torch.rand(3, 32, 32, generator=generator) < 0.7, label, other), label


def test_agrees_with_segmentation_models_pytorch_where_the_definitions_meet():
    """mIoUD with every class present is the macro IoU of the summed counts."""
    from segmentation_models_pytorch.metrics import get_stats, iou_score

    pred, label = predictions_and_labels()
    counts = torch.stack([count(p, t, 5) for p, t in zip(pred, label)]).numpy()
    stats = get_stats(pred, label, mode="multiclass", num_classes=5)
    assert compute_scores(counts)["mIoUD"] == pytest.approx(100 * iou_score(*stats, reduction="macro").item(), abs=1e-4)


def test_agrees_with_torchmetrics_where_the_definitions_meet():
    """D is the macro score of all pixels, I that of each image, Acc the share of right pixels; 255 ignored."""
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_f1_score,
        multiclass_jaccard_index,
    )

    pred, label = predictions_and_labels()
    label[:, :3] = 255
    counts = torch.stack([count(p, t, 5) for p, t in zip(pred, label)]).numpy()
    scores, options = compute_scores(counts), {"num_classes": 5, "ignore_index": 255}
    theirs = {"mAcc": multiclass_accuracy, "mIoU": multiclass_jaccard_index, "mDice": multiclass_f1_score}
    for name, function in theirs.items():
        assert scores[f"{name}D"] == pytest.approx(100 * function(pred, label, **options).item(), abs=1e-4)
        by_image = [100 * function(p, t, **options).item() for p, t in zip(pred[:, None], label[:, None])]
        assert scores[f"{name}I"] == pytest.approx(np.mean(by_image), abs=1e-4)
    right = multiclass_accuracy(pred, label, average="micro", **options)
    assert scores["Acc"] == pytest.approx(100 * right.item(), abs=1e-4)


def literal_boundary(label: np.ndarray, c: int, width: int) -> set[tuple[int, int]]:
    """The pixels of class c from which some pixel of another class, or outside, is at most `width` away."""
    height, length = label.shape
    found = set()
    for y, x in zip(*np.nonzero(label == c)):
        rows, columns = range(y - width, y + width + 1), range(x - width, x + width + 1)
        inside = [(r, k) for r in rows for k in columns if 0 <= r < height and 0 <= k < length]
        if len(inside) < (2 * width + 1) ** 2 or any(label[place] not in (c, 255) for place in inside):
            found.add((y, x))
    return found


@pytest.mark.parametrize("size", [(9, 11), (40, 60), (1, 200)])
def test_boundary_iou_is_the_literal_one(size: tuple[int, int]):
    """Widths of 1, 2 and 4 pixels; blocks that touch, ignored bands between them, and noise."""
    rng, width = np.random.default_rng(sum(size)), max(1, round(0.02 * np.hypot(*size)))
    coarse = rng.integers(0, 4, (4, 4)).repeat(-(-size[0] // 3), 0).repeat(-(-size[1] // 3), 1).astype(np.uint8)
    label, pred = coarse[: size[0], : size[1]].copy(), coarse[-size[0] :, -size[1] :].copy()
    label[rng.random(size) < 0.02], pred[rng.random(size) < 0.02] = 255, 3
    label[:, size[1] // 2] = 255
    seen = np.where(label == 255, 255, pred)
    expected = np.zeros((2, 4), np.int64)
    for c in range(4):
        own, other = (literal_boundary(values, c, width) for values in (label, seen))
        expected[:, c] = len(own & other), len(own | other)
    got = boundary_iou(torch.from_numpy(pred).long(), torch.from_numpy(label), 4)
    assert (got.numpy() == expected).all()
    assert expected[1].max() > expected[0].max() > 0


def test_a_perfect_prediction_has_a_boundary_iou_of_one_hundred():
    label = torch.zeros(40, 50, dtype=torch.uint8)
    label[10:20, 15:30] = 2
    part, whole = boundary_iou(label.long(), label, 3)
    assert torch.equal(part, whole)
    assert whole.tolist() == [2 * (40 + 50) - 4 + 2 * (12 + 17) - 4, 0, 2 * (10 + 15) - 4], "edges of the image count"


def test_the_tables_of_metrics_have_the_same_names():
    assert METRICS.keys() == METRIC_TABLE.keys()


def test_a_further_metric_is_a_function_and_its_line(monkeypatch):
    """The share of a class's pixels in the upper half that are right: D, I, C, per case, per class."""

    def upper(pred: torch.Tensor, label: torch.Tensor, num_classes: int) -> torch.Tensor:
        half = len(label) // 2
        tp, _, fn = count(pred[:half], label[:half], num_classes)
        return torch.stack([tp, tp + fn])

    monkeypatch.setitem(METRICS, "upper", upper)
    monkeypatch.setitem(METRIC_TABLE, "upper", "Up")
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 3, (2, 6, 8, 10), generator=generator)
    maps[1, 2, :4] = 255
    table = np.stack([count_rules([p], t, 3, ("upper",)).numpy() for p, t in zip(*maps)])
    (result,) = build_results(["r"], tuple("abcdef"), tuple("xyz"), table, [None] * 6, ("upper",))
    scores, plain = result.scores(), compute_scores(result.counts[:, :3])
    assert plain == {name: value for name, value in scores.items() if "Up" not in name}
    assert {f"mUp{end}" for end in ("D", "I", "I5", "IQ", "C", "C10")} <= scores.keys()
    upper_half = np.stack([count(p[:4], t[:4], 3).numpy() for p, t in zip(*maps)])
    assert scores["mUpD"] == compute_scores(upper_half)["mAccD"]
    by_image = (
        np.delete(image_scores(upper_half)["mAccI"], 2),
        np.delete(image_scores(result.counts, ("upper",))["mUpI"], 2),
    )
    assert (by_image[0] == by_image[1]).all()
    assert math.isnan(image_scores(result.counts, ("upper",))["mUpI"][2])
    assert per_class_scores(result.counts, None, ("upper",))["UpD"][1] == per_class_scores(upper_half)["AccD"][1]
    (cases,) = build_results(["r"], tuple("abcdef"), tuple("xyz"), table, list("kkkmmm"), ("upper",))
    assert "mUp3D" in cases.scores()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_counting_leaves_prediction_and_label_as_they_are(dtype: torch.dtype):
    rng = torch.Generator().manual_seed(0)
    pred, label = (torch.randint(0, 3, (9, 8), generator=rng).to(dtype) for _ in range(2))
    label[0, 0] = 255
    before = pred.clone(), label.clone()
    counts = count_rules([pred, pred], label, 3, ["boundary_iou"])
    assert torch.equal(pred, before[0])
    assert torch.equal(label, before[1])
    assert torch.equal(counts[0], counts[1])
    assert counts[0, 0].sum() == ((pred == label) & (label != 255)).sum()
