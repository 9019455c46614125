"""The process group as a context manager: the only file that knows ranks."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from exp.errors import InputError

STEP_TIMEOUT = timedelta(minutes=30)
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Dist:
    """This process's place among the processes that torchrun started (or alone: rank 0 of 1)."""

    rank: int
    world_size: int
    device: torch.device
    patient: torch_dist.ProcessGroup | None = None  # the processes again, for waits of any length

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def hides_bars(self) -> bool | None:
        """For tqdm's `disable`: rank 0 shows progress bars on a terminal (None), the others none (True)."""
        return None if self.is_main else True

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

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank rank 0's buffers (batch-norm statistics that each process kept for itself)."""
        if self.world_size > 1:
            for buffer in model.buffers():
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

    timeout: of the collectives of a training step, which all processes reach together. gather() and the end, where one
    process may wait for another's share of the evaluation or for rank 0's pictures, go through a group of their own
    without such a limit; a process that dies is noticed by the closed connection. InputError where the environment
    names several processes and not how they meet.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank > 0:
        logging.getLogger("exp").setLevel(logging.ERROR)  # rank 0 says it for all
    if world_size == 1:
        yield Dist(rank, world_size, device)
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE: got {world_size} in the environment without {', '.join(missing)}, expected all that torchrun "
            "sets: start with torchrun, or unset it"
        )
    torch_dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    patient = torch_dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield Dist(rank, world_size, device, patient)
    except InputError as error:
        raise InputError(f"{error} [rank {rank}]") from None  # no goodbye: the others may wait in a collective
    torch_dist.barrier(group=patient)
    torch_dist.destroy_process_group()
