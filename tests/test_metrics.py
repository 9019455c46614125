"""The scores against a slow, literal reading of their definitions."""

import math

import numpy as np
import pytest
import torch

from exp.metrics import compute_scores, count, image_scores, per_class_scores


def literal_counts(pred: np.ndarray, label: np.ndarray, num_classes: int) -> list[tuple[int, int, int]]:
    rows = []
    for c in range(num_classes):
        keep = label != 255
        tp = int(((pred == c) & (label == c) & keep).sum())
        rows.append(
            (tp, int(((pred == c) & (label != c) & keep).sum()), int(((pred != c) & (label == c) & keep).sum()))
        )
    return rows


def ratio(name: str, tp: int, fp: int, fn: int) -> float:
    top, bottom = {"Acc": (tp, tp + fn), "IoU": (tp, tp + fp + fn), "Dice": (2 * tp, 2 * tp + fp + fn)}[name]
    return 100 * top / bottom if bottom else math.nan


def mean(values: list[float]) -> float:
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan


def literal_scores(images: list[list[tuple[int, int, int]]]) -> dict[str, float]:
    """Counts by image and class -> the scores, by loops."""
    num_classes, binary = len(images[0]), len(images[0]) == 2
    judged = [1] if binary else range(num_classes)
    total = [tuple(sum(image[c][k] for image in images) for k in range(3)) for c in range(num_classes)]
    right, pixels = sum(t[0] for t in total), sum(t[0] + t[2] for t in total)
    scores = {"Acc": 100 * right / pixels if pixels else math.nan}

    def active(image: list[tuple[int, int, int]], c: int) -> bool:
        tp, fp, fn = image[c]
        return tp + fn > 0 or (binary and fp > 0)

    for name in ("Acc", "IoU", "Dice"):
        scores[f"m{name}D"] = mean([ratio(name, *total[c]) for c in judged])
        per_image = []
        for image in images:
            present = [c for c in range(num_classes) if active(image, c)]
            if binary:
                per_image.append(100.0 if len(present) < 2 else ratio(name, *image[1]))
            else:
                per_image.append(mean([ratio(name, *image[c]) for c in present]))
        scores[f"m{name}I"] = mean(per_image)
        scores[f"m{name}C"] = mean(
            [mean([ratio(name, *image[c]) for image in images if active(image, c)]) for c in range(num_classes)]
        )
    return scores


@pytest.mark.parametrize("case", range(200))
def test_scores_equal_the_literal_definitions(case: int):
    rng = np.random.default_rng(case)
    num_classes = int(rng.choice([2, 3, 5, 21]))
    images = []
    for _ in range(rng.integers(1, 6)):
        shape = tuple(rng.integers(1, 9, 2))
        present = rng.choice(num_classes, rng.integers(1, num_classes + 1), replace=False)
        label, pred = rng.choice(present, shape), rng.integers(0, num_classes, shape)
        pred = np.where(rng.random(shape) < 0.6, label, pred)
        label = np.where(rng.random(shape) < rng.choice([0.0, 0.2, 1.0]), 255, label)
        images.append((pred, label))
    counts = np.stack([count(torch.from_numpy(p), torch.from_numpy(t), num_classes).numpy() for p, t in images])
    expected = [literal_counts(p, t, num_classes) for p, t in images]
    assert counts.transpose(0, 2, 1).tolist() == [[list(row) for row in image] for image in expected]
    got, want = compute_scores(counts), literal_scores(expected)
    assert got.keys() >= want.keys()
    for name in want:
        assert got[name] == pytest.approx(want[name], abs=1e-9, nan_ok=True), name


def test_a_small_case_by_hand():
    """Image 1: label 0 0 1 1, prediction 0 1 1 2. Image 2: label 1 255, prediction 1 0. Three classes."""
    first = count(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8), 3)
    second = count(torch.tensor([[1, 0]]), torch.tensor([[1, 255]], dtype=torch.uint8), 3)
    assert first.tolist() == [[1, 1, 0], [0, 1, 1], [1, 1, 0]]
    counts = torch.stack([first, second]).numpy()
    scores, rows, by_class = compute_scores(counts), image_scores(counts), per_class_scores(counts)
    assert rows["mIoUI"].tolist() == pytest.approx([100 * (1 / 2 + 1 / 3) / 2, 100])
    assert scores["mIoUI"] == pytest.approx((100 * 5 / 12 + 100) / 2)
    assert scores["mIoUC"] == pytest.approx((50 + (100 / 3 + 100) / 2) / 2)
    assert scores["mIoUD"] == pytest.approx((50 + 50 + 0) / 3)  # class 2: predicted only
    assert scores["Acc"] == pytest.approx(60)
    assert np.isnan(by_class["IoUC"][2])


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


def test_agrees_with_segmentation_models_pytorch_where_the_definitions_meet():
    """mIoUD with every class present is the macro IoU of the summed counts."""
    from segmentation_models_pytorch.metrics import get_stats, iou_score

    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (3, 32, 32), generator=generator)
    pred = torch.where(
        torch.rand(3, 32, 32, generator=generator) < 0.7, label, torch.randint(0, 5, (3, 32, 32), generator=generator)
    )
    counts = torch.stack([count(p, t, 5) for p, t in zip(pred, label)]).numpy()
    stats = get_stats(pred, label, mode="multiclass", num_classes=5)
    assert compute_scores(counts)["mIoUD"] == pytest.approx(100 * iou_score(*stats, reduction="macro").item(), abs=1e-4)
