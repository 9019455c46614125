"""One training loop, explicit arguments."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from exp.data.loader import Batch
from exp.distributed import Dist
from exp.errors import InputError
from exp.logger import NullLogger


@dataclass(frozen=True)
class Intervals:
    """Iterations between logging, saving and validating; val None: never."""

    log: int
    save: int
    val: int | None


def seed_everything(seed: int, iteration: int, rank: int) -> None:
    """Make dropout a function of (seed, iteration, rank): a resumed run draws what the uninterrupted one drew."""
    torch.manual_seed((seed * 1_000_003 + iteration) * 4_099 + rank)


def train(
    model: nn.Module,
    criterion: nn.Module,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    normalize: Callable[[Tensor], Tensor],
    start: int,
    end: int,
    batch_size: int,
    seed: int,
    intervals: Intervals,
    save: Callable[[int], None],
    validate: Callable[[int], None],
    logger: NullLogger,
    dist: Dist,
) -> None:
    """Train from iteration `start` to `end` on this process's batches.

    model: the wrapped one; its forward goes through DDP. save, validate: called with the number of iterations done,
    on every rank; after the last iteration save is always called, validate never (the run's evaluation follows).
    Raises InputError if the logged loss is not finite.
    """
    model.train()
    loss_sum = torch.zeros((), device=dist.device)
    clock, steps = time.perf_counter(), 0
    for iteration, batch in enumerate(batches, start):
        seed_everything(seed, iteration, dist.rank)
        batch = batch.to(dist.device)
        optimizer.zero_grad(set_to_none=True)
        counted = dist.mean(criterion.count(batch.label))
        loss = criterion(model(normalize(batch.image)), batch.label, counted)
        loss.backward()
        optimizer.step()
        rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
        scheduler.step()
        loss_sum += loss.detach()
        done, steps = iteration + 1, steps + 1
        logger.step(done)
        if done % intervals.log == 0 or done == end:
            mean_loss = (dist.mean(loss_sum) / steps).item()
            if not math.isfinite(mean_loss):
                raise InputError(
                    f"optim.lr: got a loss of {mean_loss} at iteration {done}, expected a number; try a lower rate"
                )
            speed = steps * batch_size / (time.perf_counter() - clock)
            logger.scalars(done, {"train/loss": mean_loss, **rates, "train/images_per_second": speed})
            loss_sum.zero_()
            clock, steps = time.perf_counter(), 0
        if done % intervals.save == 0 or done == end:
            save(done)
        if intervals.val and done % intervals.val == 0 and done < end:
            paused = time.perf_counter()
            validate(done)
            model.train()
            clock += time.perf_counter() - paused
