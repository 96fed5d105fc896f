"""The main job's speed on a CPU: ``python bench/cpu.py [--data FILE.h5ad] [--output FILE.json]``.

Measures in one run, interleaved so that a noisy machine disturbs all alike:

- ceilings: the rate of a 1024 x 1024 x 1024 float32 product in PyTorch;
- cross-attention alone (Numba): genes/s on real, generated-real and uniform gene frequencies;
- the whole encoder against the padded PyTorch computation of the original, by genes per cell;
- time per gene from 500 to 20,000 genes per cell, with the straight line through it;
- `cellpatch_fast.atlas.embed`, file to store, against the encoder alone.

Prints Markdown and writes JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cellpatch_fast.kernels.cpu import attention, encoder
from cellpatch_fast.kernels.cpu.blocks import make_block_scratch
from cellpatch_fast.kernels.cpu.dropout import NOTHING
from cellpatch_fast.kernels.cpu.simd import borrow
from cellpatch_fast.kernels.cpu.tables import make_scratch
from cellpatch_fast.kernels.threads import run_blocks
from numba import njit

from bench.cells import draw_cells, real_cells
from bench.machine import processor
from bench.peers.original import PaddedPathFormer
from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary, RaggedCells

USEFUL_FLOP = 4096  # per gene, with ready scores: 64 patches x 2 heads x 16 x (multiply + add)


def timed(*functions: Callable[[], object], repeats: int = 7) -> list[list[float]]:
    """Seconds of each function, run in turn ``repeats`` times, after one run unmeasured."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            taken.append(time.perf_counter() - started)
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


@njit(nogil=True)
def _cross_attend(batch_, tables_, scratch_, mixed, discrete, start, stop):
    batch, tables, scratch = borrow(batch_), borrow(tables_), borrow(scratch_)
    out = borrow(mixed)
    for cell in range(start, stop):
        slot = (cell - start) % attention.GROUP
        if slot == 0:
            attention.cross_attend(
                batch.genes, batch.values, batch.offsets, batch.pads,
                cell, min(attention.GROUP, stop - cell), discrete, NOTHING, tables, scratch,
            )  # fmt: skip
        attention.finish(
            slot, batch.genes, batch.values, batch.offsets[cell], batch.offsets[cell + 1],
            batch.pads[cell], discrete, tables, scratch, out.mixed,
        )  # fmt: skip


def cross_attention(model: CellPatch, cells: RaggedCells) -> Callable[[], None]:
    """A function that runs the cross-attention of all cells and nothing else."""
    tables, blocks = encoder.kept.of(model.encoder_weights())
    empty = np.empty(0, np.float32)
    batch = encoder.Batch(
        cells.offsets.numpy(),
        cells.genes.numpy().astype(np.int32),
        cells.values.float().numpy(),
        np.zeros(len(cells), np.float32),
        *(empty,) * 4,
    )
    discrete = cells.values.dtype == torch.uint8

    per_thread = threading.local()

    def task(start: int, stop: int) -> None:
        if not hasattr(per_thread, "scratch"):
            per_thread.scratch = make_scratch(tables), make_block_scratch(blocks)
        _cross_attend(batch, tables, *per_thread.scratch, discrete, start, stop)

    return lambda: run_blocks(task, len(cells), encoder.MOST_CELLS)


def with_values(
    offsets: np.ndarray, genes: np.ndarray, rng: np.random.Generator, discrete: bool = True
) -> RaggedCells:
    """Cells with random values: integers 0 to 5, or continuous."""
    if discrete:
        values = torch.from_numpy(rng.integers(0, 6, len(genes)).astype(np.uint8))
    else:
        values = torch.from_numpy(rng.gamma(2.0, 0.7, len(genes)).astype(np.float32))
    return RaggedCells(torch.from_numpy(offsets), torch.from_numpy(genes), values)


def measure_cross_attention(
    models: dict[str, CellPatch], data: Path | None, rng: np.random.Generator
) -> dict[str, Any]:
    """Genes/s by gene frequencies and kind of values, and the matrix rate in the same run."""
    a, b = torch.randn(2, 1024, 1024)
    drawn = {
        "real frequencies (generated)": draw_cells(1500, 850, rng),
        "uniform": draw_cells(1500, 850, rng, uniform=True),
    }
    if data is not None:
        drawn[f"real cells ({data.name})"] = real_cells(data)
    runs, entries = {"sgemm": lambda: a @ b}, {}
    for frequencies, (offsets, genes) in drawn.items():
        for kind in ("integer", "continuous", "binned"):
            cells = with_values(offsets, genes, rng, kind != "continuous")
            model = models["binned" if kind == "binned" else "affine"]
            runs[f"{frequencies}, {kind} values"] = cross_attention(model, cells)
            entries[f"{frequencies}, {kind} values"] = cells.entries
    times = dict(zip(runs, timed(*runs.values(), repeats=15), strict=True))
    peak = 2 * 1024**3 / median(times["sgemm"])
    rates = {name: entries[name] / median(times[name]) for name in entries}
    return {
        "sgemm GFLOP/s": peak / 1e9,
        "million genes/s": {name: rate / 1e6 for name, rate in rates.items()},
        "share of sgemm": {name: rate * USEFUL_FLOP / peak for name, rate in rates.items()},
    }


def measure_encoder(model: CellPatch, rng: np.random.Generator) -> list[dict[str, float]]:
    """Whole encoder against the padded computation, which takes 64 cells at once."""
    original, fused = PaddedPathFormer(70_000).eval(), PaddedPathFormer(70_000, fused=True).eval()
    rows = []
    for genes in (500, 1000, 2000, 4000, 8000):
        cells = with_values(*draw_cells(512, genes, rng), rng)
        few = cells.slice(0, 64)
        padded = few.to_padded()[1].float(), few.to_padded()[0]
        times = timed(
            partial(model.encode, cells),
            partial(original.get_mid_embeding, *padded),
            partial(fused.get_mid_embeding, *padded),
            repeats=5,
        )
        ours, theirs, theirs_fused = (
            median(taken) / count
            for taken, count in zip(times, (len(cells), len(few), len(few)), strict=True)
        )
        rows.append(
            {
                "genes per cell": cells.entries / len(cells),
                "cells/s": 1 / ours,
                "original cells/s": 1 / theirs,
                "original, fused attention, cells/s": 1 / theirs_fused,
                "times the original": theirs / ours,
                "times the original, fused attention": theirs_fused / ours,
            }
        )
    return rows


def measure_linearity(model: CellPatch, rng: np.random.Generator) -> dict[str, Any]:
    """Seconds per cell by genes per cell, of the encoder and of the cross-attention in it."""
    lengths = (500, 1000, 2000, 4000, 8000, 16_000, 20_000)
    batches = [with_values(*draw_cells(max(64, 600_000 // n), n, rng), rng) for n in lengths]
    whole = timed(*(partial(model.encode, cells) for cells in batches))
    cross = timed(*(cross_attention(model, cells) for cells in batches))
    genes = np.array([cells.entries / len(cells) for cells in batches])
    per_cell = np.array(
        [median(times) / len(cells) for times, cells in zip(whole, batches, strict=True)]
    )
    cross_per_cell = np.array(
        [median(times) / len(cells) for times, cells in zip(cross, batches, strict=True)]
    )
    slope, fixed = np.polyfit(genes, per_cell, 1)
    residual = per_cell - (slope * genes + fixed)
    return {
        "genes per cell": genes.tolist(),
        "microseconds per cell": (per_cell * 1e6).tolist(),
        "nanoseconds per gene, cross-attention": (cross_per_cell / genes * 1e9).tolist(),
        "line": {
            "nanoseconds per gene": slope * 1e9,
            "microseconds per cell": fixed * 1e6,
            "R2": 1 - float((residual**2).sum() / ((per_cell - per_cell.mean()) ** 2).sum()),
        },
    }


def measure_embed(model: CellPatch, cells: int) -> dict[str, float]:
    """File to store against the encoder alone on the same cells, already in memory."""
    from cellpatch_fast import atlas, pp
    from cellpatch_fast.synthetic.generate import synthetic_atlas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "atlas.h5ad"
        entries = synthetic_atlas(path, cells, genes=1000).entries
        tokens = pp.tokenize(str(path), model.vocabulary, model.config)
        parts = [tokens.slice(i, i + 8192) for i in range(0, cells, 8192)]

        def encode() -> None:
            for part in parts:
                model.encode(part)

        def embed() -> None:
            atlas.embed(path, model, Path(folder) / "out.zarr", overwrite=True, progress=False)

        alone, whole = timed(encode, embed, repeats=3)
    return {
        "cells": cells,
        "genes per cell": entries / cells,
        "encoder alone s": median(alone),
        "file to store s": median(whole),
        "ratio": median(whole) / median(alone),
        "cells/s": cells / median(whole),
    }


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{results['date']}",
        "",
    ]
    if cross := results.get("cross-attention"):
        lines += [
            f"sgemm 1024³: {cross['sgemm GFLOP/s']:.0f} GFLOP/s",
            "",
            "| cross-attention | million genes/s | share of sgemm |",
            "| --- | ---: | ---: |",
        ]
        shares = cross["share of sgemm"]
        lines += [
            f"| {name} | {rate:.1f} | {shares[name]:.0%} |"
            for name, rate in cross["million genes/s"].items()
        ]
    if rows := results.get("encoder"):
        lines += ["", f"| {' | '.join(rows[0])} |", "| ---: " * len(rows[0]) + "|"]
        lines += [f"| {' | '.join(f'{value:,.0f}' for value in row.values())} |" for row in rows]
    if linear := results.get("linearity"):
        lines += ["", "| genes per cell | µs per cell | cross-attention, ns per gene |"]
        lines += ["| ---: | ---: | ---: |"]
        columns = [linear[key] for key in list(linear)[:3]]
        lines += [f"| {n:.0f} | {us:.0f} | {ns:.1f} |" for n, us, ns in zip(*columns, strict=True)]
        line = linear["line"]
        lines += [
            "",
            f"Line: {line['microseconds per cell']:.0f} µs per cell + "
            f"{line['nanoseconds per gene']:.1f} ns per gene, R² {line['R2']:.5f}",
        ]
    if embed := results.get("embed"):
        lines += [
            "",
            f"atlas.embed, {embed['cells']:,} cells x {embed['genes per cell']:.0f} genes, .h5ad "
            f"(page cache warm) to store: {embed['file to store s']:.1f} s, "
            f"{embed['cells/s']:,.0f} cells/s; the encoder alone {embed['encoder alone s']:.1f} s: "
            f"ratio {embed['ratio']:.2f}",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="an AnnData file to take real cells from")
    parser.add_argument("--cells", type=int, default=100_000, help="of the file for embed")
    parser.add_argument("--only", choices=("cross-attention", "encoder", "linearity", "embed"))
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    vocabulary = GeneVocabulary.human()
    models = {
        kind: CellPatch(CellPatchConfig(value_embedding=kind), vocabulary).eval()
        for kind in ("affine", "binned")
    }
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    measurements = {
        "cross-attention": lambda: measure_cross_attention(models, options.data, rng),
        "encoder": lambda: measure_encoder(models["affine"], rng),
        "linearity": lambda: measure_linearity(models["affine"], rng),
        "embed": lambda: measure_embed(models["affine"], options.cells),
    }
    for name, measure in measurements.items():
        if options.only in (None, name):
            with torch.inference_mode():
                results[name] = measure()
    print(report(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
