"""Images per second out of one worker, beside the paper's order of work and the bare decoding, on generated files.

    python scripts/benchmarks/benchmark_loader.py --output loader.json     # some two minutes

voc: 500x375 JPEGs with palette PNGs, crops of 512x512. cityscapes: 2048x1024 PNGs with grey PNGs, crops of 512x1024.
The paper's order: decode, float32, resize the whole image, flip, pad, crop, normalise, all with OpenCV. Ours: decode,
one warp of the crop in uint8; normalisation is left to the device, and timed here on its own. Each round measures the
three one after another; rates and ratios are medians over the rounds. OpenCV uses one thread everywhere.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from exp.config.training import ScheduleConfig
from exp.data.base import IGNORE_INDEX
from exp.data.decode import read_image, read_label
from exp.data.loader import build_train_loader
from exp.data.sets.folder import Folder
from exp.data.transforms import Normalize, RandomCrop
from exp.runtime.distributed import Dist
from exp.runtime.errors import run_and_report

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SCALES, BATCH = (0.5, 2.0), 8
COLOURS = np.random.default_rng(0).integers(0, 256, (21, 3)).tolist()


@dataclass(frozen=True)
class Case:
    """Generated files and the crops that are cut from them; sizes are (height, width)."""

    name: str
    size: tuple[int, int]
    suffix: str
    crop_size: tuple[int, int]
    num_files: int


CASES = (Case("voc", (375, 500), ".jpg", (512, 512), 64), Case("cityscapes", (1024, 2048), ".png", (512, 1024), 16))


class PaperOrder(Dataset):
    """The same files in the paper's order of work -> (3, H, W) float32 image, (H, W) int64 label."""

    def __init__(self, folder: Folder, crop_size: tuple[int, int]) -> None:
        self.folder, self.crop_size = folder, crop_size

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index, draw = key
        sample, rng = self.folder.samples[index], np.random.default_rng((0, draw))
        image = cv2.cvtColor(cv2.imread(str(sample.image), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB).astype(np.float32)
        label = np.asarray(Image.open(sample.label))
        scale = rng.uniform(*SCALES)
        size = round(image.shape[1] * scale), round(image.shape[0] * scale)
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
        if rng.random() < 0.5:
            image, label = cv2.flip(image, 1), cv2.flip(label, 1)
        below, right = (max(0, crop - side) for crop, side in zip(self.crop_size, label.shape))
        image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=MEAN)
        label = cv2.copyMakeBorder(label, 0, below, 0, right, cv2.BORDER_CONSTANT, value=IGNORE_INDEX)
        top, left = (int(rng.integers(side - crop + 1)) for side, crop in zip(label.shape, self.crop_size))
        rows, columns = slice(top, top + self.crop_size[0]), slice(left, left + self.crop_size[1])
        image = (image[rows, columns] - np.float32(MEAN)) / np.float32(STD)
        image = np.ascontiguousarray(image.transpose(2, 0, 1))
        return torch.from_numpy(image), torch.from_numpy(label[rows, columns].astype(np.int64))


def write_files(folder: Path, case: Case) -> None:
    """Pictures with structure at every scale and a little noise, and labels of large regions with curved edges."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    height, width = case.size
    for i in range(case.num_files):
        rng = np.random.default_rng(i)
        image = rng.normal(110, 2, (height, width, 3)).astype(np.float32)
        for cell in (4, 16, 64, 256):
            coarse = rng.uniform(-1, 1, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
            image += 3.6 * cell**0.5 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        coarse = rng.normal(size=(height // 128 + 2, width // 128 + 2, len(COLOURS))).astype(np.float32)
        label = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).argmax(-1).astype(np.uint8)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i}{case.suffix}", quality=90)
        picture = Image.fromarray(label)
        if case.suffix == ".jpg":
            picture.putpalette(np.array(COLOURS, np.uint8).tobytes())
        picture.save(folder / "labels" / f"{i}.png")


def open_folder(root: Path, case: Case, transform: RandomCrop | None) -> Folder:
    facts = {
        "images": f"{case.name}/images",
        "labels": f"{case.name}/labels",
        "classes": tuple(map(str, range(len(COLOURS)))),
    }
    return Folder(root, "train", transform=transform, facts=facts)


def our_loader(folder: Folder, num_batches: int) -> Iterable:
    schedule = ScheduleConfig("benchmark", batch_size=BATCH, train_iters=num_batches, num_workers=1)
    return build_train_loader(folder, schedule, 0, num_batches, 0, Dist(0, 1, torch.device("cpu")))


def paper_loader(dataset: PaperOrder, num_batches: int) -> Iterable:
    num_files = len(dataset.folder)
    batches = [[((b * BATCH + i) % num_files, b * BATCH + i) for i in range(BATCH)] for b in range(num_batches)]
    return DataLoader(dataset, batch_sampler=batches, num_workers=1, worker_init_fn=one_thread)


def one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


def loader_rate(loader: Iterable, num_batches: int) -> float:
    """Images per second after the first batch, which holds the worker's start."""
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return (num_batches - 1) * BATCH / (time.perf_counter() - start)


def decoding_rate(folder: Folder, num_images: int) -> float:
    start = time.perf_counter()
    for i in range(num_images):
        sample = folder.samples[i % len(folder)]
        read_image(sample.image), read_label(sample.label)
    return num_images / (time.perf_counter() - start)


def seconds(function: Callable[[], object], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(root: Path, case: Case, num_batches: int, rounds: int) -> dict[str, object]:
    write_files(root / case.name, case)
    ours = open_folder(root, case, RandomCrop(case.crop_size, SCALES, 0.5, tuple(map(round, MEAN)), 0))
    paper = PaperOrder(ours, case.crop_size)
    rows = []
    for _ in range(rounds):
        rows.append(
            {
                "ours": loader_rate(our_loader(ours, num_batches), num_batches),
                "paper's order": loader_rate(paper_loader(paper, num_batches), num_batches),
                "bare decoding": decoding_rate(ours, (num_batches - 1) * BATCH),
            }
        )
    batch = torch.randint(0, 256, (BATCH, 3, *case.crop_size), dtype=torch.uint8)
    normalize = seconds(lambda: Normalize(MEAN, STD)(batch)) / BATCH
    return {
        "images_per_second": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "ours_to_paper": statistics.median(row["ours"] / row["paper's order"] for row in rows),
        "ours_to_decoding": statistics.median(row["ours"] / row["bare decoding"] for row in rows),
        "normalisation_on_this_cpu_ms_per_image": 1000 * normalize,
        "rounds": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="(default: 7)")
    parser.add_argument("--batches", type=int, nargs=2, default=(41, 7), metavar=("VOC", "CITYSCAPES"))
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as root:
        for case, num_batches in zip(CASES, args.batches):
            result = results[case.name] = measure(Path(root), case, num_batches, args.rounds)
            rates = ", ".join(f"{name} {rate:.1f}" for name, rate in result["images_per_second"].items())
            print(f"{case.name}: images/s: {rates}")
            print(
                f"  ours / paper's order {result['ours_to_paper']:.2f}, ours / bare decoding "
                f"{result['ours_to_decoding']:.2f}; normalisation of a batch on this CPU "
                f"{result['normalisation_on_this_cpu_ms_per_image']:.2f} ms an image"
            )
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_and_report(main))
