"""`atlas.embed`: files in, one store out, with the bits of `tl.embed`, whatever happens between."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import zarr

import cellpatch_fast as cp
from cellpatch_fast import CellPatch, InputError
from cellpatch_fast.io.stores import embeddings

from ..conftest import GENES, MakeCells, stopped_after, tree, write_zarr

CELLS = 211
KEY = "X_cellpatch"


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 20 cells."""
    monkeypatch.setattr(embeddings, "CHUNK_ROWS", 20)
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 1)


@pytest.fixture
def embed(small_model: CellPatch, output: Path) -> Callable[..., np.ndarray]:
    """``embed(inputs, **options)``: the rows in the finished store."""

    def run(inputs: Any, **options: Any) -> np.ndarray:
        summary = cp.atlas.embed(inputs, small_model, output, **options)
        assert summary.output == output
        return zarr.open_array(output / "obsm" / KEY)[:]  # type: ignore[return-value]

    return run


@pytest.fixture
def expected(make_cells: MakeCells, small_model: CellPatch) -> np.ndarray:
    embedded = cp.tl.embed(make_cells(CELLS), small_model, copy=True)
    assert embedded is not None
    return embedded.obsm[KEY]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000, None])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_as_in_memory(
    embed: Callable[..., np.ndarray],
    cells_file: Path,
    expected: np.ndarray,
    batch_size: int | None,
    threads: int,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert np.array_equal(embed(cells_file, batch_size=batch_size), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("container", ["h5ad", "zarr-v2", "zarr-v3", "layer", "raw"])
def test_same_bits_from_every_kind_of_file(
    embed: Callable[..., np.ndarray],
    make_cells: MakeCells,
    tmp_path: Path,
    expected: np.ndarray,
    container: str,
    layout: str,
) -> None:
    adata = make_cells(CELLS)
    del adata.raw
    adata.X = {"csr": adata.X, "csc": adata.X.tocsc(), "dense": adata.X.toarray()}[layout]
    options: dict[str, Any] = {}
    if container == "layer":
        adata.layers["counts"], adata.X = adata.X, adata.layers["other"]
        options = {"layer": "counts"}
    elif container == "raw":
        adata.raw = adata
        adata = adata[:, :5].copy()
        options = {"use_raw": True}
    path = tmp_path / ("cells.zarr" if container.startswith("zarr") else "cells.h5ad")
    if path.suffix == ".zarr":
        write_zarr(adata, path, 2 if container == "zarr-v2" else 3)
    else:
        adata.write_h5ad(path)
    assert np.array_equal(embed(path, **options), expected)


def test_store_is_the_input_with_embeddings(
    embed: Callable[..., np.ndarray], cells_file: Path, output: Path, expected: np.ndarray
) -> None:
    before = anndata.read_h5ad(cells_file)
    embed(cells_file)
    after = anndata.read_zarr(output)
    assert np.array_equal(after.obsm[KEY], expected)
    pd.testing.assert_frame_equal(after.obs, before.obs, check_dtype=False)
    assert after.obs["kind"].cat.categories.tolist() == ["c", "a", "b"]
    assert after.n_vars == 0
    assert after.uns[KEY]["params"]["pool"] == "flatten"


def test_inputs_follow_each_other(
    embed: Callable[..., np.ndarray],
    make_cells: MakeCells,
    small_model: CellPatch,
    tmp_path: Path,
    output: Path,
) -> None:
    """Different genes, different columns of obs, and shards that span inputs."""
    parts = [make_cells(33, 1)[:, 50:].copy(), make_cells(50, 2), make_cells(7, 3)[:, ::-1].copy()]
    del parts[0].obs["depth"]
    parts[1].obs["batch"] = "second"
    paths = [tmp_path / f"part{number}.h5ad" for number in range(3)]
    for part, path in zip(parts, paths, strict=True):
        part.write_h5ad(path)
    rows = embed(paths)
    alone = [cp.tl.embed(part, small_model, copy=True).obsm[KEY] for part in parts]
    assert np.array_equal(rows, np.concatenate(alone))
    obs = anndata.read_zarr(output).obs
    assert obs.index.tolist() == [name for part in parts for name in part.obs_names]
    assert (
        obs["cellpatch_input"].tolist()
        == [str(paths[0])] * 33 + [str(paths[1])] * 50 + [str(paths[2])] * 7
    )
    assert obs["depth"].isna().sum() == 33
    assert obs["batch"].notna().sum() == 50


def test_names_of_cells_may_occur_twice(
    embed: Callable[..., np.ndarray], make_cells: MakeCells, tmp_path: Path, output: Path
) -> None:
    adata = make_cells(30)
    adata.obs_names = ["same"] * 30
    adata.write_h5ad(tmp_path / "twice.h5ad")
    embed(tmp_path / "twice.h5ad")
    with pytest.warns(UserWarning, match="names are not unique"):
        assert anndata.read_zarr(output).obs_names.tolist() == ["same"] * 30


def test_mean_and_half_precision(
    embed: Callable[..., np.ndarray], cells_file: Path, small_model: CellPatch, expected: np.ndarray
) -> None:
    rows = embed(cells_file, dtype="float16", pool="mean")
    mean = cp.tl.embed(anndata.read_h5ad(cells_file), small_model, pool="mean", copy=True)
    assert rows.dtype == np.float16
    assert mean is not None
    assert np.array_equal(rows, mean.obsm[KEY].astype(np.float16))


def test_value_beyond_half_precision_is_refused(
    cells_file: Path, small_model: CellPatch, output: Path
) -> None:
    large = CellPatch(small_model.config, small_model.vocabulary)
    with torch.no_grad():
        large.projection.weight.mul_(1e6)
    with pytest.raises(InputError, match=r"beyond what float16 holds: store it as float32"):
        cp.atlas.embed(cells_file, large, output, dtype="float16")
    assert not output.exists()


def test_summary(
    cells_file: Path, model_directory: Path, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cellpatch_fast"):
        summary = cp.atlas.embed(str(cells_file), str(model_directory), str(output))
    assert (summary.cells, summary.computed, summary.empty_cells) == (CELLS, CELLS, 1)
    assert (summary.genes_matched, summary.genes_unknown) == (GENES, 3)
    counts = anndata.read_h5ad(cells_file).X
    assert summary.unknown_entries == counts[:, GENES:].nnz
    assert summary.entries == counts[:, :GENES].nnz
    assert re.fullmatch(
        rf"{re.escape(str(output))}: 211 cells, {summary.entries:,} entries, 307 genes matched, "
        r"3 unknown, 1 empty cells, [\d,]+ cells/s",
        str(summary),
    )
    (line,) = caplog.messages
    assert line.startswith(f"{cells_file}: {GENES} of {GENES + 3} genes matched by the var index")


def test_repeating_a_finished_run_does_nothing(
    cells_file: Path, small_model: CellPatch, output: Path
) -> None:
    first = cp.atlas.embed(cells_file, small_model, output)
    times = {path: path.stat().st_mtime_ns for path in [output, *output.rglob("*")]}
    second = cp.atlas.embed(cells_file, small_model, output)
    assert {path: path.stat().st_mtime_ns for path in [output, *output.rglob("*")]} == times
    assert sorted(path.name for path in output.parent.iterdir()) == [cells_file.name, output.name]
    assert str(second) == f"{output} is complete already: 211 cells, nothing to do"
    assert second.computed == 0
    assert second.unknown_entries == first.unknown_entries > 0
    assert second.empty_cells == 1


@pytest.mark.parametrize("shards", [0, 1, 10])
def test_error_while_writing_surfaces_and_the_run_resumes(
    cells_file: Path, small_model: CellPatch, tmp_path: Path, output: Path, shards: int
) -> None:
    with stopped_after(shards):
        cp.atlas.embed(cells_file, small_model, output)
    assert not output.exists()
    threads = {thread.name.rsplit("_", 1)[0] for thread in threading.enumerate()}
    assert not threads & {"cellpatch-read", "cellpatch-write"}
    summary = cp.atlas.embed(cells_file, small_model, output)
    assert summary.computed == CELLS - 20 * shards
    assert (f"211 cells ({20 * shards} of them earlier)" in str(summary)) == (shards > 0)
    assert summary.empty_cells == 1
    cp.atlas.embed(cells_file, small_model, tmp_path / "uninterrupted.zarr")
    assert tree(output) == tree(tmp_path / "uninterrupted.zarr")
