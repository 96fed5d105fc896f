"""Devices to compute on, how many cores this process may use, and how threads share them.

The command ``cellpatch`` does both of these by itself. In Python they are the caller's choice:

- ``OMP_WAIT_POLICY=passive`` in the environment, before PyTorch is imported, lets its threads sleep
  while they wait (see `wait_passively`).
- ``torch.set_num_threads(usable_cores())`` lets PyTorch keep to a container's quota.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    import torch

ROOT = Path("/")
# Where a control group says how many microseconds of processor time it has in how many: version 2
# in one file, version 1 in two.
MOUNTS = {
    "": ("sys/fs/cgroup", ("cpu.max",)),
    "cpu": ("sys/fs/cgroup/cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")),
}


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process can keep busy: those of its affinity mask, or a quota's worth.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are found.
    """
    return math.ceil(min(_cores_of_mask(), cpu_quota(root)))


def cpu_quota(root: Path = ROOT) -> float:
    """Cores' worth of time that this process may take; infinite where no control group limits it.

    Containers are limited so (``docker --cpus``, ``limits.cpu`` of Kubernetes): they see all cores
    of the machine, and stand still for the rest of every 0.1 s once they have used up their time.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not on Linux
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in MOUNTS.keys() & set(controllers.split(",")):
            mount, files = MOUNTS[controller]
            group = Path(path.lstrip("/"))
            # Groups lie in groups, and each limits those inside. In a container the path may be
            # the machine's, of which only the last parent, the mount itself, is there.
            quotas += [
                _quota_of([root / mount / g / name for name in files])
                for g in (group, *group.parents)
            ]
    return min(quotas)


def _quota_of(files: list[Path]) -> float:
    try:
        granted, period = (int(word) for file in files for word in file.read_text().split())
    except (OSError, ValueError):  # there is no such group here, or "max": no limit
        return math.inf
    return granted / period if granted > 0 else math.inf  # -1: no limit


def _cores_of_mask() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def wait_passively() -> None:
    """Let the threads of PyTorch sleep while they wait; to be called before it is imported.

    By default they spin, for 3 ms with GNU's OpenMP and for 200 ms with LLVM's: beside other busy
    processes a core waits for a thread that is not running, and the process that it waits for does
    not get the core. 46 steps of pretraining on two cores, beside two to four busy processes, took
    5 and 12 s so, and 52 and 65 s by default. With the cores to itself a training step of 64 cells
    took 51 ms so and 48 ms by default (means of seven medians, which vary by 10 %). What the user
    has set stays; both runtimes let GOMP_SPINCOUNT and KMP_BLOCKTIME come before this.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def keep_to_quota(root: Path = ROOT) -> None:
    """Let PyTorch start no more threads than there are cores, unless OMP_NUM_THREADS says how many.

    It counts the cores of the affinity mask by itself, but knows no quota; so it is imported only
    where there is one.
    """
    if "OMP_NUM_THREADS" in os.environ or cpu_quota(root) >= _cores_of_mask():
        return
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), usable_cores(root)))


def default_device() -> torch.device:
    """Where to compute if nobody says where: the GPU that PyTorch finds, else the CPU.

    Embedding, annotation and training all ask here.
    """
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(device: torch.device | str) -> torch.device:
    """``device`` if this machine has it.

    Raises
    ------
    InputError
        If it has not.
    """
    import torch

    try:
        usable = torch.device(device)
        torch.empty(0, device=usable)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"cannot compute on the device {str(device)!r} ({reason}). PyTorch finds "
            f"{torch.cuda.device_count()} CUDA devices here; cpu is always there"
        ) from error
    return usable


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """PyTorch's ways of saying that there is not enough memory become Python's."""
    import torch

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise MemoryError(str(error).splitlines()[0]) from error
        raise
