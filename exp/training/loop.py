"""One training loop, explicit arguments."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from exp.config.training import ScheduleConfig
from exp.data.loader import Batch
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from exp.runtime.interrupt import Interrupted, Stalled
from exp.training.logger import Logger, Meter, say
from exp.training.step import SCALER_TRIES, Outcome, TrainStep, seed_everything


def train(
    step: TrainStep,
    batches: Iterable[Batch],
    schedule: ScheduleConfig,
    *,
    start: int,
    end: int,
    seed: int,
    names: Sequence[str],
    save_iters: Sequence[int],
    save: Callable[[int], None],
    validate: Callable[[int], bool],
    logger: Logger,
) -> int:
    """Train from iteration `start` to `end` on this process's batches -> the iterations done (fewer if stopped).

    names: of the training images by index. save_iters: a save is due at every multiple of each. save, validate: called
    with the number of iterations done, on every rank; after the last iteration save is always called, validate never
    (the run's evaluation follows). validate: -> whether to stop. Raises Interrupted, after saving, where a process was
    asked to stop; InputError after schedule.nonfinite_limit steps in a row whose loss or gradient was non-finite.
    """
    dist = step.dist
    step.model.train()
    meter, watch = Meter(schedule.batch_size, dist.device), Watch(step, names, schedule.nonfinite_limit)

    def keep(done: int) -> None:
        watch.look()
        save(done)

    timed = _kept_where_stalled(meter.timed(batches), start, keep, dist)
    for iteration, batch in enumerate(timed, start):
        seed_everything(seed, iteration, dist.rank)
        done = iteration + 1
        logs = done % schedule.log_iters == 0 or done == end
        rates = step.rates() if logs else {}
        with dist.named_step(done):
            outcome = step(batch.to(dist.device))
            stop_asked = dist.any(dist.stop)
        watch.add(done, outcome, batch)
        logger.step(done)
        saves = stop_asked or done == end or any(done % every == 0 for every in save_iters)
        validates = bool(schedule.val_iters) and done % schedule.val_iters == 0 and done < end
        if logs or saves or validates:
            watch.look()
        if logs:
            norm = {"train/grad_norm": step.grad_norm.item()}
            logger.scalars(done, {**watch.report(), **norm, **rates, **meter.report(end - done)})
        if saves:
            save(done)
        if stop_asked:
            asked_by = dist.stop.signal_name or "a signal to another process"
            raise Interrupted(f"{asked_by}: iteration {done} of {end} is saved")
        if validates:
            try:
                with meter.paused():
                    stop = validate(done)
            except Interrupted as interruption:
                if not saves and (dist.world_size == 1 or not isinstance(interruption, Stalled)):
                    save(done)
                raise
            step.model.train()
            if stop:
                return done
    return end


def _kept_where_stalled(
    batches: Iterable[Batch], start: int, keep: Callable[[int], None], dist: Dist
) -> Iterator[Batch]:
    """The same batches, one for each iteration from `start`; a process alone saves what was done before it leaves for
    one that does not come. Where there are several, the others wait in the step, and cannot."""
    done = start
    try:
        for batch in batches:
            yield batch
            done += 1
    except Stalled:
        if dist.world_size == 1 and done > start:
            keep(done)
        raise


class Watch:
    """What became of the steps: their mean loss, and the faults among them by name.

    A step's marks are looked at while the device works on the next one, so that it never waits; all of them before
    anything is saved or logged.
    """

    def __init__(self, step: TrainStep, names: Sequence[str], limit: int) -> None:
        self.step, self.names, self.limit, self.dist = step, names, limit, step.dist
        self._last: tuple[int, Callable[[], list], Batch] | None = None
        self._restart()

    def add(self, done: int, outcome: Outcome, batch: Batch) -> None:
        """After step number `done`."""
        self._sum += torch.where(outcome.marks[0], 0.0, outcome.loss)
        self._steps += 1
        if batch.damaged:
            self.step.faults.images += len(batch.damaged)
            say(f"warning: iteration {done}: skipped: {'; '.join(batch.damaged)}")
        fetch = self.dist.fetch(outcome.marks)
        self.look()
        self._last = done, fetch, batch

    def look(self) -> None:
        """Take note of the last step; every rank. InputError after too many in a row that were left out."""
        if self._last is None:
            return
        (done, fetch, batch), self._last = self._last, None
        left_out, some_loss, own_loss = fetch()
        faults = self.step.faults
        faults.in_row = faults.in_row + 1 if left_out else 0
        if not left_out:
            return
        faults.steps += 1
        self._left_out += 1
        searching = self.step.scaler.is_enabled() and not some_loss  # fp16's scaler looks for a factor that fits
        if searching and faults.in_row <= SCALER_TRIES:
            return
        parts = self.dist.gather((own_loss, [self.names[i] for i in batch.indices]))
        suspects = [name for own, names in parts if own or not some_loss for name in names]
        what = "loss" if some_loss else "gradient"
        text = f"iteration {done}: got a {what} that is non-finite, nothing updated; its images: {', '.join(suspects)}"
        if self.dist.is_main:
            say(f"warning: {text}")
        if faults.in_row >= self.limit + (SCALER_TRIES if searching else 0):
            raise InputError(
                f"optim.lr: {text}. {faults.in_row} such steps in a row (schedule.nonfinite_limit): look at "
                "these images, or try a lower rate in another --output_dir; the newest checkpoint has good weights"
            )

    def report(self) -> dict[str, float]:
        """Named figures since the last report, on every rank; of faults only where there were any, from the start.

        The loss is the mean over the processes and the steps that updated something, NaN where there was none.
        """
        faults = self.step.faults
        sums = torch.stack([self._sum, torch.tensor(float(faults.images), device=self.dist.device)])
        loss, images = self.dist.mean(sums).tolist()
        steps = self._steps - self._left_out
        row = {"train/loss": loss / steps if steps else math.nan}
        if faults.steps:
            row["train/steps_left_out"] = faults.steps
        if images:
            row["train/images_skipped"] = images * self.dist.world_size
        self._restart()
        return row

    def _restart(self) -> None:
        self._sum, self._steps, self._left_out = torch.zeros((), device=self.dist.device), 0, 0
