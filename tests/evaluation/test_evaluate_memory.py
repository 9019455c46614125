"""150 classes at 2000 x 3000 pixels within 6 GiB, of which the float32 logits alone are 3.4."""

import resource
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SIZE, NUM_CLASSES = (2000, 3000), 150


def evaluate() -> None:
    """A network of one small layer over one large image under three rules; prints the peak in GiB."""
    import numpy as np
    import torch
    from torch import nn

    from exp.data.base import Sample
    from exp.data.sets.shapes import Shapes
    from exp.evaluation.evaluator import Evaluator
    from exp.evaluation.inference import Inference
    from exp.rules.pooled import Thresholds
    from exp.rules.registry import argmax
    from exp.runtime.distributed import Dist
    from rankseg_rma import rankseg_rma

    class Large(Shapes):
        classes = tuple(f"class {i}" for i in range(NUM_CLASSES))
        palette = ((0, 0, 0),) * NUM_CLASSES

        def list_samples(self) -> list[Sample]:
            return [Sample("large", None, None)]

        def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            rng = np.random.default_rng(0)
            image = rng.integers(0, 256, (SIZE[0] // 50, SIZE[1] // 50, 3), np.uint8).repeat(50, 0).repeat(50, 1)
            return image, (image[..., 0] % NUM_CLASSES).astype(np.uint8)

    torch.manual_seed(0)
    network = nn.Conv2d(3, NUM_CLASSES, 1)
    network.weight.data *= 10
    fixed = Thresholds("dice", *([value] * NUM_CLASSES for value in (0.3, 1e5, 8e4, 1e5, True, 0.0)))
    evaluator = Evaluator(
        dataset=Large(None, "val"),
        rules={"argmax": argmax, "rankseg_rma": rankseg_rma, "fixed": fixed.decide},
        inference=Inference((512, 512), (512, 512), 1),
        normalize=lambda image: image / 255,
        num_workers=0,
        dist=Dist(0, 1, torch.device("cpu")),
        calibration=True,
        cache_bytes=2**30,
    )
    evaluation = evaluator(network)
    assert evaluation.results[0].counts.shape == (1, 3, NUM_CLASSES)
    print(evaluation.timing, file=sys.stderr)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


@pytest.mark.slow
def test_a_large_image_of_many_classes_fits_in_six_gib():
    code = "from tests.evaluation import test_evaluate_memory as test; test.evaluate()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    print(done.stdout, done.stderr[-600:])
    assert float(done.stdout) < 6
