"""The processes of a training run: one per device, started by ``torchrun``, or just this one.

Under ``torchrun`` each process finds its place in the environment; without it there is one process.
The collective operations here are a few numbers per step; gradients are DistributedDataParallel's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import numpy as np
import torch
import torch.distributed as dist

from ..devices import default_device, usable_cores, usable_device
from ..errors import InputError

LONGEST_WAIT = timedelta(hours=3)  # for the leading process, which alone tests and draws


@dataclass(frozen=True)
class Processes:
    """This process among those of a run. A context manager, which ends the group.

    Parameters
    ----------
    rank, world_size
        Number of this process, and how many there are.
    device
        Where it computes.
    owns_group
        Whether the group of processes was made here, and ends with this.
    """

    rank: int
    world_size: int
    device: torch.device
    owns_group: bool = False

    @classmethod
    def join(
        cls, device: torch.device | str | None = None, devices: int | None = None
    ) -> Processes:
        """Take this process's place in the run.

        Parameters
        ----------
        device
            Where to compute; None for the GPU of this process where there is one. With several
            processes on GPUs, each takes its own.
        devices
            Number of processes that is expected; None for any.

        Raises
        ------
        InputError
            If there are other numbers of processes or devices than asked for.
        """
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if devices not in (None, world_size):
            raise InputError(
                f"{devices} devices were asked for, but this run has {world_size} processes: start "
                f"it with the command line's --devices {devices}, or with torchrun "
                f"--nproc-per-node {devices}"
            )
        if device is None:
            device = default_device()
        place = torch.device(device)
        if place.type == "cuda" and world_size > 1:
            place = torch.device("cuda", local_rank)
        place = usable_device(place)
        if place.type == "cuda":
            place = torch.empty(0, device=place).device  # with its number
            torch.cuda.set_device(place)
        begins = world_size > 1 and not dist.is_initialized()
        if begins:
            dist.init_process_group(
                "nccl" if place.type == "cuda" else "gloo",
                timeout=LONGEST_WAIT,
                device_id=place if place.type == "cuda" else None,
            )
        return cls(rank(), world_size, place, begins)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def sum(self, values: np.ndarray | Sequence[float]) -> np.ndarray:
        """float64: the sum of all processes' values, the same in each of them."""
        part = np.asarray(values, np.float64)
        if self.world_size == 1:
            return part
        total = torch.as_tensor(part, device=self.device)
        dist.all_reduce(total)
        return total.cpu().numpy()

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.world_size > 1:
            dist.barrier()

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.owns_group:
            dist.destroy_process_group()


def started() -> bool:
    """Whether this process is one of those that ``torchrun`` has started."""
    return "WORLD_SIZE" in os.environ


def rank() -> int:
    """Number of this process among those of the run."""
    return int(os.environ.get("RANK", 0))


def launch(devices: int, device: str | None, arguments: Sequence[str]) -> int:
    """Run ``cellpatch`` with these arguments in one process per device; returns the exit code.

    Raises
    ------
    InputError
        If there are fewer GPUs than that.
    """
    on_gpus = (default_device().type if device is None else device).startswith("cuda")
    if on_gpus and torch.cuda.device_count() < devices:
        raise InputError(
            f"{devices} devices were asked for, but there are {torch.cuda.device_count()} GPUs: "
            "ask for fewer, or for --device cpu"
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(devices), "-m", "cellpatch_fast.cli", *arguments]
    threads = max(1, usable_cores() // devices)  # torchrun allows one
    return subprocess.call(command, env={"OMP_NUM_THREADS": str(threads), **os.environ})
