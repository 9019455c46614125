"""The process group as a context manager: the only file that knows ranks."""

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from exp.runtime.errors import InputError, one_line
from exp.runtime.interrupt import Interrupted, Stalled, StopRequest, catch_signals

T = TypeVar("T")
STEP_TIMEOUT = timedelta(minutes=30)
PATIENCE = timedelta(days=30)
NCCL_MARGIN = timedelta(minutes=5)
GRACE = 2.0  # seconds for others to say that they, too, miss somebody
# In messages of gloo, nccl and the store.
LOST_CONNECTION = ("onnection", "imed out", "imeout", "Broken pipe", "ocket", "NCCL")
MEETING_PAUSE = 0.02  # seconds between two looks


class LostProcess(InputError):
    """Another process does not come to where all of them meet."""


def _names_connection(reason: str) -> bool:
    return any(word in reason for word in LOST_CONNECTION)


@dataclass(frozen=True)
class Dist:
    """This process's place among the processes that torchrun started (or alone: rank 0 of 1).

    patient, control: the processes again, on their CPUs, for waits of any length and for those of a training step.
    store: what all processes can write to and read. stop: whether this process was asked to stop.
    """

    rank: int
    world_size: int
    device: torch.device
    patient: torch_dist.ProcessGroup | None = None
    control: torch_dist.ProcessGroup | None = None
    store: torch_dist.Store | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """A tensor -> its mean over the processes, on every rank (of one process: the tensor itself)."""
        if self.world_size == 1:
            return value
        total = value.detach().clone()
        torch_dist.all_reduce(total)
        return total / self.world_size

    def sum(self, value: Tensor) -> Tensor:
        """A tensor -> its sum over the processes, on every rank, for a function that every rank computes alike.

        The gradient goes to this process's part, times the number of processes: DDP's average of gradients is then
        the gradient of the function of the sum.
        """
        if self.world_size == 1:
            return value
        total = value.detach().clone()
        torch_dist.all_reduce(total)
        return total + self.world_size * (value - value.detach())  # adds 0, and a path for the gradient

    def gather(self, item: Any) -> list[Any]:
        """One picklable object a rank -> all of them in the order of ranks, on every rank, however late one comes."""
        if self.world_size == 1:
            return [item]
        items = [None] * self.world_size
        torch_dist.all_gather_object(items, item, group=self.patient)
        return items

    def any(self, mark: object) -> bool:
        """Whether the mark of any process is true, on every rank; no wait for the devices."""
        if self.world_size == 1:
            return bool(mark)
        total = torch.tensor(bool(mark), dtype=torch.uint8)
        torch_dist.all_reduce(total, torch_dist.ReduceOp.MAX, group=self.control)
        return bool(total)

    def fetch(self, value: Tensor) -> Callable[[], list]:
        """A small tensor -> a function that returns its content, waiting for no later work."""
        if self.device.type != "cuda":
            return value.tolist
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        copy.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def content() -> list:
            event.synchronize()
            return copy.tolist()

        return content

    def stop_if_asked(self, what: str) -> None:
        """Interrupted on every rank if any of them was asked to stop; to be called on all. what: left undone."""
        by = next((name for name in self.gather(self.stop.signal_name) if name), None)
        if by is not None:
            raise Interrupted(f"{by}: {what}")

    @contextmanager
    def named_step(self, iteration: int) -> Iterator[None]:
        """Where all processes meet in a step: if they do not, InputError with the numbers of those that are late."""
        if self.world_size == 1:
            yield
            return
        try:
            yield
            self.store.set(f"done/{self.rank}", str(iteration))
        except RuntimeError as error:
            reason = one_line(error)
            if not _names_connection(reason):  # this process's own trouble, such as its memory
                raise
            self.store.set(f"failed/{self.rank}", "")
            late = self._absent(iteration)
            if not late:
                raise
            raise LostProcess(f"{', '.join(late)} did not come through iteration {iteration} ({reason})") from error

    def _absent(self, iteration: int) -> list[str]:
        """The processes that have neither done the iteration nor found, as this one, that others are missing."""
        until = time.monotonic() + GRACE
        try:
            while True:
                done = {r: self._read(f"done/{r}") for r in range(self.world_size) if r != self.rank}
                missing = {r: at for r, at in done.items() if at is None or int(at) < iteration}
                missing = {r: at for r, at in missing.items() if self._read(f"failed/{r}") is None}
                if not missing or time.monotonic() > until:
                    return [f"rank {r} (last done: {'none' if at is None else at})" for r, at in missing.items()]
                time.sleep(MEETING_PAUSE)
        except RuntimeError:  # the store went with the process that kept it
            return []

    def _read(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None

    def on_main(self, action: Callable[[], T]) -> T:
        """What action() returns on rank 0, on every rank; so with its InputError, and what the system refuses it."""
        if self.world_size == 1:
            return action()
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except (InputError, OSError) as raised:
                error = str(raised)
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise InputError(error)
        return result

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank rank 0's buffers (batch-norm statistics that each process kept for itself).

        Those on another device than the processes', such as the counter of an average, are alike on all.
        """
        if self.world_size > 1:
            for buffer in model.buffers():
                if buffer.device.type == self.device.type:
                    torch_dist.broadcast(buffer, src=0)

    def split_batch(self, batch_size: int) -> int:
        """The global batch size -> this process's share; InputError if it does not divide."""
        if batch_size % self.world_size:
            raise InputError(
                f"schedule.batch_size: got {batch_size} for {self.world_size} processes, "
                "expected a multiple (the batch size is that of all processes together)"
            )
        return batch_size // self.world_size

    def gradient_sync(self, model: nn.Module, *, enabled: bool) -> AbstractContextManager:
        """Where a wrapped model's backward runs; not enabled: gradients stay local, to be averaged with the next."""
        return nullcontext() if enabled or self.world_size == 1 else model.no_sync()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model that trains: in DDP where there are several processes, with SyncBN where PyTorch offers it."""
        if self.world_size == 1:
            return model
        if self.device.type == "cpu":
            return DistributedDataParallel(model)
        model = convert_sync_batchnorm(model)  # timm's: its norm layers hold activations, which PyTorch's drops
        return DistributedDataParallel(model, device_ids=[self.device])


def mean_over_processes(value: Tensor) -> Tensor:
    """As Dist.mean, for a module of the network, which sees no Dist."""
    return Dist(0, torch_dist.get_world_size(), value.device).mean(value) if torch_dist.is_initialized() else value


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> the device of this process."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: got no usable CUDA device on this machine, expected one (or --device cpu)")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"--nproc_per_node: got a process with local rank {local_rank}, expected at most one per "
            f"CUDA device ({torch.cuda.device_count()} here)"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def session(device_name: str, timeout: timedelta = STEP_TIMEOUT) -> Iterator[Dist]:
    """Join the process group that torchrun describes in the environment, leave it at the end; alone: a no-op.

    Inside, SIGTERM, SIGINT and SIGUSR1 only ask to stop (Dist.stop).
    timeout: of the start and of the collectives of a training step, which all processes reach together. gather() and
    the end, where one process may wait for another's share of the evaluation or for rank 0's pictures, go through a
    group of their own without such a limit; a process that dies is noticed by the closed connection. InputError where
    the environment names several processes and not how they meet, or where one of them does not come.
    """
    world_size = _number("WORLD_SIZE", 1, lowest=1)
    rank, local_rank = _number("RANK", 0, highest=world_size - 1), _number("LOCAL_RANK", 0)
    device = pick_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank > 0:
        logging.getLogger("exp").setLevel(logging.ERROR)  # rank 0 says it for all
    with catch_signals() as stop:
        if world_size == 1:
            yield Dist(rank, world_size, device, stop=stop)
            return
        dist = _join(rank, world_size, device, timeout, stop)
        try:
            yield dist
        except (InputError, RuntimeError) as error:  # no goodbye: the others may wait in a collective
            told = isinstance(error, InputError)
            if stop and (isinstance(error, LostProcess) if told else _names_connection(str(error))):
                raise Stalled(f"{stop.signal_name}: another process left, or does not come [rank {rank}]") from None
            if told:
                raise InputError(f"{error} [rank {rank}]") from None
            raise
        except Stalled as stall:
            raise Stalled(f"{stall} [rank {rank}]") from None
        except Interrupted as interruption:
            _leave(dist)
            raise interruption if rank == 0 else Interrupted("") from None  # rank 0 says it for all
        _leave(dist)


def _number(name: str, default: int, lowest: int = 0, highest: int = 2**31) -> int:
    """A whole number of the environment; InputError for anything else."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and lowest <= int(text) <= highest):
        raise InputError(
            f"{name}: got {text!r} in the environment, expected a whole number of {lowest}..{highest}, as torchrun "
            "sets it, or none"
        )
    return int(text)


def _join(rank: int, world_size: int, device: torch.device, timeout: timedelta, stop: StopRequest) -> Dist:
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE: got {world_size} in the environment without {', '.join(missing)}, expected all that torchrun "
            "sets: start with torchrun, or unset it"
        )
    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0, highest=2**16 - 1)
    try:
        store, _, _ = next(torch_dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"MASTER_ADDR, MASTER_PORT: got no meeting at {address}:{port} ({one_line(error)}), "
            "expected a free port of the machine of rank 0 (torchrun --master_port)"
        ) from None
    store = meet(store, rank, world_size, timeout, stop)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # nccl's own watchdog ends the process without a word: `control` notices before it who does not come.
    patience = timeout + NCCL_MARGIN if device.type == "cuda" else timeout
    torch_dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
    patient = torch_dist.new_group(backend="gloo", timeout=PATIENCE)
    control = torch_dist.new_group(backend="gloo", timeout=timeout)
    return Dist(rank, world_size, device, patient, control, torch_dist.PrefixStore("exp", store), stop)


def meet(
    store: torch_dist.Store, rank: int, world_size: int, timeout: timedelta, stop: StopRequest | None = None
) -> torch_dist.Store:
    """A store that torchrun keeps -> the part of it that these processes alone have, once all of them are here.

    After a restart the store still holds what the processes before wrote, the addresses of dead ones among it. So
    rank 0 names this meeting, every other rank answers with a mark of its own, and takes the name for new when rank 0
    has read that mark. InputError that names the ranks which do not come.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()

    def read(key: str) -> str | None:
        return store.get(key).decode() if store.check([key]) else None

    def wait_for(absent: str) -> None:
        if stop:
            raise Stalled(f"{stop.signal_name}: left before {absent} came")
        if time.monotonic() > until:
            raise InputError(f"{absent} did not arrive at the start within {timeout}")
        time.sleep(MEETING_PAUSE)

    if rank == 0:
        store.set("meeting", mine)
        others = range(1, world_size)
        while absent := [f"rank {r}" for r in others if read(f"{mine}/mark/{r}") is None]:
            wait_for(", ".join(absent))
        for other in others:
            store.set(f"{mine}/read/{other}", read(f"{mine}/mark/{other}"))
        return torch_dist.PrefixStore(mine, store)
    while True:
        if meeting := read("meeting"):
            store.set(f"{meeting}/mark/{rank}", mine)
            if read(f"{meeting}/read/{rank}") == mine:
                return torch_dist.PrefixStore(meeting, store)
        wait_for("rank 0")


def _leave(dist: Dist) -> None:
    torch_dist.barrier(group=dist.patient)
    torch_dist.destroy_process_group()
