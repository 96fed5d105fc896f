"""The atlas that loaders are measured on: ``python bench/atlas_files.py --folder DIR``.

Raw counts of cells with realistic gene frequencies, median 1,500 genes, in every format that is
compared. Each is what its library would write by default:

- ``zarr``: AnnData Zarr v3, chunks and codec chosen by Zarr, no shards (anndata 0.12);
- ``annbatch``: AnnData Zarr v3 as annbatch 0.3 recommends (`write_sharded`): chunks of 64 cells,
  shards of 1 GiB before compression, Blosc LZ4 level 3 with shuffle, column numbers as uint16;
- ``h5ad-gzip``, ``h5ad-lzf``, ``h5ad-none``: .h5ad with that compression, chunks chosen by h5py.

A part of the cells are drawn and repeated in random order, too far from each other for a compressor
to notice; their counts differ each time. Any range of entries can be made by itself, so arrays are
written piece by piece, of at most `PIECE` entries or one shard; that takes up to 1.2 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.cells import GENES, draw_cells

DRAWN_CELLS = 10_000
DRAWN_COUNTS = 16_777_259  # a prime: entry e has count number e modulo this
PIECE = 1 << 25  # entries; 128 MB of counts
SHARD_BYTES = 1 << 30  # annbatch's "1GB"
CHUNK_CELLS = 64  # annbatch's n_obs_per_chunk


@dataclass(frozen=True, eq=False)
class Atlas:
    """Cells x genes counts in CSR form, made where they are asked for.

    Parameters
    ----------
    drawn_offsets, drawn_columns
        int64 [drawn cells + 1] and int32 [drawn entries]: the columns of the cells that repeat.
    drawn_counts
        float32: counts that repeat, whatever the cell.
    drawn
        int64 [cells]: which of them a cell is.
    """

    drawn_offsets: np.ndarray
    drawn_columns: np.ndarray
    drawn_counts: np.ndarray
    drawn: np.ndarray

    @classmethod
    def draw(cls, cells: int, genes: int, drawn_cells: int, seed: int = 0) -> Atlas:
        rng = np.random.default_rng(seed)
        offsets, tokens = draw_cells(min(drawn_cells, cells), genes, rng)
        counts = rng.geometric(0.5, min(DRAWN_COUNTS, cells * genes)).astype(np.float32)
        return cls(offsets, tokens - 1, counts, rng.integers(0, len(offsets) - 1, cells))

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [cells + 1]"""
        return np.concatenate([[0], np.cumsum(np.diff(self.drawn_offsets)[self.drawn])])

    def columns(self, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """The columns of the entries ``start : stop``."""
        offsets, out = self.offsets, np.empty(stop - start, dtype)
        first, last = np.searchsorted(offsets, [start, stop], side="right") - 1
        for cell in range(first, min(last + 1, len(self.drawn))):
            low, high = max(start, offsets[cell]), min(stop, offsets[cell + 1])
            shift = self.drawn_offsets[self.drawn[cell]] - offsets[cell]
            out[low - start : high - start] = self.drawn_columns[low + shift : high + shift]
        return out

    def counts(self, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """The counts of the entries ``start : stop``."""
        out, drawn = np.empty(stop - start, dtype), self.drawn_counts
        place = 0
        while place < len(out):
            part = drawn[(start + place) % len(drawn) :][: len(out) - place]
            out[place : place + len(part)] = part
            place += len(part)
        return out


@dataclass(frozen=True)
class AtlasFiles:
    """The files of an atlas, by format, and how many cells and entries each has."""

    paths: dict[str, Path]
    cells: int
    entries: int


def write_atlas_files(
    folder: Path,
    cells: int = 300_000,
    genes: int = 1_500,
    formats: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
    *,
    drawn_cells: int = DRAWN_CELLS,
) -> AtlasFiles:
    """Write the atlas in each format, except where the file is there already.

    Parameters
    ----------
    folder
        Where the files go; it is made if need be.
    cells, genes
        How many cells, and the median number of genes of a cell.
    formats
        Keys of `FORMATS`; all without it.
    progress
        Is told what was written and how long it took.
    drawn_cells
        How many cells differ, at most; 1,000 take about two seconds to draw.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atlas = Atlas.draw(cells, genes, drawn_cells)
    entries = int(atlas.offsets[-1])
    paths = {}
    for name in formats or FORMATS:
        suffix = ".h5ad" if name.startswith("h5ad") else ".zarr"
        path = folder / f"{name}-{cells}x{genes}{suffix}"
        paths[name] = path
        if path.exists():
            continue
        started = time.perf_counter()
        unfinished = path.with_name(f"unfinished-{path.name}")
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        FORMATS[name](atlas, unfinished)
        unfinished.rename(path)
        progress(f"{path.name}: {time.perf_counter() - started:.0f} s")
    return AtlasFiles(paths, cells, entries)


def bytes_on_disk(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def write_zarr(atlas: Atlas, path: Path) -> None:
    """As anndata does: neither chunks nor codec are chosen."""
    _write_zarr(atlas, path, index_type(atlas), {})


def write_annbatch(atlas: Atlas, path: Path) -> None:
    """With the sizes that annbatch computes from the mean cell."""
    from zarr.codecs import BloscCodec

    cells, entries = len(atlas.drawn), int(atlas.offsets[-1])
    row_bytes = (entries * (4 + index_type(atlas).itemsize)) / cells + index_type(atlas).itemsize
    chunk = min(int(CHUNK_CELLS * entries / cells), entries)
    shard = min(int(int(SHARD_BYTES / row_bytes) * entries / cells), entries)
    layout = {
        "chunks": (chunk,),
        "shards": (max(chunk, shard // chunk * chunk),),
        "compressors": (BloscCodec(cname="lz4", clevel=3, shuffle="shuffle"),),
    }
    _write_zarr(atlas, path, np.dtype(np.uint16), layout)


def _write_zarr(atlas: Atlas, path: Path, columns: np.dtype, layout: dict[str, Any]) -> None:
    import anndata
    import zarr

    with anndata.settings.override(zarr_write_format=3):
        _annotation(atlas).write_zarr(path)
    root = zarr.open_group(path, mode="r+")
    matrix = root.require_group("X")
    matrix.attrs.update(_matrix_attributes(atlas))
    offsets = atlas.offsets
    for name, make, kind in (
        ("data", atlas.counts, np.dtype(np.float32)),
        ("indices", atlas.columns, columns),
    ):
        array = matrix.create_array(name, shape=(int(offsets[-1]),), dtype=kind, **layout)
        unit = (array.shards or array.chunks)[0]  # what is written at once, and only once
        for start, stop in _pieces(array.shape[0], unit):
            array[start:stop] = make(start, stop, kind)
    stored = offsets.astype(index_type(atlas))
    matrix.create_array("indptr", shape=stored.shape, dtype=stored.dtype, **layout)[:] = stored
    zarr.consolidate_metadata(root.store)


def write_h5ad(atlas: Atlas, path: Path, compression: str | None) -> None:
    """As anndata does: resizable arrays, so chunks chosen by h5py."""
    import h5py

    _annotation(atlas).write_h5ad(path)
    offsets = atlas.offsets
    with h5py.File(path, "r+") as file:
        matrix = file.require_group("X")
        matrix.attrs.update(_matrix_attributes(atlas))
        for name, make, kind in (
            ("data", atlas.counts, np.dtype(np.float32)),
            ("indices", atlas.columns, index_type(atlas)),
            ("indptr", lambda start, stop, kind: offsets[start:stop], index_type(atlas)),
        ):
            length = len(offsets) if name == "indptr" else int(offsets[-1])
            array = matrix.create_dataset(
                name, (length,), kind, maxshape=(None,), compression=compression
            )
            for start, stop in _pieces(length, array.chunks[0]):
                array[start:stop] = make(start, stop, array.dtype)


FORMATS: dict[str, Callable[[Atlas, Path], None]] = {
    "zarr": write_zarr,
    "annbatch": write_annbatch,
    "h5ad-gzip": lambda atlas, path: write_h5ad(atlas, path, "gzip"),
    "h5ad-lzf": lambda atlas, path: write_h5ad(atlas, path, "lzf"),
    "h5ad-none": lambda atlas, path: write_h5ad(atlas, path, None),
}


def index_type(atlas: Atlas) -> np.dtype:
    """What SciPy takes for columns and offsets, and anndata writes."""
    return np.dtype(np.int32 if atlas.offsets[-1] < 1 << 31 else np.int64)


def _pieces(length: int, unit: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover ``length`` elements, of whole units, and of at most `PIECE` if possible."""
    step = max(PIECE // unit, 1) * unit
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _matrix_attributes(atlas: Atlas) -> dict[str, Any]:
    return {
        "encoding-type": "csr_matrix",
        "encoding-version": "0.1.0",
        "shape": [len(atlas.drawn), GENES],
    }


def _annotation(atlas: Atlas) -> Any:
    """The atlas without its matrix: human genes, cells with a batch and one of 37 types."""
    import anndata
    import pandas as pd

    from cellpatch_fast.genes.names import human_genes

    rng = np.random.default_rng(1)
    obs = pd.DataFrame(
        {
            name: pd.Categorical.from_codes(
                rng.integers(0, count, len(atlas.drawn)), [f"{name} {i}" for i in range(count)]
            )
            for name, count in (("batch", 7), ("type", 37))
        },
        index=pd.Index([f"cell-{i}" for i in range(len(atlas.drawn))]),
    )
    return anndata.AnnData(obs=obs, var=pd.DataFrame(index=pd.Index(human_genes().ensembl_ids)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the files go")
    parser.add_argument("--cells", type=int, default=300_000)
    parser.add_argument("--genes", type=int, default=1_500, help="median per cell")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="all without it")
    options = parser.parse_args()

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    files = write_atlas_files(
        options.folder, options.cells, options.genes, options.formats, progress
    )
    facts = {
        name: {"path": str(path), "bytes per non-zero": bytes_on_disk(path) / files.entries}
        for name, path in files.paths.items()
    }
    print(json.dumps({"cells": files.cells, "non-zeros": files.entries, "files": facts}, indent=1))


if __name__ == "__main__":
    main()
