"""Warnings point at the line that led here, not at one of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import pytest

from cellpatch_fast import CellPatch, atlas, pp, tl
from cellpatch_fast.errors import InputWarning, warn
from cellpatch_fast.loading import CellLoader

from .conftest import MakeCells


@pytest.fixture
def few_known(make_cells: MakeCells) -> anndata.AnnData:
    """Most genes have names that nobody knows."""
    adata = make_cells(29)
    adata.var_names = [*adata.var_names[:100], *(f"nobody{i}" for i in range(adata.n_vars - 100))]
    return adata


CALLS: dict[str, Callable[[anndata.AnnData, CellPatch, Path], object]] = {
    "tl.embed": lambda adata, model, path: tl.embed(adata, model),
    "pp.tokenize": lambda adata, model, path: pp.tokenize(adata, model.vocabulary, model.config),
    "CellLoader": lambda adata, model, path: CellLoader(adata, model.vocabulary, model.config),
    "atlas.embed": lambda adata, model, path: atlas.embed(path, model, path.parent / "e.zarr"),
    "match_var": lambda adata, model, path: model.vocabulary.match_var(adata.var),
    "unequal ranks": lambda adata, model, path: CellLoader(
        adata, model.vocabulary, model.config, batch_size=5, world_size=2
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_warnings_point_here(
    few_known: anndata.AnnData, small_model: CellPatch, tmp_path: Path, call: str
) -> None:
    path = tmp_path / "cells.h5ad"
    few_known.write_h5ad(path)
    with pytest.warns(InputWarning) as caught:
        CALLS[call](few_known, small_model, path)
    assert {Path(one.filename).name for one in caught} == {Path(__file__).name}


def test_whoever_warns_outside_of_the_package_is_pointed_at() -> None:
    with pytest.warns(InputWarning, match="by hand") as caught:
        warn("by hand")
    line = caught[0].lineno
    assert 'warn("by hand")' in Path(__file__).read_text().splitlines()[line - 1]
