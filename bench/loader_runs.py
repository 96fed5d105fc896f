"""Reading an atlas: the group "loader" of `pytest bench`.

The methods of `bench.loader` that need no other environment, on one generated atlas: our loader on
a token store and on AnnData files, and the slices that anndata and h5py give. Each runs in a
process of its own, and they take turns. Files are in the page cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.atlas_files import write_atlas_files
from bench.loader import METHODS, Method
from bench.options import Options
from bench.processes import COMPILING, Failed, run_python, timing_of
from bench.reporting.results import Record
from cellpatch_fast import atlas

# By whether the run is quick: anndata's default formats, what reads them, how many cells and how
# often.
FORMATS: dict[bool, tuple[str, ...]] = {True: ("zarr",), False: ("zarr", "h5ad-none")}
CHOSEN = {
    True: ("CellLoader", "anndata slices"),
    False: ("CellLoader", "CellLoader, shuffled", "anndata slices", "h5py slices, scanpy"),
}
CELLS = {True: (20_000, 1), False: (300_000, 5)}
DRAWN_CELLS = {True: 1_500, False: 10_000}  # that differ: 19 MB of entries, or more
GENES = 1_500  # of a cell, the median


def measure_loaders(options: Options) -> Iterator[Record]:
    """A record of each method and format."""
    cells, repeats = CELLS[options.quick]
    formats, drawn_cells = FORMATS[options.quick], DRAWN_CELLS[options.quick]
    written = write_atlas_files(options.folder, cells, GENES, formats, drawn_cells=drawn_cells)
    paths = {"tokens": options.folder / "tokens.zarr", **written.paths}
    if not paths["tokens"].exists():
        atlas.tokenize(paths["zarr"], paths["tokens"], vocabulary="human", progress=False)
    wanted = [
        (method, name)
        for method in METHODS
        for name in method.formats
        if method.name in CHOSEN[options.quick] and name in paths
    ]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    failed: dict[tuple[str, str], Failed] = {}
    for _ in range(repeats):
        for method, name in wanted:
            done = _run(method, paths[name], cells, options.time_limit)
            if isinstance(done, Failed):
                failed[method.name, name] = done
            else:
                runs.setdefault((method.name, name), []).append(done)
    for method, name in wanted:
        yield _record(method.name, name, runs.get((method.name, name)), failed)


def _run(method: Method, path: Path, cells: int, limit: float) -> dict[str, float] | Failed:
    """Facts of one run; ``limit`` in seconds is that of a point, of which a process warms up."""
    alone = ("--alone", method.name, path, "--cells", str(cells))
    done = run_python("-m", "bench.loader", *alone, limit=3 * limit + COMPILING)
    return done if isinstance(done, Failed) else done.facts


def _record(
    system: str,
    layout: str,
    runs: list[dict[str, float]] | None,
    failed: dict[tuple[str, str], Failed],
) -> Record:
    name, details = f"loader/{system}/{layout}", {"system": system, "layout": layout}
    if runs is None:
        return Record("loader", name, *failed[system, layout], details=details)
    seconds = timing_of([run["seconds"] for run in runs])
    rates = {
        "nonzeros_per_second": runs[0]["entries"] / seconds.median,
        "cells_per_second": runs[0]["cells"] / seconds.median,
    }
    return Record(
        "loader", name, "measured", seconds=seconds, per="run", details={**details, **rates}
    )
