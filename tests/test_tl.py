"""`tl.embed`: a cell's embedding depends on that cell alone, and AnnData is treated as expected."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

import cellpatch_fast as cp
from cellpatch_fast import CellPatch, InputError

from .conftest import GENES, WIDTH, MakeCells

CELLS = 211
KEY = "X_cellpatch"


@pytest.fixture
def adata(make_cells: MakeCells) -> anndata.AnnData:
    return make_cells(CELLS)


def rows(adata: anndata.AnnData, model: CellPatch | Path, **options: Any) -> np.ndarray:
    embedded = cp.tl.embed(adata, model, copy=True, **options)
    assert embedded is not None
    return embedded.obsm[KEY]


@pytest.fixture
def expected(adata: anndata.AnnData, small_model: CellPatch) -> np.ndarray:
    """By the definition: tokenize, encode, flatten."""
    cells = cp.pp.tokenize(adata, small_model.vocabulary, small_model.config)
    with torch.inference_mode():
        return small_model.encode(cells).flatten(1).numpy()


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000, None])
def test_batches_and_threads_leave_no_trace(
    adata: anndata.AnnData, small_model: CellPatch, expected: np.ndarray, batch_size: int | None
) -> None:
    assert expected.shape == (CELLS, WIDTH)
    assert len(np.unique(expected, axis=0)) == CELLS  # different cells, different embeddings
    found = rows(adata, small_model, batch_size=batch_size)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("pool", ["flatten", "mean"])
def test_parts_and_shuffled_cells_give_the_same_rows(
    adata: anndata.AnnData, small_model: CellPatch, pool: str
) -> None:
    whole = rows(adata, small_model, pool=pool)
    order = np.random.default_rng(1).permutation(CELLS)
    assert np.array_equal(rows(adata[order], small_model, pool=pool, batch_size=7), whole[order])
    parts = [rows(adata[a:b], small_model, pool=pool) for a, b in ((0, 1), (1, 90), (90, CELLS))]
    assert np.array_equal(np.concatenate(parts), whole)


def test_mean_is_the_mean_of_the_patches(
    adata: anndata.AnnData, small_model: CellPatch, expected: np.ndarray
) -> None:
    patches = expected.reshape(CELLS, 64, 10).astype(np.float64)
    error = np.abs(rows(adata, small_model, pool="mean") - patches.mean(1))
    rounding = np.finfo(np.float32).eps / 2  # of each of 64 additions and of the division
    assert (error <= 65 * rounding * np.abs(patches).mean(1)).all()


def test_reference_backend_agrees(
    adata: anndata.AnnData, small_model: CellPatch, expected: np.ndarray
) -> None:
    found = rows(adata, small_model, backend="reference")
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < 1e-5


def test_model_directory_and_object_are_one(
    adata: anndata.AnnData, model_directory: Path, expected: np.ndarray
) -> None:
    assert np.array_equal(rows(adata, model_directory), expected)
    assert np.array_equal(rows(adata, str(model_directory)), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["csc", "dense"])
def test_layouts_give_the_same_rows(
    adata: anndata.AnnData, small_model: CellPatch, expected: np.ndarray, layout: str
) -> None:
    adata.X = adata.X.tocsc() if layout == "csc" else adata.X.toarray()
    assert np.array_equal(rows(adata, small_model), expected)


@pytest.mark.parametrize("options", [{"layer": "other"}, {"use_raw": True}])
def test_layer_and_raw(
    adata: anndata.AnnData, small_model: CellPatch, options: dict[str, Any]
) -> None:
    values = adata.layers["other"] if "layer" in options else adata.raw.X
    chosen = anndata.AnnData(values, obs=adata.obs, var=adata.var)
    found = rows(adata, small_model, **options)
    assert np.array_equal(found, rows(chosen, small_model))
    assert not np.array_equal(found, rows(adata, small_model))


def test_logged_values_are_recognised_and_not_logged_again(
    adata: anndata.AnnData, small_model: CellPatch, expected: np.ndarray
) -> None:
    logged = adata.copy()
    library = np.maximum(logged.X.sum(1, dtype=np.float64), 1)
    logged.X = sparse.csr_matrix(logged.X.multiply(1e4 / library)).log1p().astype(np.float32)
    found = rows(logged, small_model)
    different = (found != expected).any(1)  # values next to where rounding turns
    assert different.mean() < 0.02
    with pytest.raises(InputError, match="raw counts were expected"):
        rows(logged, small_model, input="counts")


def test_what_is_added(
    adata: anndata.AnnData, small_model: CellPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cellpatch_fast"):
        assert cp.tl.embed(adata, small_model, key_added="X_mine", pool="mean") is None
    assert adata.obsm["X_mine"].shape == (CELLS, 10)
    assert set(adata.obsm) == set(adata.uns) == {"X_mine"}
    params = adata.uns["X_mine"]["params"]
    assert len(params.pop("model")) == 64
    assert params.pop("unknown_entries") > 0
    assert params == {
        "layer": "",
        "use_raw": False,
        "gene_column": "",
        "input": "counts",
        "pool": "mean",
        "backend": "numba",
        "device": "cpu",
        "genes_matched": GENES,
        "genes_unknown": 3,
        "genes_duplicated": 0,
        "genes_ambiguous": 0,
        "empty_cells": 1,
    }
    matched, added = caplog.messages
    assert f"{GENES} of {GENES + 3} genes matched" in matched
    assert "integers up to" in matched
    assert added.startswith(f"added obsm['X_mine']: {CELLS} cells x 10 (1 empty cells")


def test_result_can_be_written_and_read(
    adata: anndata.AnnData, small_model: CellPatch, tmp_path: Path
) -> None:
    cp.tl.embed(adata, small_model)
    adata.write_h5ad(tmp_path / "embedded.h5ad")
    back = anndata.read_h5ad(tmp_path / "embedded.h5ad")
    assert np.array_equal(back.obsm[KEY], adata.obsm[KEY])
    assert back.uns[KEY]["params"]["pool"] == "flatten"


def test_copy_leaves_the_object_alone(adata: anndata.AnnData, small_model: CellPatch) -> None:
    before = adata.copy()
    embedded = cp.tl.embed(adata, small_model, copy=True)
    assert isinstance(embedded, anndata.AnnData)
    assert KEY in embedded.obsm
    assert not adata.obsm.keys()
    assert not adata.uns.keys()
    assert (adata.X != before.X).nnz == 0


def test_view_becomes_an_object_of_its_own(
    adata: anndata.AnnData, small_model: CellPatch, expected: np.ndarray
) -> None:
    view = adata[::3]
    cp.tl.embed(view, small_model)
    assert not view.is_view
    assert np.array_equal(view.obsm[KEY], expected[::3])
    assert KEY not in adata.obsm


@pytest.mark.parametrize("copy", [False, True])
def test_backed_object(
    cells_file: Path, small_model: CellPatch, expected: np.ndarray, copy: bool
) -> None:
    backed = anndata.read_h5ad(cells_file, backed="r")
    embedded = cp.tl.embed(backed, small_model, copy=copy)
    result = embedded if copy else backed
    assert np.array_equal(result.obsm[KEY], expected)
    assert backed.isbacked
    assert (KEY in backed.obsm) is not copy
    assert not copy or not result.isbacked
    backed.file.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "spliced"}, "no layer 'spliced'"),
        ({"gene_column": "symbol"}, "symbol"),
        ({"input": "lognorm"}, "log-normalised values were expected"),
        ({"key_added": ""}, "key_added is empty"),
        ({"pool": "max"}, "unknown pooling 'max'"),
        ({"batch_size": 0}, "batch size must be at least 1, found 0"),
        ({"backend": "triton", "device": "cpu"}, "triton backend runs on a CUDA GPU, but"),
        ({"backend": "fast"}, "unknown backend 'fast'"),
        ({"device": "gpu"}, "cannot compute on the device 'gpu'"),
        ({"model": "no/such/model"}, "no model directory no/such/model"),
    ],
)
def test_after_an_error_the_object_is_as_it_was(
    adata: anndata.AnnData,
    small_model: CellPatch,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    if options.get("backend") == "triton":  # as outside of the tests
        monkeypatch.setattr("cellpatch_fast.kernels.gpu.encoder.INTERPRETED", False)
    with pytest.raises(InputError, match=message):
        cp.tl.embed(adata, **{"model": small_model, **options})
    assert not adata.obsm.keys()
    assert not adata.uns.keys()


@pytest.mark.parametrize("tool", [cp.tl.embed, cp.tl.annotate])
@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (
            "cells.h5ad",
            r"adds to an AnnData object, found the path 'cells.h5ad': read it first "
            r"\(anndata.read_h5ad\), or have cellpatch_fast.atlas.{tool} make a store",
        ),
        (Path("cells.h5ad"), "found the path 'cells.h5ad': read it first"),
        (np.zeros((2, 3)), r"found numpy.ndarray: anndata.AnnData\(X, obs, var\) makes one"),
    ],
)
def test_what_is_no_anndata_object(
    small_model: CellPatch, tool: Callable[..., Any], thing: Any, message: str
) -> None:
    name = tool.__name__
    with pytest.raises(InputError, match=f"tl.{name} .*" + message.format(tool=name)):
        tool(thing, small_model)


def test_other_functions_say_so_too(small_model: CellPatch) -> None:
    path = "cells.h5ad"
    calls: list[tuple[Callable[..., Any], dict[str, str]]] = [
        (cp.pl.embedding, {"color": "kind"}),
        (cp.pp.normalize, {}),
        (cp.pp.quality_control, {}),
    ]
    for function, options in calls:
        name = function.__name__
        with pytest.raises(
            InputError, match=rf"{name} \w+ an AnnData object, found the path 'cell"
        ):
            function(path, **options)
    with pytest.raises(InputError, match=r"a path or an AnnData object, found numpy.ndarray"):
        cp.CellLoader(np.zeros((2, 3)), small_model.vocabulary, small_model.config)


@pytest.mark.filterwarnings("ignore:::mudata")
def test_several_modalities_are_refused_and_one_of_them_is_not(
    adata: anndata.AnnData, small_model: CellPatch, expected: np.ndarray
) -> None:
    mudata = pytest.importorskip("mudata")
    several = mudata.MuData({"rna": adata, "atac": adata.copy()})
    with pytest.raises(InputError, match=r"a MuData that holds 'rna', 'atac': .*as in mdata\['rna"):
        cp.tl.embed(several, small_model)
    cp.tl.embed(several["rna"], small_model)
    assert np.array_equal(several["rna"].obsm[KEY], expected)


def test_views_of_an_object_in_a_file_are_copied_or_refused(
    cells_file: Path, small_model: CellPatch, expected: np.ndarray
) -> None:
    backed = anndata.read_h5ad(cells_file, backed="r")
    with pytest.raises(InputError, match=r"a view of .*: pass copy=True, or adata.to_memory\(\)"):
        cp.tl.embed(backed[7:19], small_model)
    assert np.array_equal(rows(backed[7:19], small_model), expected[7:19])
    cp.tl.embed(backed, small_model)
    assert np.array_equal(backed.obsm[KEY], expected)


def test_device_that_the_machine_lacks(adata: anndata.AnnData, small_model: CellPatch) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(InputError, match=f"device '{missing}'.*CUDA devices here; cpu is always"):
        cp.tl.embed(adata, small_model, device=missing)


def test_error_in_the_last_cell_leaves_the_object_as_it_was(
    adata: anndata.AnnData, small_model: CellPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellpatch_fast.loading.inputs.SAMPLE_CELLS", 100)
    adata.X.data[-1] = np.nan
    with pytest.raises(InputError, match=f"cell {CELLS - 1} .*not a finite number"):
        cp.tl.embed(adata, small_model, batch_size=10)
    assert not adata.obsm.keys()


def test_too_little_memory_is_one_error(
    adata: anndata.AnnData, small_model: CellPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object, **__: object) -> torch.Tensor:
        return torch.empty(1 << 50)

    monkeypatch.setattr(small_model, "encode", encode)
    with pytest.raises(MemoryError, match="allocate"):
        cp.tl.embed(adata, small_model)
    assert not adata.obsm.keys()


def test_model_in_training_is_evaluated_and_stays_in_training(
    adata: anndata.AnnData, small_model: CellPatch, expected: np.ndarray
) -> None:
    small_model.train()
    try:
        assert np.array_equal(rows(adata, small_model), expected)
        assert small_model.training
    finally:
        small_model.eval()


def test_model_stays_where_it_is(adata: anndata.AnnData, small_model: CellPatch) -> None:
    weights = small_model.patches
    rows(adata, small_model, device="cpu")
    assert small_model.patches is weights


@pytest.mark.parametrize("show", [True, False, None])
def test_progress_bar_is_shown_on_request(
    adata: anndata.AnnData, small_model: CellPatch, capsys: pytest.CaptureFixture[str], show: bool
) -> None:
    cp.tl.embed(adata, small_model, progress=show)
    bar = capsys.readouterr().err
    assert (f"{CELLS}/{CELLS}" in bar and "cells/s" in bar) if show else not bar
