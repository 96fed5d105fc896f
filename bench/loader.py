"""Loaders on one atlas in every format: ``python bench/loader.py --folder DIR``.

Each method runs in a process of its own, which first runs it on some thousand cells (compiling,
opening) and then once measured; the methods take turns, so that what else the machine does meets
them alike. Medians are printed with ratios. Files are read from the system's page cache, unless
``--cold`` has it dropped before each run (`posix_fadvise`).

All use the same number of threads, as many as there are cores for this process. The comparisons:

- a token store against anndata's sparse dataset on the AnnData Zarr, and against doing nothing but
  decompressing the store's chunks, from memory into one buffer per thread;
- AnnData Zarr against zarr-python reading its arrays, and annbatch (in its own environment, see
  `peers/annbatch_loader.py`), at its best setting;
- .h5ad against h5py slices, preprocessed by scanpy;
- shuffled epochs against file order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.atlas_files import FORMATS, bytes_on_disk, write_atlas_files
from bench.machine import processor
from bench.processes import peak_memory
from cellpatch_fast.devices import usable_cores
from cellpatch_fast.io.chunks.direct import DirectChunks
from cellpatch_fast.io.chunks.files import Range

WARM_CELLS = 3_000  # compile and open everything, and draw no conclusion
SLICE = 4_096  # rows of a slice, for those who slice
BATCH = 512
THREADS = usable_cores()

Counted = tuple[int, int]  # cells, entries
Taken = dict[str, float]  # seconds and processor seconds
Clocked = tuple[Counted, Taken]


@contextlib.contextmanager
def clocked() -> Iterator[Taken]:
    """The time that the body takes."""
    taken: Taken = {}
    processor_started, started = time.process_time(), time.perf_counter()
    yield taken
    taken["seconds"] = time.perf_counter() - started
    taken["processor seconds"] = time.process_time() - processor_started


def load(path: Path, cells: int, **options: Any) -> Clocked:
    from cellpatch_fast import CellPatchConfig, GeneVocabulary
    from cellpatch_fast.loading import CellLoader

    vocabulary, config = GeneVocabulary.human(), CellPatchConfig()
    options |= {"batch_size": BATCH, "rows": [(0, cells)], "threads": THREADS}
    with CellLoader(path, vocabulary, config, **options) as loader, clocked() as taken:
        cells_seen = entries = 0
        for batch in loader:
            cells_seen += len(batch.rows)
            entries += batch.cells.entries
    return (cells_seen, entries), taken


def load_shuffled(path: Path, cells: int) -> Clocked:
    return load(path, cells, shuffle=True, block_size=64)


def load_masked(path: Path, cells: int) -> Clocked:
    """For pretraining; hidden entries count too."""
    from cellpatch_fast.preprocessing.masking import Masking

    (cells_seen, _), taken = load(path, cells, shuffle=True, block_size=64, masking=Masking())
    from cellpatch_fast.io import TokenStore

    with TokenStore(path) as store:
        return (cells_seen, int(store.offsets[cells])), taken


def decompress(path: Path, cells: int) -> Clocked:
    """Nothing but the chunks of a token store, whose bytes are in memory before.

    Each thread decodes runs of 16 chunks, into the same memory again and again.
    """
    from cellpatch_fast.io import TokenStore

    with TokenStore(path) as store:
        entries = int(store.offsets[cells])
        tasks: deque[tuple[Any, ...]] = deque()
        for chunks in (store.genes, store.values):
            assert isinstance(chunks, DirectChunks)
            for first in range(0, entries // chunks.chunk, 16):
                numbers = np.arange(first, min(first + 16, entries // chunks.chunk))
                for run in chunks._find(numbers):
                    where = Range(run.file, int(run.starts[0]), int(run.stops[-1]))
                    content = chunks._files.fetch([where]).content.copy()
                    places = run.starts - run.starts[0], run.stops - run.starts[0]
                    tasks.append((chunks, run._replace(first=0), content, *places, numbers))

        def work() -> None:
            room: dict[Any, np.ndarray] = {}
            with contextlib.suppress(IndexError):  # nothing left
                while True:
                    chunks, run, *rest, numbers = tasks.popleft()
                    out = room.setdefault(chunks, np.empty(16 * chunks.chunk, chunks.dtype))
                    out = out[: len(numbers) * chunks.chunk]
                    chunks._decode_all(run, *rest, numbers, out)

        with clocked() as taken, ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(work) for _ in range(THREADS)]:
                done.result()
        return (cells, entries), taken


def slice_anndata(path: Path, cells: int) -> Clocked:
    import anndata
    import zarr

    matrix = anndata.io.sparse_dataset(zarr.open_group(path, mode="r")["X"])
    with clocked() as taken:
        entries = sum(matrix[start : start + SLICE].nnz for start in range(0, cells, SLICE))
    return (cells, entries), taken


def read_zarr(path: Path, cells: int) -> Clocked:
    """The two arrays, as large slices."""
    import zarr

    group: Any = zarr.open_group(path, mode="r")["X"]
    entries = int(group["indptr"][cells])
    with clocked() as taken:
        for start in range(0, entries, 1 << 24):
            for part in ("indices", "data"):
                group[part][start : min(start + (1 << 24), entries)]
    return (cells, entries), taken


def slice_h5py(path: Path, cells: int) -> Clocked:
    """Slices, normalised and logged by scanpy, clipped and rounded."""
    import anndata
    import h5py
    import scanpy
    from scipy import sparse

    with h5py.File(path) as file, clocked() as taken:
        group, entries = file["X"], 0
        indptr = group["indptr"][: cells + 1]
        genes = int(group.attrs["shape"][1])
        for start in range(0, cells, SLICE):
            offsets = indptr[start : start + SLICE + 1]
            part = slice(int(offsets[0]), int(offsets[-1]))
            arrays = group["data"][part], group["indices"][part], offsets - offsets[0]
            adata = anndata.AnnData(sparse.csr_matrix(arrays, (len(offsets) - 1, genes)))
            scanpy.pp.normalize_total(adata, target_sum=1e4)
            scanpy.pp.log1p(adata)
            np.rint(np.minimum(adata.X.data, 5)).astype(np.uint8)
            entries += adata.X.nnz
    return (cells, entries), taken


def tokenize(path: Path, cells: int) -> Clocked:
    """A token store beside the file, which is removed; always of all cells."""
    from cellpatch_fast import atlas

    output = path.with_name(f"tokenized-{path.name}")
    with clocked() as taken:
        summary = atlas.tokenize(path, output, vocabulary="human", overwrite=True, progress=False)
    shutil.rmtree(output)
    return (summary.cells, summary.entries), taken


@dataclass(frozen=True)
class Method:
    """A way to read, and what it reads.

    ``share`` is the part of the atlas that slow ones read.
    """

    name: str
    run: Callable[[Path, int], Clocked]
    formats: tuple[str, ...]
    share: float = 1.0


ZARR, H5AD = ("zarr", "annbatch"), ("h5ad-gzip", "h5ad-lzf", "h5ad-none")
METHODS = [
    Method("CellLoader", load, ("tokens", *ZARR, *H5AD)),
    Method("CellLoader, shuffled", load_shuffled, ("tokens", "annbatch")),
    Method("CellLoader, shuffled and masked", load_masked, ("tokens",)),
    Method("decompression alone", decompress, ("tokens",)),
    Method("anndata slices", slice_anndata, ZARR, 0.2),
    Method("zarr-python, the arrays", read_zarr, ZARR, 0.5),
    Method("h5py slices, scanpy", slice_h5py, H5AD, 0.1),
    Method("cellpatch tokenize", tokenize, ZARR),
]
# method and format, at least so many times as fast as method and format
TARGETS = [
    ("CellLoader", "tokens", "anndata slices", "zarr", 5),
    ("CellLoader", "tokens", "decompression alone", "tokens", 0.8),
    *(("CellLoader", name, "annbatch", name, 3) for name in ZARR),
    *(("CellLoader", name, "zarr-python, the arrays", name, 3) for name in ZARR),
    *(("CellLoader", name, "h5py slices, scanpy", name, 3) for name in H5AD),
    ("CellLoader, shuffled", "tokens", "CellLoader", "tokens", 0.5),
]


def run_alone(options: argparse.Namespace) -> None:
    """One method on one format, for another process: prints JSON."""
    method = next(method for method in METHODS if method.name == options.alone[0])
    path = Path(options.alone[1])
    if method.run is not tokenize:
        method.run(path, min(WARM_CELLS, options.cells))
    if options.cold:
        drop_from_cache(path)
    (cells, entries), taken = method.run(path, int(options.cells * method.share))
    facts = {"cells": cells, "entries": entries, "peak memory MB": peak_memory() / 2**20, **taken}
    print(json.dumps(facts))


def drop_from_cache(path: Path) -> None:
    """Have the system forget what it holds of files."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(options: argparse.Namespace, paths: dict[str, Path]) -> list[dict[str, Any]]:
    """All methods in turn, ``options.repeats`` times; medians."""
    wanted = [
        (method, name)
        for method in METHODS
        for name in method.formats
        if name in paths and (not options.only or options.only in f"{method.name} {name}")
    ]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for repeat in range(options.repeats):
        for method, name in wanted:
            command = [sys.executable, __file__, "--alone", method.name, str(paths[name])]
            command += ["--cells", str(options.cells)] + ["--cold"] * options.cold
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{method.name} on {name} failed:\n{done.stderr}")
            result = json.loads(done.stdout.splitlines()[-1])
            runs.setdefault((method.name, name), []).append(result)
            print(f"{repeat}: {method.name}, {name}: {result['seconds']:.2f} s", file=sys.stderr)
        if options.annbatch:
            for name in ZARR:
                if name in paths and (not options.only or options.only in f"annbatch {name}"):
                    result = run_annbatch(options, paths[name])
                    runs.setdefault(("annbatch", name), []).append(result)
    return [
        {
            "method": method,
            "format": name,
            **{key: statistics.median(run[key] for run in done) for key in done[0]},
            "non-zeros/s": statistics.median(run["entries"] / run["seconds"] for run in done),
            "bytes per non-zero": bytes_on_disk(paths[name]) / options.entries,
        }
        for (method, name), done in runs.items()
    ]


def run_annbatch(options: argparse.Namespace, path: Path) -> dict[str, float]:
    """annbatch at its best setting, in its own environment."""
    script = Path(__file__).with_name("peers") / "annbatch_loader.py"
    if options.cold:
        drop_from_cache(path)
    command = [options.annbatch, script, path, "--repeats", "1", "--threads", str(THREADS)]
    command += ["--max-cells", str(options.cells // 5)]
    facts = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    best = facts["best"]
    return {
        "cells": best["cells"],
        "entries": best["non-zeros"],
        "peak memory MB": facts["peak memory MB"],
        "seconds": best["seconds"],
        "processor seconds": best["processor seconds"],
    }


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets, with what was reached."""
    rates = {(row["method"], row["format"]): row["non-zeros/s"] for row in rows}
    return [
        {
            "target": f"{method}, {name} / {other}, {other_name}",
            "at least": factor,
            "found": rates[method, name] / rates[other, other_name],
        }
        for method, name, other, other_name, factor in TARGETS
        if (method, name) in rates and (other, other_name) in rates
    ]


def report(results: dict[str, Any]) -> str:
    lines = [
        "| method | format | million non-zeros/s | cells/s | MB/s from the file | processor s | "
        "peak MB | bytes per non-zero |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        rate = row["non-zeros/s"]
        lines.append(
            f"| {row['method']} | {row['format']} | {rate / 1e6:.0f} | "
            f"{row['cells'] / row['seconds']:,.0f} | {rate * row['bytes per non-zero'] / 1e6:.0f} "
            f"| {row['processor seconds']:.2f} | {row['peak memory MB']:.0f} | "
            f"{row['bytes per non-zero']:.2f} |"
        )
    lines += ["", "| target | at least | found |", "| --- | ---: | ---: |"]
    lines += [
        f"| {row['target']} | {row['at least']} | {row['found']:.2f} |"
        for row in results["targets"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="of the files, which are made if need be")
    parser.add_argument("--cells", type=int, default=300_000)
    parser.add_argument("--genes", type=int, default=1_500, help="median per cell")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="all without it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="methods and formats that contain this text")
    parser.add_argument("--cold", action="store_true", help="read from the disk")
    parser.add_argument("--annbatch", type=Path, help="Python of an environment with annbatch")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        run_alone(options)
        return
    if options.folder is None:
        parser.error("--folder is required")

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    files = write_atlas_files(
        options.folder, options.cells, options.genes, options.formats, progress
    )
    options.entries = files.entries
    paths = dict(files.paths)
    tokens = options.folder / f"tokens-{options.cells}x{options.genes}.zarr"
    if not tokens.exists():
        from cellpatch_fast import atlas

        atlas.tokenize(next(iter(paths.values())), tokens, vocabulary="human")
    rows = measure(options, {"tokens": tokens, **paths})
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "processor": processor(),
            "threads": THREADS,
            "python": platform.python_version(),
        },
        "files": "dropped from the cache" if options.cold else "in the page cache",
        "cells": files.cells,
        "entries": files.entries,
        "rows": rows,
        "targets": compare(rows),
    }
    print(report(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
