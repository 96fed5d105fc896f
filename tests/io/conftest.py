"""A small AnnData object and every way to store it."""

from __future__ import annotations

import contextlib
import functools
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import write_elem
from scipy import sparse

CELLS, GENES, RAW_GENES = 103, 61, 67
CHUNK, SHARD = 97, 291  # entries; small and odd, so that cells and chunks never line up
CONTAINERS = ("h5ad", "h5ad-gzip", "zarr-v2", "zarr-v3", "zarr-v3-sharded", "zarr-zip")


def counts(genes: int, seed: int) -> sparse.csr_matrix:
    """A matrix with an empty first cell, an empty last one and one that expresses all genes."""
    random = np.random.default_rng(seed)
    dense = random.poisson(0.4, (CELLS, genes)).astype(np.float32)
    dense[[0, 41, 42, -1]] = 0
    dense[29] = 1 + np.arange(genes)
    return sparse.csr_matrix(dense)


def make_adata(layout: str = "csr", dtype: str = "float32") -> anndata.AnnData:
    """X, a layer "counts" and raw, all different, in the same layout and dtype."""
    matrices = [counts(GENES, 1), counts(GENES, 2), counts(RAW_GENES, 3)]
    x, layer, raw = (in_layout(matrix, layout).astype(dtype) for matrix in matrices)
    obs = pd.DataFrame(
        {"kind": pd.Categorical(["a", "b"] * 51 + ["a"]), "depth": np.arange(CELLS)},
        index=[f"cell{c}" for c in range(CELLS)],
    )
    var = pd.DataFrame({"symbol": [f"S{g}" for g in range(GENES)]})
    var.index = pd.Index([f"ENSG{g:011}" for g in range(GENES)])
    adata = anndata.AnnData(x, obs=obs, var=var, layers={"counts": layer})
    raw_var = pd.DataFrame({"n": range(RAW_GENES)}, index=[f"R{g}" for g in range(RAW_GENES)])
    adata.raw = anndata.AnnData(raw, obs=obs, var=raw_var)
    return adata


def in_layout(matrix: sparse.csr_matrix, layout: str) -> Any:
    return {"csr": matrix.tocsr, "csc": matrix.tocsc, "dense": matrix.toarray}[layout]()


def write(adata: anndata.AnnData, folder: Path, container: str) -> Path:
    """Store ``adata`` in ``folder``, in small chunks wherever the container has chunks."""
    if container.startswith("h5ad"):
        path = folder / "cells.h5ad"
        adata.write_h5ad(path)
        if container == "h5ad-gzip":
            with h5py.File(path, "r+") as file:
                rechunk(file, lambda shape: {"compression": "gzip", "chunks": chunked(shape)})
        return path
    path = folder / "cells.zarr"
    root = zarr.open_group(path, mode="w", zarr_format=2 if container == "zarr-v2" else 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        write_elem(root, "/", adata)
    sharded = container == "zarr-v3-sharded"
    rechunk(root, lambda shape: {"chunks": chunked(shape)} | shards(shape, sharded))
    if container == "zarr-zip":
        return Path(shutil.make_archive(str(path), "zip", path))
    return path


def chunked(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (CHUNK,) if len(shape) == 1 else (19, 23)


def shards(shape: tuple[int, ...], sharded: bool) -> dict[str, tuple[int, ...]]:
    return {"shards": (SHARD,) if len(shape) == 1 else (57, 23)} if sharded else {}


def rechunk(root: Any, settings: Callable[[tuple[int, ...]], dict[str, Any]]) -> None:
    """Write the arrays of every matrix of ``root`` anew, with other ``settings``."""
    for key in ("X", "layers/counts", "raw/X"):
        dense = hasattr(root[key], "shape")
        for array_key in [key] if dense else [f"{key}/{part}" for part in ("indices", "data")]:
            values, attributes = root[array_key][...], dict(root[array_key].attrs)
            del root[array_key]
            create = root.create_dataset if isinstance(root, h5py.Group) else root.create_array
            array = create(array_key, data=values, **settings(values.shape))
            array.attrs.update(attributes)


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """What `write` makes of `make_adata`'s objects, each written once; not to be changed."""

    @functools.cache
    def template(container: str, layout: str, dtype: str) -> Path:
        return write(make_adata(layout, dtype), tmp_path_factory.mktemp("template"), container)

    return template


@pytest.fixture
def stored(templates: Callable[[str, str, str], Path], tmp_path: Path) -> Callable[..., Path]:
    """``stored(container, layout="csr", dtype="float32")``: a copy of a template."""

    def store(container: str, layout: str = "csr", dtype: str = "float32") -> Path:
        template = templates(container, layout, dtype)
        path = tmp_path / template.name
        if template.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(template, path)
        else:
            shutil.copyfile(template, path)
        return path

    return store


def write_plain(adata: anndata.AnnData, folder: Path, container: str) -> Path:
    """Store ``adata`` as anndata does by default."""
    path = folder / f"plain.{container}"
    if container == "h5ad":
        adata.write_h5ad(path)
    else:
        with anndata.settings.override(zarr_write_format=int(container.removeprefix("zarr-v"))):
            adata.write_zarr(path)
    return path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The root group of a stored object, for changing it."""
    if path.is_dir():
        yield zarr.open_group(path, mode="r+", use_consolidated=False)
    else:
        with h5py.File(path, "r+") as file:
            yield file


def replace(path: Path, key: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write the array ``key`` anew as ``change(its values)``, in one chunk."""
    with opened(path) as root:
        values, attributes = change(root[key][...]), dict(root[key].attrs)
        del root[key]
        create = root.create_dataset if isinstance(root, h5py.Group) else root.create_array
        create(key, data=values).attrs.update(attributes)
    if path.is_dir():
        zarr.consolidate_metadata(path)
