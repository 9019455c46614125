"""ECE and SCE against loops over pixels and bins, and against torchmetrics where the definitions meet."""

import math

import numpy as np
import pytest
import torch

from exp.evaluation import calibration
from exp.evaluation.calibration import calibration_scores, count_calibration, mean_entropy


def counts_of(prob: torch.Tensor, label: torch.Tensor, *num_bins: int) -> np.ndarray:
    return count_calibration(prob, label, *num_bins).numpy()


def literal_error(rows: list[tuple[float, bool]], num_bins: int) -> float:
    """(confidence, right or wrong) of each pixel -> the expected calibration error in percent, by loops."""
    total = 0.0
    for b in range(num_bins):
        inside = [(p, hit) for p, hit in rows if min(int(p * num_bins), num_bins - 1) == b]
        if inside:
            confidence = sum(p for p, _ in inside) / len(inside)
            accuracy = sum(hit for _, hit in inside) / len(inside)
            total += len(inside) / len(rows) * abs(accuracy - confidence)
    return 100 * total


def literal_errors(pixels: list[tuple[list[float], int]], num_bins: int) -> tuple[float, float]:
    """(probabilities, label) of each pixel -> ECE, SCE."""
    if not pixels:
        return math.nan, math.nan
    top = [(max(p), p.index(max(p)) == label) for p, label in pixels]
    by_class = [literal_error([(p[c], label == c) for p, label in pixels], num_bins) for c in range(len(pixels[0][0]))]
    return literal_error(top, num_bins), sum(by_class) / len(by_class)


def literal_paper_error(pixels: list[tuple[list[float], int]], classes: object, num_bins: int) -> float:
    """(probabilities, label) of each pixel -> the SCE of the paper's code over these classes, per mille; 0 for none."""
    if not pixels:
        return 0.0
    rows = {c: [(p[c], p.index(max(p)) == label == c) for p, label in pixels] for c in classes}
    return 10 * sum(literal_error(rows[c], num_bins) for c in classes) / len(rows)


def random_image(rng: np.random.Generator, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, C, H, W) float64 probabilities, confident or not, some exactly equal; (H, W) labels, some of them 255."""
    shape = tuple(rng.integers(1, 7, 2))
    logits = rng.normal(size=(num_classes, *shape)) * rng.choice([0.0, 0.3, 2.0, 20.0])
    prob = torch.from_numpy(logits).softmax(0)
    label = rng.integers(0, num_classes, shape).astype(np.uint8)
    label[rng.random(shape) < rng.choice([0.0, 0.3, 1.0], p=[0.5, 0.4, 0.1])] = 255
    return prob[None], torch.from_numpy(label)


@pytest.mark.parametrize("case", range(30))
def test_a_gpus_way_to_count_gives_the_same_counts(case: int, monkeypatch: pytest.MonkeyPatch):
    prob, label = random_image(np.random.default_rng(case), 5)
    expected = count_calibration(prob, label)
    monkeypatch.setattr(calibration, "_count_piece", calibration._count_piece_on_gpu)
    torch.testing.assert_close(count_calibration(prob, label), expected, rtol=1e-12, atol=1e-12)


def pixels_of(prob: torch.Tensor, label: torch.Tensor) -> list[tuple[list[float], int]]:
    columns = prob[0].flatten(1).T.tolist()
    return [(p, t) for p, t in zip(columns, label.flatten().tolist()) if t != 255]


@pytest.mark.parametrize("case", range(100))
def test_equal_to_the_literal_definitions(case: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(case)
    num_classes, num_bins = int(rng.choice([2, 3, 5, 21])), int(rng.choice([1, 4, 10, 15]))
    monkeypatch.setitem(calibration.PIECE_ELEMENTS, "cpu", int(rng.choice([1, 50, 2**19])))
    images = [random_image(rng, num_classes) for _ in range(rng.integers(1, 5))]
    counts = np.stack([counts_of(prob, label, num_bins) for prob, label in images])
    assert counts.shape == (len(images), num_classes + 1, 4, num_bins)
    pixels = [pixels_of(prob, label) for prob, label in images]
    pooled = literal_errors([pixel for image in pixels for pixel in image], num_bins)
    by_image = np.array([literal_errors(image, num_bins) for image in pixels])
    by_image = by_image[~np.isnan(by_image).any(1)]
    mean = by_image.mean(0) if len(by_image) else np.full(2, np.nan)
    want = {"ECED": pooled[0], "ECEI": mean[0], "SCED": pooled[1], "SCEI": mean[1]}
    labels = [set(label.flatten().tolist()) for _, label in images]
    every = [1] if num_classes == 2 else range(num_classes)
    want["SCED_paper"] = literal_paper_error([pixel for image in pixels for pixel in image], every, num_bins)
    of_images = [
        literal_paper_error(image, every if num_classes == 2 else {min(v, num_classes - 1) for v in found}, num_bins)
        for image, found in zip(pixels, labels)
    ]
    want["SCEI_paper"] = sum(of_images) / len(of_images)
    got = calibration_scores(counts)
    assert got.keys() == want.keys()
    for name in want:
        assert got[name] == pytest.approx(want[name], abs=1e-9, nan_ok=True), name


def test_cases_are_averaged_after_their_slices():
    rng = np.random.default_rng(0)
    counts = np.stack([counts_of(*random_image(rng, 3)) for _ in range(5)])
    single = [calibration_scores(counts[i : i + 1])["ECEI"] for i in range(5)]
    expected = np.nanmean([np.nanmean(single[:1] + single[4:]), np.nanmean(single[1:4])])
    found = calibration_scores(counts, ("a", "b", "b", "b", "a"))
    assert found["ECEI"] == pytest.approx(expected)
    volumes = [calibration_scores(counts[own])["ECED"] for own in ([0, 4], [1, 2, 3])]
    assert found["ECE3D"] == pytest.approx(np.nanmean(volumes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_precisions_and_layouts(dtype: torch.dtype):
    """Channels last and half precision give what float64 of the same numbers gives, but for the rounding of sums."""
    generator = torch.Generator().manual_seed(0)
    prob = (3 * torch.randn(1, 6, 40, 50, generator=generator)).softmax(1).to(dtype)
    label = torch.randint(0, 6, (40, 50), generator=generator).to(torch.uint8)
    label[:5] = 255
    got = counts_of(prob.to(memory_format=torch.channels_last), label)
    if dtype == torch.float32:  # of coarser numbers some lie on the edges of bins
        assert np.allclose(got, counts_of(prob.double(), label), rtol=0, atol=1e-3)  # of sums up to 350
    assert (got == counts_of(prob.float(), label)).all()
    assert got[:, 0].sum(1).tolist() == [35 * 50] * 7


def test_a_perfectly_calibrated_network():
    """Of pixels with 0.75 for class 0 three quarters are class 0."""
    prob = torch.tensor([0.75, 0.25])[None, :, None, None].expand(1, 2, 2, 2)
    scores = calibration_scores(counts_of(prob, torch.tensor([[0, 0], [0, 1]], dtype=torch.uint8))[None])
    assert [scores[name] for name in ("ECED", "ECEI", "SCED", "SCEI")] == pytest.approx([0, 0, 0, 0])
    assert scores["SCED_paper"] == pytest.approx(250), "argmax never decides for the foreground: no pixel is a hit"


def test_agrees_with_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(0)
    prob = (2 * torch.randn(1, 5, 60, 70, generator=generator)).softmax(1)
    label = torch.randint(0, 5, (60, 70), generator=generator)
    label[:7] = 255
    theirs = multiclass_calibration_error(prob, label[None], num_classes=5, n_bins=10, ignore_index=255)
    ours = calibration_scores(counts_of(prob, label.to(torch.uint8))[None])["ECED"]
    assert ours == pytest.approx(100 * theirs.item(), abs=1e-4)


def test_inputs_are_not_changed():
    prob, label = random_image(np.random.default_rng(3), 4)
    before = prob.clone(), label.clone()
    count_calibration(prob, label)
    assert torch.equal(prob, before[0])
    assert torch.equal(label, before[1])


def test_the_entropy_is_the_mean_over_the_pixels_that_count():
    torch.manual_seed(0)
    prob = torch.randn(1, 5, 9, 13).softmax(1)
    label = torch.zeros(9, 13, dtype=torch.uint8)
    label[:4] = 255
    rows = [-(p * p.log()).sum() for y in (4, 8) for x in (0, 4, 8, 12) for p in [prob[0, :, y, x].double()]]
    assert mean_entropy(prob, label) == pytest.approx(torch.stack(rows).mean().item(), rel=1e-6)
    assert math.isnan(mean_entropy(prob, torch.full((9, 13), 255, dtype=torch.uint8)))
    certain = torch.zeros(1, 2, 4, 4)
    certain[0, 1] = 1
    assert mean_entropy(certain, torch.zeros(4, 4, dtype=torch.uint8)) == 0
