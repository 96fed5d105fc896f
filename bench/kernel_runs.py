"""The kernels against what else computes the same: the group "kernels" of `pytest bench`.

Methods, cases and the comparison with float64 are those of `bench.kernels`. On a CPU ours are the
Numba kernels, and of the baselines those that run there and need no compiler. A speed is only told
of what is within its bound of the float64 result.

A gene's work is counted as in `bench.ceilings`, whichever way a kernel does it: two products of 64
queries with a key and a value. On a CPU the products of float32 are one, not three.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from cellpatch_fast.kernels import EncoderWeights, encode, patch_attention

from bench.batches import Case, Drawing, constant, log_normal
from bench.ceilings import Work, roofline
from bench.cells import GENES
from bench.kernels import CHECKED_LENGTHS, expected, measure_all, original_methods
from bench.measure import Call, Effort, Method, Reference, Row, Suite, measure_cases
from bench.options import Options
from bench.peers import attention
from bench.peers.original import PaddedPathFormer
from bench.reporting.results import Record, Timing
from cellpatch_fast import RaggedCells

ON_A_CPU = ("nested jagged + SDPA", "padded SDPA")
# By whether the run is quick: entries of a batch, of which several are more than the cache holds.
CPU_ENTRIES = {True: 200_000, False: 500_000}
CPU_CASES = (
    *(Case(f"{n:,}", constant(n)) for n in (500, 2000, 8000)),
    Case("log-normal", log_normal),
)
GROUP_SECONDS = {True: 20.0, False: 400.0}  # no method is started later, by whether it is quick
STATUSES = {"measured": "measured", "inaccurate": "inaccurate", "not run": "out of time"}


def measure_kernels(options: Options, ceilings: dict[str, Any]) -> Iterator[Record]:
    """A record for every method on every case."""
    device, dtype = options.device, options.dtype
    torch.manual_seed(0)
    model = PaddedPathFormer(GENES + 1).eval().requires_grad_(False).to(device)
    heads = model.sizes[1]
    work = Work.of(model.pathway_token.shape[1], heads, model.sizes[0] // heads, dtype)
    if device.type == "cuda":
        until = time.monotonic() + GROUP_SECONDS[options.quick]
        chosen = argparse.Namespace(
            toy=False, until=until, only="^2,000$" if options.quick else None
        )
        rows = measure_all(model, device, dtype, chosen)
        most = roofline(ceilings, work)["roofline"]
    else:
        rows = _on_cpu(model, dtype, quick=options.quick)
        work = work._replace(flop=2 * 2 * work.exponentials * model.sizes[0] // heads)
        most = min(
            ceilings["matrix FLOP/s"] / work.flop,
            ceilings["copy bytes/s"] / (work.l2_bytes + work.memory_bytes),
        )
    with torch.no_grad():
        for row in rows:
            yield _record(row, work, most)


def our_cpu_methods(weights: EncoderWeights) -> Iterator[Method]:
    """The operators as users call them."""

    def attend(cells: RaggedCells) -> torch.Tensor:
        inputs = cells.offsets, cells.genes, cells.values
        return patch_attention(weights, *inputs, backend="numba")[0]

    def run(cells: RaggedCells) -> torch.Tensor:
        inputs = cells.offsets, cells.genes, cells.values
        return encode(weights, *inputs, backend="numba").features

    def prepared(function: Any, cells: RaggedCells) -> Call:
        return functools.partial(function, cells)

    yield Method("cross-attention", "ours", "", functools.partial(prepared, attend), ours=True)
    yield Method("encoder", "ours", "", functools.partial(prepared, run), ours=True)


def _on_cpu(model: PaddedPathFormer, dtype: torch.dtype, *, quick: bool) -> Iterator[Row]:
    from cellpatch_fast.model.live import _live_weights

    drawing = Drawing(torch.device("cpu"), CPU_ENTRIES[quick])
    small = drawing.cells(torch.tensor(CHECKED_LENGTHS).numpy())
    weights = _live_weights(model, project_out=True)
    methods = [*our_cpu_methods(weights)]
    for method in methods:  # on a new machine this compiles for a minute
        method.prepare(small)()
    until = time.monotonic() + GROUP_SECONDS[quick]
    others = [m for m in attention.methods(weights, dtype) if m.name in ON_A_CPU]
    methods += [m for m in others if m.form == "plain" or not quick]
    methods += [m for m in original_methods(model, dtype) if m.form == "float32"]
    right = Reference(functools.partial(expected, weights, small), small)
    suite = Suite(methods, functools.partial(right.check, dtype=dtype))
    effort = Effort(0.2, 3, 20) if quick else Effort(1.0, 5, 50)
    cases = [case for case in CPU_CASES if case.name == "2,000" or not quick]
    return measure_cases(cases, drawing, lambda case: suite, effort, until)


def _record(row: Row, work: Work, most: float) -> Record:
    """A row as a record; ``most`` genes/s are the roofline's."""
    method = row.method + (", replayed" if row.replayed else "")
    name = "/".join(part for part in ("kernels", row.computes, row.case, method, row.form) if part)
    details: dict[str, Any] = {
        "op": row.computes,
        "case": row.case,
        "method": method,
        "ours": row.ours,
        "form": row.form,
        "error": row.error,
        "bound": row.bound,
        "genes_per_second": row.genes_per_second,
    }
    if row.status != "measured":
        missing = row.reason.startswith(("ImportError", "ModuleNotFoundError"))
        status = "skipped" if missing else STATUSES.get(row.status, "failed")
        return Record("kernels", name, status, row.reason, details=details)
    assert row.genes_per_second is not None
    assert row.seconds is not None
    if row.computes == "cross-attention":
        moved = work.l2_bytes + work.memory_bytes
        details |= {
            "flops": row.genes_per_second * work.flop,
            "bytes_per_second": row.genes_per_second * moved,
            "intensity": work.flop / moved,
            "roofline_share": row.genes_per_second / most,
        }
    return Record(
        "kernels", name, "measured", seconds=Timing(*row.seconds), per="call", details=details
    )
