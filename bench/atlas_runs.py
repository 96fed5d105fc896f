"""From an atlas file to an embedding store, by number of cells: speed, and memory that stays flat.

The atlas is generated (`cellpatch_fast.datasets.synthetic_atlas`) as an uncompressed .h5ad, which
is anndata's default, and embedded by `cellpatch_fast.atlas.embed` in a new process. Time is that of
the call, from opening the file and loading the model to the finished store; a short call before it,
on a few cells, loads the compiled kernels. Memory is the most that the process has held. Atlases
are kept: generating one takes about as long as embedding it.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.processes import COMPILING, Failed, peak_memory, run_python, timing_of
from bench.reporting.results import Record
from bench.startup import example

SIZES = (10_000, 100_000, 1_000_000)
QUICK_SIZES = (10_000, 30_000)
GENES = 820  # per cell, the median
CELL_BYTES = 8 * 1.05 * GENES + 4 * 640  # on disk, of the atlas and of its embedding
SMALL = 10_000  # cells of an atlas that is embedded several times
PATIENCE = 3  # an atlas may take so many times as long as a point of other groups


def measure_atlases(
    folder: Path,
    device: torch.device,
    sizes: Sequence[int],
    *,
    repeats: int,
    time_limit: float,
) -> Iterator[Record]:
    """A record for each number of cells.

    ``repeats`` are of `SMALL` atlases, larger ones are embedded once; ``time_limit`` is in seconds,
    see `PATIENCE`.
    """
    time_limit *= PATIENCE
    rate = None  # cells per second, of the size before
    for cells in sizes:
        name, details = f"atlas/{cells}", {"cells": cells}
        free = shutil.disk_usage(folder).free
        if free < 1.2 * CELL_BYTES * cells:
            reason = f"{folder} has {free / 1e9:.0f} GB free, {CELL_BYTES * cells / 1e9:.0f} needed"
            yield Record("atlas", name, "skipped", reason, details=details)
        elif rate and cells / rate > time_limit:
            reason = f"{cells / rate:.0f} s at the speed of fewer cells, {time_limit:g} s allowed"
            yield Record("atlas", name, "out of time", reason, details=details)
        else:
            times = repeats if cells <= SMALL else 1
            record = measure_atlas(folder, device, cells, times, time_limit)
            rate = record.details.get("cells_per_second", rate)
            yield record


def measure_atlas(
    folder: Path, device: torch.device, cells: int, repeats: int, time_limit: float
) -> Record:
    """Embed an atlas of so many cells."""
    warm_up, model = example(folder)
    atlas = make_atlas(folder, cells)
    taken, facts = [], {}
    for _ in range(repeats):
        done = run_python(
            *("-m", "bench.atlas_runs", warm_up, atlas, model, folder, str(device)),
            limit=time_limit + COMPILING,  # to start, and to warm up
        )
        if isinstance(done, Failed):
            return Record("atlas", f"atlas/{cells}", *done, details={"cells": cells})
        facts = done.facts
        taken.append(facts.pop("seconds"))
    seconds = timing_of(taken)
    facts |= {"cells": cells, "cells_per_second": cells / seconds.median}
    return Record("atlas", f"atlas/{cells}", "measured", seconds=seconds, per="run", details=facts)


def make_atlas(folder: Path, cells: int) -> Path:
    """The atlas, unless it is there already."""
    from cellpatch_fast.synthetic.generate import synthetic_atlas

    path = folder / f"atlas-{cells}x{GENES}.h5ad"
    if not path.exists():
        synthetic_atlas(path, cells, genes=GENES, progress=False)
    return path


def embed_alone(warm_up: str, atlas: str, model: str, folder: str, device: str) -> dict[str, Any]:
    """Embed an atlas in this process, which does nothing else."""
    import tempfile

    import h5py

    from cellpatch_fast.atlas.embed import embed

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        embed(warm_up, model, Path(scratch, "warm-up.zarr"), device=device, progress=False)
        started = time.perf_counter()
        done = embed(atlas, model, Path(scratch, "store.zarr"), device=device, progress=False)
        seconds = time.perf_counter() - started
        files = [file for file in done.output.rglob("*") if file.is_file()]
        output_bytes = sum(file.stat().st_size for file in files)
    with h5py.File(atlas) as file:
        entries = len(file["X/data"])
    return {
        "seconds": seconds,
        "genes_per_cell": GENES,
        "mean_genes_per_cell": entries / done.cells,
        "streaming_seconds": done.seconds,
        "peak_rss_bytes": peak_memory(),
        "output_bytes": output_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else None,
    }


if __name__ == "__main__":
    print(json.dumps(embed_alone(*sys.argv[1:])))
