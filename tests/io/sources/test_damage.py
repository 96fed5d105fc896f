"""Input that cannot be read gives one InputError that names the file, the place and a remedy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from cellpatch_fast.errors import InputError
from cellpatch_fast.io.sources.source import open_source

from ..conftest import CELLS, CHUNK, GENES, counts, make_adata, opened, replace, write_plain

Store = Callable[..., Path]


def refusal(data: Any, **options: Any) -> str:
    """The message with which reading all of ``data`` is refused; it has a cause if it is a file."""
    with pytest.raises(InputError) as caught, open_source(data, **options) as source:
        for _ in source.read_cells(max_entries=50):
            pass
    message = str(caught.value)
    assert "\n" not in message
    if isinstance(data, Path):
        assert str(data) in message
    return message


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nowhere.h5ad")


def test_other_files_are_no_anndata(tmp_path: Path) -> None:
    text = tmp_path / "table.h5ad"
    text.write_text("gene,count\n")
    empty = tmp_path / "empty.h5ad"
    empty.touch()
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["measurements"] = np.arange(3)
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    (tmp_path / "folder.zarr").mkdir()
    shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path / "folder.zarr")
    for path, fault in {
        text: "neither HDF5 nor zipped Zarr",
        empty: "is empty",
        tmp_path / "other.h5": "holds no obs and var",
        tmp_path / "other.zarr": "holds no obs and var",
        tmp_path / "folder.zarr": "no Zarr store",
        tmp_path / "archive.zip": "cannot read the Zarr store",
    }.items():
        message = refusal(path)
        assert fault in message
        assert ".h5ad" in message or "copy or download it again" in message


@pytest.mark.parametrize("kept", [0.999, 0.6, 0.1, 0.01])
def test_truncated_h5ad(stored: Store, kept: float) -> None:
    path = stored("h5ad")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert "truncated or damaged: copy or download it again" in refusal(path)


def test_truncated_zip(stored: Store) -> None:
    path = stored("zarr-zip")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "copy or download it again" in refusal(path)


def cells_of_chunk(chunk: int) -> str:
    """The cells with entries in one chunk of X, in words."""
    indptr = counts(GENES, 1).indptr
    entries = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
    cells = np.searchsorted(indptr, entries, side="right") - 1
    return f"cells {cells[0]} to {cells[-1]}"


@pytest.mark.parametrize("part", ["indices", "data"])
def test_damaged_gzip_chunk_names_its_cells(stored: Store, part: str) -> None:
    path = stored("h5ad-gzip")
    with h5py.File(path) as file:
        place = file[f"X/{part}"].id.get_chunk_info(3)
    overwrite(path, place.byte_offset, place.size)
    message = refusal(path)
    assert cells_of_chunk(3) in message
    assert f"/X/{part}, chunk 3" in message
    assert "truncated or damaged" in message


@pytest.mark.parametrize("part", ["indices", "data"])
@pytest.mark.parametrize("container", ["zarr-v2", "zarr-v3"])
@pytest.mark.parametrize("damage", ["overwritten", "cut"])
def test_damaged_zarr_chunk_names_file_and_cells(
    stored: Store, container: str, part: str, damage: str
) -> None:
    path = stored(container)
    chunk = path / "X" / part / ("3" if container == "zarr-v2" else "c/3")
    size = chunk.stat().st_size
    if damage == "cut":
        chunk.write_bytes(chunk.read_bytes()[: size // 2])
    else:
        overwrite(chunk, 0, size)
    message = refusal(path)
    assert cells_of_chunk(3) in message
    assert f"the chunk file {chunk.relative_to(path)}" in message
    assert "truncated or damaged" in message


def test_damaged_shard_names_its_file(stored: Store) -> None:
    path = stored("zarr-v3-sharded")
    shard = path / "X/data/c/1"
    overwrite(shard, 0, shard.stat().st_size)
    assert "the chunk file X/data/c/1" in refusal(path)


@pytest.mark.parametrize("layout", ["csc", "dense"])
@pytest.mark.parametrize("container", ["h5ad-gzip", "zarr-v3"])
def test_damage_in_other_layouts(stored: Store, container: str, layout: str) -> None:
    path = stored(container, layout)
    key = "X" if layout == "dense" else "X/data"
    if container == "h5ad-gzip":
        with h5py.File(path) as file:
            place = file[key].id.get_chunk_info(2)
        overwrite(path, place.byte_offset, place.size)
    else:
        chunk = path / key / ("c/1/0" if layout == "dense" else "c/2")
        overwrite(chunk, 0, chunk.stat().st_size)
    message = refusal(path)
    assert ("cells" if layout == "dense" else "genes") in message


def overwrite(path: Path, start: int, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xa5" * size)


MISSING = {"zarr-v2": "2", "zarr-v3": "c/2", "zarr-v3-sharded": "c/1"}


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("part", ["indices", "data"])
@pytest.mark.parametrize("container", MISSING)
def test_missing_chunk_is_not_read_as_zeros(
    stored: Store, container: str, part: str, layout: str
) -> None:
    path = stored(container, layout)
    (path / "X" / part / MISSING[container]).unlink()
    message = refusal(path)
    assert f"missing chunks of {part}: 1" in message
    assert repr(MISSING[container]) in message


@pytest.mark.parametrize("key", ["X/indptr", "obs/_index", "var/_index"])
def test_missing_chunk_of_offsets_and_names(stored: Store, key: str) -> None:
    path = stored("zarr-v3")
    shutil.rmtree(path / key / "c")
    assert "missing" in refusal(path)


def test_missing_chunk_in_a_zip(tmp_path: Path, stored: Store) -> None:
    path = stored("zarr-v3")
    (path / "X/data/c/2").unlink()
    archive = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path, path.name))
    assert "missing chunks of data: 1" in refusal(archive)


def test_missing_dense_chunk_warns(stored: Store) -> None:
    """It may be a chunk of zeros that the writer left out, so reading goes on."""
    path = stored("zarr-v3", "dense")
    (path / "X/c/2/1").unlink()
    with pytest.warns(UserWarning, match="1 chunks .* are not stored"), open_source(path) as source:
        assert sum(len(block) for block in source.read_cells()) == CELLS


def test_chunks_of_zeros_may_be_left_out(tmp_path: Path) -> None:
    """Zarr leaves them out: here every index is 0, or there is no entry at all."""
    one_gene = sparse.csr_matrix(np.eye(5, 3, dtype=np.float32)[[0, 0, 2, 2, 2]][:, [0, 1, 1]])
    for matrix in (one_gene, sparse.csr_matrix((5, 3), dtype=np.float32)):
        path = write_plain(anndata.AnnData(matrix), tmp_path, "zarr-v3")
        with open_source(path) as source:
            assert sum(len(block.data) for block in source.read_cells()) == matrix.nnz
        shutil.rmtree(path)


@pytest.mark.parametrize("container", ["h5ad", "zarr-v3", "memory"])
def test_absent_layer_lists_those_there_are(stored: Store, container: str) -> None:
    data = make_adata() if container == "memory" else stored(container)
    assert "no layer 'spliced'. Its layers: counts; raw: yes" in refusal(data, layer="spliced")


@pytest.mark.parametrize("container", ["h5ad", "zarr-v3", "memory"])
def test_absent_raw_and_x(tmp_path: Path, container: str) -> None:
    adata = make_adata()
    del adata.raw
    data = adata if container == "memory" else write_plain(adata, tmp_path, container)
    assert "has no raw. Its layers: counts" in refusal(data, use_raw=True)
    adata.X = None
    if container != "memory":
        shutil.rmtree(data, ignore_errors=True)
        data = write_plain(adata, tmp_path, container)
    assert "has no X. Its layers: counts" in refusal(data)


def test_layer_and_raw_exclude_each_other() -> None:
    assert "exclude each other" in refusal(make_adata(), layer="counts", use_raw=True)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("container", ["h5ad", "zarr-v2", "zarr-v3", "memory"])
@pytest.mark.parametrize(("cells", "genes", "fault"), [(0, 7, "0 cells"), (7, 0, "0 genes")])
def test_nothing_to_read(
    tmp_path: Path, container: str, layout: str, cells: int, genes: int, fault: str
) -> None:
    empty = sparse.csr_matrix((cells, genes), dtype=np.float32)
    matrix = {"csr": empty, "csc": empty.tocsc(), "dense": empty.toarray()}[layout]
    adata = anndata.AnnData(matrix)
    data = adata if container == "memory" else write_plain(adata, tmp_path, container)
    assert f"X holds {fault} (its shape is {cells} x {genes})" in refusal(data)


def lengthen(values: np.ndarray) -> np.ndarray:
    return np.append(values, values[-1])


def shift(values: np.ndarray) -> np.ndarray:
    return values + 1


def decrease(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[:5], [values[5] + 10_000], values[6:]])


def outside(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[:150], [GENES], values[151:]])


def negative(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[:150], [-1], values[151:]])


@pytest.mark.parametrize(
    ("key", "change", "fault"),
    [
        ("indptr", lengthen, f"indptr has {CELLS + 2} elements"),
        ("indptr", shift, "indptr starts at 1"),
        ("indptr", decrease, "indptr decreases after position 5"),
        ("indices", lengthen, "indices and"),
        ("data", lengthen, "indices and"),
        (
            "indices",
            outside,
            f"has an entry for gene {GENES}, but there are genes 0 to {GENES - 1}",
        ),
        ("indices", negative, "has an entry for gene -1"),
        ("indices", np.float32, "indices has dtype float32"),
        ("data", np.complex64, "has dtype complex64"),
    ],
)
@pytest.mark.parametrize("container", ["h5ad", "zarr-v3"])
def test_inconsistent_matrix(
    stored: Store,
    container: str,
    key: str,
    change: Callable[[np.ndarray], np.ndarray],
    fault: str,
) -> None:
    path = stored(container)
    replace(path, f"X/{key}", change)
    assert fault in refusal(path)


def test_column_out_of_range_names_its_cell(stored: Store) -> None:
    path = stored("h5ad")
    replace(path, "X/indices", outside)
    cell = int(np.searchsorted(counts(GENES, 1).indptr, 150, side="right")) - 1
    assert f"cell {cell} has an entry for gene {GENES}" in refusal(path)


@pytest.mark.parametrize("memory_limit", [5_000, 2**20])
def test_row_out_of_range_in_csc(stored: Store, memory_limit: int) -> None:
    path = stored("h5ad", "csc")
    replace(
        path, "X/indices", lambda values: np.where(np.arange(len(values)) == 150, CELLS, values)
    )
    gene = int(np.searchsorted(counts(GENES, 1).tocsc().indptr, 150, side="right")) - 1
    expected = f"gene {gene} has an entry for cell {CELLS}, but there are cells 0 to {CELLS - 1}"
    assert expected in refusal(path, memory_limit=memory_limit)


@pytest.mark.parametrize("key", ["X/indptr", "X/data", "var/_index", "obs/_index"])
@pytest.mark.parametrize("container", ["h5ad", "zarr-v2", "zarr-v3"])
def test_missing_element(stored: Store, container: str, key: str) -> None:
    path = stored(container)
    with opened(path) as root:
        del root[key]
    assert "truncated or damaged" in refusal(path)


@pytest.mark.parametrize("table", ["obs", "var"])
def test_table_that_does_not_fit_the_matrix(tmp_path: Path, table: str) -> None:
    path = write_plain(make_adata(), tmp_path, "h5ad")
    with h5py.File(path, "r+") as file:
        del file[table]
        anndata.io.write_elem(file, table, pd.DataFrame(index=["a", "b", "c"]))
    assert re.search(rf"{table} describes 3 (cells|genes)", refusal(path))


@pytest.mark.parametrize("name", ["zarr.json", "X/zarr.json", "X/data/zarr.json"])
def test_damaged_zarr_metadata(stored: Store, name: str) -> None:
    path = stored("zarr-v3")
    (path / name).write_text('{"zarr_format": 3, "node_type": ')
    assert "truncated or damaged" in refusal(path)


def test_encoding_without_a_matrix(stored: Store) -> None:
    path = stored("h5ad")
    with h5py.File(path, "r+") as file:
        file["X"].attrs["encoding-type"] = "awkward-array"
    assert "stored as 'awkward-array'" in refusal(path)


def test_filter_that_is_not_installed(tmp_path: Path) -> None:
    path = write_plain(make_adata(), tmp_path, "h5ad")
    with h5py.File(path, "r+") as file:
        values = file["X/data"][...]
        del file["X/data"]
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((len(values),))
        settings.set_filter(32_999, h5py.h5z.FLAG_OPTIONAL)  # no one has it
        space = h5py.h5s.create_simple(values.shape)
        kind = h5py.h5t.py_create(values.dtype)
        h5py.h5d.create(file["X"].id, b"data", kind, space, settings)
    message = refusal(path)
    assert "the HDF5 filter 32999" in message
    assert "hdf5plugin" in message


def test_object_without_a_usable_matrix() -> None:
    adata = make_adata("dense")
    adata.layers["odd"] = pd.DataFrame(
        adata.X, index=adata.obs_names, columns=adata.var_names
    ).astype("complex64")
    assert "dtype complex64" in refusal(adata, layer="odd")
