"""The benchmark's atlas: the same cells in every format, laid out as the libraries lay it out."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import anndata
import h5py
import numpy as np
import pytest
import zarr

ROOT = Path(__file__).parents[2]
CELLS, GENES = 211, 67
# zarr says these of anndata's own stores
pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata", "ignore:Object at")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        module = importlib.import_module("bench.atlas_files")
        patch.setattr(module, "PIECE", 1_009)
        patch.setattr(module, "DRAWN_COUNTS", 499)
        patch.setattr(module, "SHARD_BYTES", 20_000)
        yield module


@pytest.fixture(scope="module")
def files(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> object:
    return bench.write_atlas_files(tmp_path_factory.mktemp("atlas"), CELLS, GENES, drawn_cells=53)


def read(path: Path) -> anndata.AnnData:
    return anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)


def test_every_format_holds_the_same_cells(bench, files) -> None:
    assert set(files.paths) == set(bench.FORMATS)
    atlases = {name: read(path) for name, path in files.paths.items()}
    first = atlases["zarr"]
    assert first.shape == (CELLS, bench.GENES)
    assert first.X.nnz == files.entries
    assert 0.8 * GENES < np.median(first.X.getnnz(1)) < 1.25 * GENES
    assert first.X.data.min() >= 1
    assert (first.X.data == np.rint(first.X.data)).all()
    for row in range(CELLS):  # each gene at most once, in order
        assert (np.diff(first.X[row].indices) > 0).all()
    for atlas in atlases.values():
        assert (atlas.X != first.X).nnz == 0
        assert atlas.obs.equals(first.obs)
        assert atlas.var_names.equals(first.var_names)


def test_types_and_layout_are_those_that_anndata_writes(files, tmp_path: Path) -> None:
    atlas = read(files.paths["zarr"])
    with anndata.settings.override(zarr_write_format=3):
        atlas.write_zarr(tmp_path / "own.zarr")
    for name in ("", "data", "indices", "indptr"):  # of X itself, and of its arrays
        own, ours = (
            json.loads((path / "X" / name / "zarr.json").read_text())
            for path in (tmp_path / "own.zarr", files.paths["zarr"])
        )
        assert ours == own
    for compression in ("gzip", "lzf", None):
        atlas.write_h5ad(tmp_path / "own.h5ad", compression=compression)
        with (
            h5py.File(tmp_path / "own.h5ad") as own_file,
            h5py.File(files.paths[f"h5ad-{str(compression).lower()}"]) as our_file,
        ):
            for name in ("data", "indices", "indptr"):
                own, ours = own_file["X"][name], our_file["X"][name]
                for fact in ("dtype", "chunks", "compression", "compression_opts", "maxshape"):
                    assert getattr(ours, fact) == getattr(own, fact), (compression, name, fact)


def test_annbatch_layout(files) -> None:
    chunk = int(64 * files.entries / CELLS)
    for name, itemsize in (("data", 4), ("indices", 2), ("indptr", 4)):
        array = zarr.open_array(files.paths["annbatch"] / "X" / name, mode="r")
        assert array.dtype.itemsize == itemsize
        assert array.chunks == (chunk,)
        # 20,000 bytes of data, indices and indptr before the indices are narrowed
        assert array.shards == (20_000 // 8 // chunk * chunk or chunk,)
        (codec,) = array.compressors
        assert (codec.cname.value, codec.clevel, codec.shuffle.value) == ("lz4", 3, "shuffle")


def test_what_is_there_is_kept_and_what_was_interrupted_is_not(bench, tmp_path: Path) -> None:
    first = bench.write_atlas_files(tmp_path, 11, 13, ["zarr"])
    written = (first.paths["zarr"] / "zarr.json").stat().st_mtime_ns
    leftover = tmp_path / "unfinished-h5ad-none-11x13.h5ad"
    leftover.write_bytes(b"half")
    lines: list[str] = []
    second = bench.write_atlas_files(tmp_path, 11, 13, ["zarr", "h5ad-none"], lines.append)
    assert (second.paths["zarr"] / "zarr.json").stat().st_mtime_ns == written
    assert [line.split(":")[0] for line in lines] == ["h5ad-none-11x13.h5ad"]
    assert not leftover.exists()
    assert (read(second.paths["h5ad-none"]).X != read(second.paths["zarr"]).X).nnz == 0
