"""One model of the comparison, in a process of its own: makes it, and measures point after point.

A point is a number of genes per cell. Cells have exactly so many genes each, so that padded models
have no padding (this favours them), and what a model calls `prepare` is not timed. The batch is
doubled, beginning with one cell, until two doublings in a row have not made the model 5 % faster,
or time or memory does not allow more. Every size of batch is one `Tried`, sent at once, so that
what is known survives the process.

A call's input is another one each time, of several that together exceed the cache.

Memory of a batch is that of its inputs and of what a call adds at most: on a GPU counted by
PyTorch's allocator, on Linux the highest resident size since a reset, less the size before, once
free memory was given back to the system.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.machine import cache_bytes
from bench.measure import Effort, durations_of, explain
from cellpatch_fast import RaggedCells

CLASSES = 11  # of the annotation, as in Zheng68K
FASTER = 1.05  # than the best so far, for the next size of batch to count as better
FEWEST = 3  # repeats
SEARCHED, MEASURED = 20, 100  # repeats at most: of each size, and of the best
SEARCH_TIME = 1 / 10  # of the seconds that the best is measured for, for each size
SEARCH_SHARE = 0.6  # of the time that the first call leaves, after which no larger batch is begun
NO_MEMORY = (
    *("not enough memory", "can't allocate memory", "out of memory"),
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class Order(NamedTuple):
    """Which model to make, and how."""

    registry: str
    key: str
    device: torch.device
    dtype: torch.dtype
    seconds: float  # of measured calls, for the best batch


class Point(NamedTuple):
    """What to measure: the cells in a file, at most so many at once, within so many seconds."""

    file: Path
    cells: int
    limit: float


@dataclass(frozen=True)
class Made:
    """The model is there: how long that took, and its size."""

    seconds: float
    parameters: int
    model_bytes: int


@dataclass(frozen=True)
class Tried:
    """One size of batch, measured: seconds of each call, of the call before them, and memory."""

    batch: int
    durations: tuple[float, ...]
    first_call: float
    peak_bytes: int | None

    @property
    def per_cell(self) -> float:
        """Seconds in the fastest call, which other work disturbs least: for comparing sizes."""
        return min(self.durations) / self.batch


@dataclass(frozen=True)
class Ready:
    """The cells of a point are there: from now on its time counts."""


@dataclass(frozen=True)
class Finished:
    """No more of this point will follow."""


@dataclass(frozen=True)
class Broken:
    """Making or calling the model failed, with the status of a record and one line."""

    status: str
    reason: str


Message = Made | Ready | Tried | Finished | Broken


def serve(pipe: Connection, order: Order) -> None:
    """Make the model, then answer each `Point` by messages, as long as someone asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    die_first()
    try:
        model, facts = make(order)
        pipe.send(facts)
        while True:
            point: Point = pipe.recv()
            cells = read_cells(point.file).to(order.device)
            pipe.send(Ready())
            with torch.inference_mode():
                for tried in search(model, cells, point, order):
                    pipe.send(tried)
            pipe.send(Finished())
    except EOFError:
        return
    except Exception as failure:
        pipe.send(Broken(status_of(failure), explain(failure)))


def make(order: Order) -> tuple[Any, Made]:
    peers = importlib.import_module(order.registry).PEERS
    peer = next(peer for peer in peers if peer.key == order.key)
    torch.manual_seed(0)
    if peer.package:
        importlib.import_module("bench.preloaded")  # importing is not making
    started = time.perf_counter()
    model = peer.make(order.device, order.dtype, CLASSES)
    model.compile_kernels()
    if order.device.type == "cuda":
        torch.cuda.synchronize(order.device)
    seconds = time.perf_counter() - started
    gc.collect()
    gc.freeze()  # later collections leave out what is there now
    parameters = list(model.parameters())
    size = sum(tensor.nbytes for tensor in [*parameters, *model.buffers()])
    return model, Made(seconds, sum(map(torch.numel, parameters)), size)


def search(model: Any, cells: RaggedCells, point: Point, order: Order) -> Iterator[Tried]:
    """Measure batches of 1, 2, 4, … cells, and then the best of them for longer."""
    short = Effort(order.seconds * SEARCH_TIME, FEWEST, SEARCHED)
    long = Effort(order.seconds, FEWEST, MEASURED)
    until = time.monotonic() + point.limit
    best: Tried | None = None
    worse, compiling = 0, 0.0
    for batch in itertools.takewhile(lambda size: size <= point.cells, _doubling()):
        try:
            tried = measure(model, cells, batch, order.device, short, until)
        except Exception as failure:
            if best is None or status_of(failure) != "out of memory":
                raise
            if order.device.type == "cuda":
                torch.cuda.empty_cache()
            break
        yield tried
        improved = best is None or tried.per_cell * FASTER < best.per_cell
        best = tried if best is None or tried.per_cell < best.per_cell else best
        worse = 0 if improved else worse + 1
        compiling = max(compiling, tried.first_call)
        left = until - time.monotonic()
        # the next batch takes twice as long at most, with the calls before its repeats
        next_takes = 2 * tried.per_cell * batch * (FEWEST + 2)
        if worse == 2 or next_takes > left - (1 - SEARCH_SHARE) * (point.limit - compiling):
            break
        if 2 * (tried.peak_bytes or 0) > available_memory(order.device):
            break
    assert best is not None
    again = order.seconds + best.per_cell * best.batch * (FEWEST + 2)
    if sum(best.durations) < order.seconds and time.monotonic() + again < until:
        yield measure(model, cells, best.batch, order.device, long, until)


def measure(
    model: Any, cells: RaggedCells, batch: int, device: torch.device, effort: Effort, until: float
) -> Tried:
    """Time calls of so many cells; fewer than the effort's where those would not end in time."""
    inputs = iter(inputs_of(model, cells, batch))
    sets = [next(inputs)]
    one = sum(tensor.nbytes for tensor in sets[0])
    (first,) = durations_of([lambda: model(*sets[0])], 1, device)
    with peak_memory(device) as peak:
        (once,) = durations_of([lambda: model(*sets[0])], 1, device)
    extra = peak()
    peak_bytes = None if extra is None else extra + one
    left = int((until - time.monotonic()) / max(once, 1e-9)) - 1
    repeats = min(max(int(effort.seconds / max(once, 1e-6)), effort.fewest), effort.most, left)
    if repeats < 1:
        return Tried(batch, (once,), first, peak_bytes)
    needed = max(2, -(-2 * cache_bytes(device) // one))
    sets += itertools.islice(inputs, min(needed, repeats) - 1)
    calls = [_calling(model, each) for each in sets]
    return Tried(batch, tuple(durations_of(calls, repeats, device)), first, peak_bytes)


def inputs_of(model: Any, cells: RaggedCells, batch: int) -> Iterator[tuple[Tensor, ...]]:
    """Prepared batches without end, each of its own memory.

    All cells come before any comes again.
    """
    order = torch.arange(0, device=cells.device)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(cells), device=cells.device)])
        chosen, order = order[:batch], order[batch:]
        yield model.prepare(cells.take(chosen))


def read_cells(file: Path) -> RaggedCells:
    tensors = load_file(file)
    return RaggedCells(tensors["offsets"], tensors["genes"], tensors["values"])


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """What is allocated inside at most, in bytes; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - allocated
    else:
        resident = reset_peak()
        yield lambda: None if resident is None else max(0, _resident("VmHWM") - resident)


def reset_peak() -> int | None:
    """Give free memory back, and have the system count the peak anew; resident bytes now."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, AttributeError):  # another C library keeps what it keeps
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def available_memory(device: torch.device) -> float:
    """Bytes that the system can give, where trying would have it kill a process."""
    meminfo = Path("/proc/meminfo")
    if device.type == "cuda" or not meminfo.exists():
        return math.inf
    return int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) * 1024


def die_first() -> None:
    """Where the system's memory runs out, it is this process that is killed, not the run."""
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text("1000")


def status_of(failure: Exception) -> str:
    if isinstance(failure, ImportError):
        return "skipped"
    no_memory = isinstance(failure, torch.OutOfMemoryError | MemoryError) or (
        isinstance(failure, RuntimeError) and any(text in str(failure) for text in NO_MEMORY)
    )
    return "out of memory" if no_memory else "failed"


def _doubling() -> Iterator[int]:
    return (1 << power for power in itertools.count())


def _calling(model: Any, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: model(*inputs)


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024
