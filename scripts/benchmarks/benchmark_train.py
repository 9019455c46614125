"""What the training loop adds to a bare PyTorch loop, and how long a run takes to its first step.

Both loops take the same weights, batches, optimiser and criterion; they run in turns, a block of steps each, in one
process, and the ratio is that of the medians over the blocks. The bare loop is what one would write by hand: to the
device, normalise, forward, loss, backward, step, schedule. What the training loop does besides is seeds, normalisation
of the loss over processes, sums for the log, the log itself (a line every 50 steps) and the timing of it.

    python scripts/benchmarks/benchmark_train.py  # the loop; some three minutes on two cores
    python scripts/benchmarks/benchmark_train.py --startup  # main.py to its first step on shapes, default flags
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as exp/main.py; before PyTorch is imported

BLOCK = 10  # steps of one loop before the other has its turn


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_yaml", default="unet_mobilenetv3_small_100")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30, help=f"blocks of {BLOCK} steps a loop")
    parser.add_argument("--num_workers", type=int, default=0, help="0: reading the images is in both loops' time")
    parser.add_argument("--startup", action="store_true", help="measure the start of main.py instead")
    parser.add_argument("--repeats", type=int, default=5, help="starts to measure")
    return parser.parse_args(argv)


def measure_startup(repeats: int) -> list[float]:
    """Seconds from the call of main.py to the end of its first step, by the time in its log, for each start."""
    seconds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--output_dir", folder, "--set", "schedule.log_iters=1", "schedule.train_iters=1"]
            before = time.time()
            subprocess.run([sys.executable, ROOT / "exp" / "main.py", *flags], check=True, capture_output=True)
            log = next(Path(folder).glob("*/log.jsonl"))
            seconds.append(json.loads(log.read_text().splitlines()[0])["time"] - before)
    return seconds


def bare_loop(step, batches: Iterator, count: int) -> None:
    """`count` steps as one would write them by hand, on the parts of a TrainStep."""
    for _ in range(count):
        batch = next(batches).to(step.dist.device)
        step.optimizer.zero_grad(set_to_none=True)
        outputs = step.model(step.normalize(batch.image))
        step.criterion(outputs, batch.label, step.criterion.count(batch.label)).backward()
        step.optimizer.step()
        step.scheduler.step()


def make_loops(args: argparse.Namespace, folder: Path) -> tuple[dict, object]:
    """-> {"bare" or "exp": (step, its endless batches)}, each with its own copy of one network, and a logger."""
    from torch import channels_last, device

    from exp.config.cli import DEFAULT_YAMLS
    from exp.config.experiment import load_experiment
    from exp.data.loader import build_train_loader
    from exp.data.registry import build_dataset, build_normalize
    from exp.models import build_model
    from exp.runtime.distributed import Dist
    from exp.training.logger import build_logger
    from exp.training.step import build_step, seed_everything

    dist, total = Dist(0, 1, device("cpu")), args.rounds * BLOCK + BLOCK
    yamls = {**DEFAULT_YAMLS, "model": args.model_yaml, "predict": "argmax"}
    changes = ["model.pretrained=false", f"schedule.batch_size={args.batch_size}", f"schedule.train_iters={total}"]
    changes.append(f"schedule.num_workers={args.num_workers}")
    config = load_experiment({group: [name] for group, name in yamls.items()}, changes, 0)
    loops = {}
    for name in ("bare", "exp"):
        dataset = build_dataset(config.data, None, "train", 0)
        seed_everything(0, 0, 0)
        model = build_model(config.model, len(dataset.classes)).to(memory_format=channels_last).train()
        step = build_step(config, model, build_normalize(config.data), total, dist)
        loops[name] = step, iter(build_train_loader(dataset, config.schedule, 0, total, 0, dist))
    return loops, build_logger(folder, 0, total, True)


def measure_loops(args: argparse.Namespace, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds a step of each block, by loop; the loops run in turns and swap who goes first."""
    from itertools import islice

    from exp.config.training import ScheduleConfig
    from exp.training.loop import train

    loops, logger = make_loops(args, folder)

    def exp_loop(step, batches: Iterator, count: int) -> None:
        start = exp_loop.done
        exp_loop.done += count
        train(
            step,
            islice(batches, count),
            ScheduleConfig("s", args.batch_size, train_iters=count),
            start=start,
            end=start + count,
            seed=0,
            names=(),
            save_iters=(),
            save=lambda iteration: None,
            validate=lambda iteration: False,
            logger=logger,
        )

    exp_loop.done = 0
    run = {"bare": bare_loop, "exp": exp_loop}
    seconds = {"bare": [], "exp": []}
    for block in range(args.rounds + 1):
        for name in ("bare", "exp") if block % 2 else ("exp", "bare"):
            wall, cpu = time.perf_counter(), time.process_time()
            run[name](*loops[name], BLOCK)
            if block:  # the first warms up
                seconds[name].append(((time.perf_counter() - wall) / BLOCK, (time.process_time() - cpu) / BLOCK))
    logger.__exit__()
    return seconds


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.startup:
        seconds = measure_startup(args.repeats)
        print(f"to the first step: median {statistics.median(seconds):.2f} s of {len(seconds)}, max {max(seconds):.2f}")
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure_loops(args, Path(folder))
    for clock, name in enumerate(("wall", "processor")):  # the latter hardly sees what else the machine does
        bare, own = ([row[clock] for row in seconds[loop]] for loop in ("bare", "exp"))
        pairs = sorted(after / before for before, after in zip(bare, own))
        quartiles = ", ".join(f"{pairs[len(pairs) * i // 4]:.4f}" for i in (1, 2, 3))
        medians = statistics.median(bare), statistics.median(own)
        print(
            f"{name} time: bare loop {1000 * medians[0]:.2f} ms a step, loop.py {1000 * medians[1]:.2f}: ratio of "
            f"medians {medians[1] / medians[0]:.4f}; of neighbouring blocks, quartiles {quartiles}"
        )


if __name__ == "__main__":
    main()
