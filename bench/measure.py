"""How the kernel benchmarks time and record: one `Row` for each attempt, whatever came of it.

A method is prepared once per batch (what depends on the cells' lengths alone may be done there,
which favours the baselines: ours needs none of it) and then called over and over, each time on
another batch of several that together exceed the GPU's L2 cache. On a GPU, time is taken by events
around each call; the statistic is the median with the 20th and 80th percentiles.

No attempt disappears: what cannot be imported, runs out of memory, is too inaccurate or comes after
the time is up leaves a row that says so, and no speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bench.batches import Case, Drawing, draw_sets
from cellpatch_fast import RaggedCells

Results = Tensor | tuple[Tensor, ...]  # a step's are its output and gradients
Call = Callable[[], Results]
Computes = str  # "cross-attention", "encoder", ...; with ", step" forward and backward
FLOAT32_ERROR = 1e-5


class Method(NamedTuple):
    """One way to compute one thing."""

    computes: Computes
    name: str
    form: str  # "plain" or "projected": how a baseline makes keys and values; else ""
    # A call that returns attended values [c, p, D] or features [c, p, E] of the cells; a step
    # also gradients.
    prepare: Callable[[RaggedCells], Call]
    ours: bool = False
    # Tokens that a padded method takes at once, so that it fits in memory; None: not padded.
    padded_tokens: int | None = None
    attends_to_padding: bool = False
    replayed: bool = False  # launched from a CUDA graph


class Effort(NamedTuple):
    """How long one method is measured."""

    seconds: float = 0.25
    fewest: int = 5
    most: int = 100


class Timing(NamedTuple):
    """Seconds of one call."""

    p20: float
    median: float
    p80: float
    repeats: int


@dataclass
class Row:
    """One attempt to measure one method on one case."""

    case: str
    computes: Computes
    method: str
    form: str
    ours: bool
    replayed: bool
    status: Literal["measured", "inaccurate", "failed", "not run"]
    reason: str = ""
    error: float | None = None  # relative, of the worst cell, against float64
    bound: float | None = None
    cells: int | None = None
    genes: int | None = None
    seconds: Timing | None = None
    cells_per_second: float | None = None
    genes_per_second: float | None = None
    extra_bytes: int | None = None  # allocated by a call at most, its result included; GPU only
    result_bytes: int | None = None

    @classmethod
    def of(cls, case: str, method: Method, status: Any, **found: Any) -> Row:
        computes, name, form = method.computes, method.name, method.form
        return cls(case, computes, name, form, method.ours, method.replayed, status, **found)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": self.seconds and self.seconds._asdict()}


class Checked(NamedTuple):
    """A method's error on the small batch, or why there is none."""

    error: float | None
    bound: float
    failure: str = ""


def check(method: Method, cells: RaggedCells, expected: Results, bound: float) -> Checked:
    """Compare a method with the float64 results of the same cells."""
    try:
        return Checked(worst_error(method.prepare(cells)(), expected), bound)
    except Exception as failure:
        return Checked(None, bound, explain(failure))


class Reference:
    """The float64 results for a small batch, and the error that a method may have against them.

    Parameters
    ----------
    compute
        Takes a dtype, what to compute, and each cell's pads, which a method may attend to.
    cells
        The batch.
    """

    def __init__(
        self, compute: Callable[[torch.dtype, Computes, Tensor | None], Results], cells: RaggedCells
    ) -> None:
        self.compute, self.cells = compute, cells
        self.known: dict[tuple[Computes, bool, torch.dtype], tuple[Results, float]] = {}

    def check(self, method: Method, dtype: torch.dtype) -> Checked:
        if method.name == "padded original" and method.form == "float32":
            dtype = torch.float32
        key = method.computes, method.attends_to_padding, dtype
        if key not in self.known:
            self.known[key] = self._expect(*key)
        return check(method, self.cells, *self.known[key])

    def _expect(
        self, computes: Computes, padding: bool, dtype: torch.dtype
    ) -> tuple[Results, float]:
        """Twice the error of PyTorch in the same type, but at most 1e-5 in float32.

        A step is allowed both in float32: where scores reach ±100, PyTorch's gradients err by 1e-5.
        """
        lengths = self.cells.lengths
        pads = lengths.max() - lengths if padding else None
        expected = self.compute(torch.float64, computes, pads)
        if dtype == torch.float32 and not computes.endswith(", step"):
            return expected, FLOAT32_ERROR
        twice = 2 * worst_error(self.compute(dtype, computes, pads), expected)
        return expected, max(FLOAT32_ERROR, twice)


def worst_error(results: Results, expected: Results) -> float:
    """The largest relative error: of a cell of the output [c, ...], or of a whole gradient."""
    outputs, *gradients = (
        (one.double().reshape(right.shape), right)
        for one, right in zip(_several(results), _several(expected), strict=True)
    )
    compared = [*zip(*outputs, strict=True), *gradients]
    errors = [(one - right).norm() / right.norm() for one, right in compared]
    return float(torch.stack(errors).max())


def _several(results: Results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


class Suite(NamedTuple):
    """Methods, and how each is compared with the float64 result of a small batch."""

    methods: Sequence[Method]
    check: Callable[[Method], Checked]


def measure_cases(
    cases: Iterable[Case],
    drawing: Drawing,
    suite_of: Callable[[Case], Suite],
    effort: Effort,
    until: float,
) -> Iterator[Row]:
    """A row for every method of a case's suite on every case; none is started after ``until``."""
    checked: dict[tuple[int, int], Checked] = {}
    for case in cases:
        suite = suite_of(case)
        sets: list[RaggedCells] = []
        for i, method in enumerate(suite.methods):
            if (case.alone and not method.ours) or (method.replayed and not case.replayed):
                continue
            if time.monotonic() > until:
                yield Row.of(case.name, method, "not run", reason="the time was up")
                continue
            key = id(suite), i
            if key not in checked:
                checked[key] = suite.check(method)
            try:
                sets = sets or draw_sets(drawing, case)
            except Exception as failure:
                yield Row.of(case.name, method, "failed", reason=explain(failure))
                continue
            yield measure(case.name, method, sets, checked[key], effort)


def measure(
    case: str, method: Method, sets: Sequence[RaggedCells], checked: Checked, effort: Effort
) -> Row:
    """Time a method on several batches of a case."""
    if checked.failure:
        return Row.of(case, method, "failed", reason=checked.failure, bound=checked.bound)
    facts: dict[str, Any] = {"error": checked.error, "bound": checked.bound}
    if checked.error is None or not checked.error <= checked.bound:  # a NaN is not
        reason = f"relative error {checked.error:.1e}, allowed are {checked.bound:.1e}"
        return Row.of(case, method, "inaccurate", reason=reason, **facts)
    device = sets[0].device
    try:
        if method.padded_tokens is not None:
            sets = [first_cells(cells, method.padded_tokens) for cells in sets]
        # padding or not, rates count real genes; sets are alike, not equal
        cells = round(statistics.mean(len(cells) for cells in sets))
        genes = round(statistics.mean(cells.entries for cells in sets))
        prepared = [method.prepare(cells) for cells in sets]
        facts |= {"cells": cells, "genes": genes}
        facts["extra_bytes"], facts["result_bytes"] = memory_of(prepared[0], device)
        calls: list[Callable[[], object]] = [*prepared]
        per_call = 1
        if method.replayed:
            calls, per_call = [capture(calls, device)], len(calls)
        timing = time_calls(calls, device, effort, per_call)
    except Exception as failure:
        return Row.of(case, method, "failed", reason=explain(failure), **facts)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Row.of(
        case,
        method,
        "measured",
        seconds=timing,
        cells_per_second=cells / timing.median,
        genes_per_second=genes / timing.median,
        **facts,
    )


def first_cells(cells: RaggedCells, tokens: int) -> RaggedCells:
    """As many of the cells as fit into so many tokens when padded; one at least."""
    longest = int(cells.lengths.max())
    return cells.slice(0, max(1, tokens // longest))


def time_calls(
    calls: Sequence[Callable[[], object]], device: torch.device, effort: Effort, per_call: int = 1
) -> Timing:
    """Call in turn, until the effort is spent; the first round is not counted (if it may be)."""
    if effort.most == 1:
        (once,) = durations_of(calls[:1], 1, device)
        return Timing(once / per_call, once / per_call, once / per_call, 1)
    for call in calls[: effort.fewest]:
        call()
    (once,) = durations_of(calls[:1], 1, device)
    repeats = int(effort.seconds / max(once, 1e-6))
    repeats = min(max(repeats, effort.fewest), effort.most)
    taken = sorted(seconds / per_call for seconds in durations_of(calls, repeats, device))
    low, high = taken[int(0.2 * (repeats - 1))], taken[round(0.8 * (repeats - 1))]
    return Timing(low, statistics.median(taken), high, repeats)


def durations_of(
    calls: Sequence[Callable[[], object]], repeats: int, device: torch.device
) -> list[float]:
    """Seconds of each of ``repeats`` calls."""
    if device.type != "cuda":
        durations = []
        for i in range(repeats):
            started = time.perf_counter()
            calls[i % len(calls)]()
            durations.append(time.perf_counter() - started)
        return durations
    events = []
    torch.cuda.synchronize(device)
    for i in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[i % len(calls)]()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def capture(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], None]:
    """A function that replays all ``calls``, one after the other, from one CUDA graph."""
    if device.type != "cuda":
        raise RuntimeError("CUDA graphs need a GPU")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def memory_of(call: Call, device: torch.device) -> tuple[int | None, int | None]:
    """Bytes that a call allocates at most, and bytes of its result; None without a GPU."""
    if device.type != "cuda":
        return None, None
    call()  # what is made once and kept (tables, compiled kernels) is not the call's
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - before
    return extra, sum(tensor.nbytes for tensor in _several(result))


def explain(failure: Exception) -> str:
    """One line that says what went wrong."""
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"[:240]
