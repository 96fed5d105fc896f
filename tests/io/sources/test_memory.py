"""A file larger than the memory that the process may have is streamed whole.

The limit is on data (heap and private mappings) and set after the imports and compilation, so it is
what reading may add. That it bites is shown by anndata's own reader, which loads the file and must
fail.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import zarr
from scipy import sparse

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA and /proc")

MIB = 2**20
CELLS_PER_PIECE, GENES_PER_CELL, GENES = 1_000, 1_000, 20_011
RANDOM = np.random.default_rng(0)

STREAM = """
import resource, sys
import anndata, scipy.sparse, zarr  # what any run has imported
from cellpatch_fast.io.sources.source import open_source

path, how, limit, memory_limit = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
for layout in (scipy.sparse.csr_matrix, scipy.sparse.csc_matrix):  # what any run has compiled
    with open_source(anndata.AnnData(layout([[3.0, 0.0], [5.0, 7.0]])), memory_limit=1) as source:
        list(source.read_cells())
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
if how == "whole":
    try:
        anndata.read_zarr(path) if path.endswith(".zarr") else anndata.read_h5ad(path)
    except MemoryError:
        print("too large")
else:
    cells = entries = total = 0
    with open_source(path, memory_limit=memory_limit) as source:
        for block in source.read_cells(max_entries=1_000_000):
            cells += len(block)
            entries += len(block.data)
            total += int(block.data.sum(dtype="float64"))
    print(cells, entries, total)
"""


def run(path: Path, how: str, limit: int, memory_limit: int = 0) -> str:
    command = [sys.executable, "-c", STREAM, str(path), how, str(limit), str(memory_limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def skeleton(root: Any, matrix: Any) -> None:
    """An AnnData object without X's entries: everything else has its final shape."""
    anndata.io.write_elem(root, "/", anndata.AnnData(matrix))


def write_csr(path: Path, pieces: int) -> str:
    """1,000 cells with 1,000 genes each, over and over: 8 MB a piece."""
    genes = [np.sort(RANDOM.choice(GENES, GENES_PER_CELL, replace=False)) for _ in range(10)]
    indices = np.tile(np.concatenate(genes), CELLS_PER_PIECE // 10).astype(np.int32)
    data = RANDOM.integers(1, 9, len(indices)).astype(np.float32)
    cells, entries = pieces * CELLS_PER_PIECE, pieces * len(indices)
    is_zarr = path.suffix == ".zarr"
    root: Any = zarr.open_group(path, mode="w", zarr_format=3) if is_zarr else h5py.File(path, "w")
    skeleton(root, sparse.csr_matrix((cells, GENES), dtype=np.float32))
    for key, piece in {"X/indices": indices, "X/data": data}.items():
        del root[key]
        if is_zarr:
            array = root.create_array(
                key, shape=(entries,), dtype=piece.dtype, chunks=piece.shape, compressors=None
            )
            array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        else:
            array = root.create_dataset(key, (entries,), piece.dtype)
        for start in range(0, entries, len(piece)):
            array[start : start + len(piece)] = piece
    root["X/indptr"][:] = np.arange(cells + 1) * GENES_PER_CELL
    if not is_zarr:
        root.close()
    return f"{cells} {entries} {pieces * int(data.sum())}"


def write_csc(path: Path, pieces: int) -> str:
    """As many cells as a piece has entries / 40; every gene is in every cell."""
    cells, genes = 25_000, 40 * pieces
    data = RANDOM.integers(1, 9, cells).astype(np.float32)
    with h5py.File(path, "w") as file:
        skeleton(file, sparse.csc_matrix((cells, genes), dtype=np.float32))
        for key, piece in {"X/indices": np.arange(cells, dtype=np.int32), "X/data": data}.items():
            del file[key]
            file.create_dataset(key, data=np.tile(piece, genes))
        file["X/indptr"][:] = np.arange(genes + 1) * cells
    return f"{cells} {cells * genes} {genes * int(data.sum())}"


def write_dense(path: Path, pieces: int) -> str:
    """100 cells with 1,000 of 20,011 genes each, over and over: 8 MB a piece."""
    piece = np.zeros((100, GENES), np.float32)
    piece[:, RANDOM.choice(GENES, GENES_PER_CELL, replace=False)] = 3
    with h5py.File(path, "w") as file:
        skeleton(file, np.zeros((1, GENES), np.float32))
        for key in ("obs", "X"):
            del file[key]
        cells = 100 * pieces
        names = anndata.AnnData(np.zeros((cells, 0), np.float32)).obs
        anndata.io.write_elem(file, "obs", names)
        array = file.create_dataset("X", (cells, GENES), np.float32)
        for start in range(0, cells, 100):
            array[start : start + 100] = piece
    return f"{cells} {cells * GENES_PER_CELL} {3 * cells * GENES_PER_CELL}"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that is gone after the test, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("write", "name", "pieces", "limit", "memory_limit"),
    [
        pytest.param(write_csr, "cells.h5ad", 40, 100 * MIB, 0, id="csr-h5ad"),
        pytest.param(write_csr, "cells.zarr", 40, 120 * MIB, 0, id="csr-zarr"),
        pytest.param(write_csc, "cells.h5ad", 20, 100 * MIB, 32 * MIB, id="csc-h5ad"),
        pytest.param(write_dense, "cells.h5ad", 40, 120 * MIB, 0, id="dense-h5ad"),
    ],
)
def test_file_larger_than_memory(
    scratch: Path,
    write: Callable[[Path, int], str],
    name: str,
    pieces: int,
    limit: int,
    memory_limit: int,
) -> None:
    path = scratch / name
    expected = write(path, pieces)
    files = [file for file in [path, *path.rglob("*")] if file.is_file()]
    assert sum(file.stat().st_size for file in files) > 1.2 * limit
    assert run(path, "streamed", limit, memory_limit) == expected
    assert run(path, "whole", limit) == "too large"
