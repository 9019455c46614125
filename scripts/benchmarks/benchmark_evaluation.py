"""Where the time of an evaluation goes: loading, forward pass, each rule's decision, counting, calibration, writing.

    python scripts/benchmarks/benchmark_evaluation.py  # about a minute on two cores
    python scripts/benchmarks/benchmark_evaluation.py --threads 1 --images 40 --output evaluation.json

Generated JPEGs of 512x512 pixels with 21-class labels go through exp.evaluation.evaluator as in a test-only run, by a
deeplabv3plus_resnet18d with random weights. Such a network has no opinion, and a rule would have nothing to do: logits
that follow the image's colours, sharp as a trained network's, are put in the place of its own (the time of that counts
as forward pass); the share of classes that RankSEG-RMA prunes is printed (about nine of ten on real maps of VOC). The
images are evaluated under argmax and rankseg_rma, then under one rule more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exp.evaluation.evaluator import Evaluator, Timing

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SIZE, NUM_CLASSES = 512, 21
SHARPNESS = 300  # of the logits, per squared distance of colours in 0..1
RULES = ("argmax", "rankseg_rma", "rankseg_rma_iou")


def write_images(root: Path, number: int) -> None:
    """A VOCdevkit of `number` validation images: patches in the colours of 1 to 4 classes, with noise."""
    import numpy as np
    from PIL import Image

    folder = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    rng, names = np.random.default_rng(0), [f"2007_{i:06d}" for i in range(number)]
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(names) + "\n")
    for name in names:
        present = rng.choice(NUM_CLASSES, rng.integers(1, 5), replace=False)
        coarse = Image.fromarray(present[rng.integers(0, len(present), (6, 6))].astype(np.uint8))
        label = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.NEAREST))
        image = colours()[label] + rng.normal(0, 20, (SIZE, SIZE, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg", quality=90)
        Image.fromarray(label).save(folder / "SegmentationClass" / f"{name}.png")


def colours():
    """(21, 3) float: the mean colour of each class."""
    import numpy as np

    return np.random.default_rng(1).uniform(40, 215, (NUM_CLASSES, 3))


def build_model():
    """The network, whose logits give way to the nearness of smoothed colours to those of the classes."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from exp.config.experiment import load_groups
    from exp.models import build_model as build

    config = load_groups({"model": ["deeplabv3plus_resnet18d"]}, ["model.variant=library"])["model"]
    means = torch.from_numpy(colours() / 255).float()

    class Opinionated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = build(config, NUM_CLASSES, pretrained=False)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            own = self.network(image)
            small = F.avg_pool2d(image, 8).permute(0, 2, 3, 1)
            logits = -SHARPNESS * torch.cdist(small.flatten(1, 2), means.expand(len(image), -1, -1)) ** 2
            logits = logits.transpose(1, 2).unflatten(2, small.shape[1:3])
            return F.interpolate(logits, image.shape[-2:], mode="bilinear") + 0 * own

    return Opinionated().eval().to(memory_format=torch.channels_last)


def build_evaluator(data_dir: Path, rules: tuple[str, ...], workers: int) -> Evaluator:
    import torch

    from exp.config.cli import DEFAULT_YAMLS
    from exp.config.experiment import load_experiment
    from exp.evaluation.evaluator import build_evaluator as build
    from exp.runtime.distributed import Dist

    names = {**DEFAULT_YAMLS, "data": "pascal_voc", "predict": list(rules)}
    yamls = {group: name if isinstance(name, list) else [name] for group, name in names.items()}
    overrides = ["data.crop_size=[512,512]", f"schedule.num_workers={workers}", "data.mean=[0,0,0]", "data.std=[1,1,1]"]
    config = load_experiment(yamls, overrides, 0)
    return build(config, str(data_dir), Dist(0, 1, torch.device("cpu")))


def pruned_share(evaluator: Evaluator, model) -> float:
    """The share of classes that are nowhere more probable than 0.1, over the first five images."""
    maps = (
        evaluator.probabilities(model, evaluator.dataset[i].image[None]) for i in range(min(5, len(evaluator.dataset)))
    )
    shares = [(prob[0].flatten(1).amax(1) <= 0.1).float().mean().item() for prob in maps]
    return sum(shares) / len(shares)


def measure(evaluator: Evaluator, model, folder: Path) -> dict:
    """Run once -> milliseconds per image by step, and the share of all that is not the forward pass."""
    from exp.evaluation.results import report_results

    start = time.perf_counter()
    evaluation = evaluator(model)
    middle = time.perf_counter()
    contexts = [{} for _ in evaluation.results]
    report_results(evaluation.results, folder, contexts, metric="mIoUI", calibration=evaluation.calibration)
    return breakdown(evaluation.timing, middle - start, time.perf_counter() - middle)


def breakdown(timing: Timing, seconds: float, writing: float) -> dict:
    values = timing.to_dict()
    steps = {**values["milliseconds_per_image"], **values["decision_milliseconds_per_image"]}
    whole = 1000 * seconds / timing.num_images
    steps["other"] = whole - sum(steps.values())  # between the steps
    steps["comparison and files"] = 1000 * writing / timing.num_images
    whole += steps["comparison and files"]
    return {"milliseconds_per_image": steps, "whole": whole, "besides_forward": 1 - steps["forward"] / whole}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: 0, loading is in the sum)")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as exp/main.py
    import torch

    torch.set_num_threads(args.threads)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.images)
        model = build_model()
        warm_up = build_evaluator(Path(folder), RULES, 0)
        pruned = pruned_share(warm_up, model)
        for rules in (RULES[:2], RULES):
            evaluator = build_evaluator(Path(folder), rules, args.workers)
            found[" ".join(rules)] = measure(evaluator, model, Path(folder) / f"results{len(rules)}")
    print(f"{100 * pruned:.0f} % of the classes are pruned")
    for rules, figures in found.items():
        print(f"{rules}, {args.images} images of {SIZE}x{SIZE}, {args.threads} thread(s): milliseconds per image")
        for name, value in figures["milliseconds_per_image"].items():
            print(f"  {name:<22}{value:9.2f}  {100 * value / figures['whole']:5.1f} %")
        print(f"  besides the forward pass: {100 * figures['besides_forward']:.1f} %")
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
