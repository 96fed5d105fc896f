"""Encodings of older anndata versions, 10x Genomics output and zipped stores."""

from __future__ import annotations

import gzip
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
from scipy import io as scipy_io
from scipy import sparse

from cellpatch_fast.errors import InputError
from cellpatch_fast.io.sources.source import open_source

from ..conftest import CELLS, GENES, RAW_GENES, counts, make_adata, opened
from .test_source import EXPECTED, PLACES, TOO_LITTLE_MEMORY, Store, all_of, assert_same

# --- anndata < 0.7 ---------------------------------------------------------------------------


def write_old(folder: Path, container: str, layout: str) -> Path:
    """As anndata 0.6 wrote: no encoding metadata, tables as compound arrays, raw beside X."""
    path = folder / f"old.{container}"
    root: Any
    root = h5py.File(path, "w") if container == "h5ad" else zarr.open_group(path, zarr_format=2)
    create = root.create_dataset if container == "h5ad" else root.create_array
    for key, matrix in {"X": EXPECTED["X"], "raw.X": EXPECTED["raw"]}.items():
        compressed = matrix if layout == "csr" else matrix.tocsc()
        group = root.create_group(key)
        group.attrs["h5sparse_format"] = layout
        group.attrs["h5sparse_shape"] = list(matrix.shape)
        for part in ("indptr", "indices", "data"):
            create(f"{key}/{part}", data=getattr(compressed, part))
    obs = [(f"cell{c}".encode(), c % 2, c) for c in range(CELLS)]
    create("obs", data=np.array(obs, [("index", "S9"), ("kind", "i1"), ("depth", "i8")]))
    for key, genes in {"var": GENES, "raw.var": RAW_GENES}.items():
        var = [(f"ENSG{g}".encode(), f"S{g}".encode()) for g in range(genes)]
        create(key, data=np.array(var, [("index", "S15"), ("symbol", "S9")]))
    create("uns/kind_categories", data=np.array([b"a", b"b"]))
    if container == "h5ad":
        root.close()
    return path


@pytest.mark.parametrize("place", ["X", "raw"])
@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("container", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
def test_anndata_before_0_7(tmp_path: Path, container: str, layout: str, place: str) -> None:
    path = write_old(tmp_path, container, layout)
    with open_source(path, **PLACES[place], memory_limit=TOO_LITTLE_MEMORY) as source:
        assert_same(all_of(source, max_entries=89), EXPECTED[place])
        assert source.describe()["raw"]
        obs, var = source.read_obs(), source.var
    assert list(obs.index[:2]) == ["cell0", "cell1"]
    assert list(obs["kind"][:3]) == ["a", "b", "a"]
    assert obs["kind"].dtype == "category"
    assert list(obs["depth"]) == list(range(CELLS))
    assert list(var.index[:2]) == ["ENSG0", "ENSG1"]
    if container == "h5ad":
        adata = anndata.read_h5ad(path)
        expected = adata.raw.var if place == "raw" else adata.var
        pd.testing.assert_frame_equal(obs, adata.obs)
        pd.testing.assert_frame_equal(var, expected)


def test_categories_of_anndata_0_7(stored: Store) -> None:
    """Codes with a reference to their categories in a group beside them."""
    path = stored("h5ad")
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        codes, categories = obs["kind/codes"][...], obs["kind/categories"][...]
        del obs["kind"]
        obs["kind"] = codes
        obs["__categories/kind"] = categories
        obs["kind"].attrs["categories"] = obs["__categories/kind"].ref
        obs.attrs["encoding-version"] = "0.1.0"
    with open_source(path) as source:
        pd.testing.assert_series_equal(source.read_obs()["kind"], make_adata().obs["kind"])


def test_index_that_is_a_categorical(tmp_path: Path, stored: Store) -> None:
    for container in ("h5ad", "zarr-v3"):
        path = stored(container)
        with opened(path) as root:
            del root["var/_index"]
            anndata.io.write_elem(root["var"], "_index", pd.Categorical(make_adata().var_names))
        if path.is_dir():
            zarr.consolidate_metadata(path)
        with open_source(path) as source:
            assert list(source.var.index) == list(make_adata().var_names)


# --- zipped stores ---------------------------------------------------------------------------


def test_zip_of_the_folder_itself(stored: Store, tmp_path: Path) -> None:
    """What a file manager's "compress" makes: the folder lies inside the zip file."""
    path = stored("zarr-v3")
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path, path.name)
    with open_source(archive) as source:
        assert_same(all_of(source), EXPECTED["X"])


# --- 10x Genomics ----------------------------------------------------------------------------

PROTEINS = 7
KINDS = ["Gene Expression"] * (GENES - PROTEINS) + ["Antibody Capture"] * PROTEINS
IDS = [f"ENSG{g:011}" for g in range(GENES)]
SYMBOLS = ["TWICE", "TWICE", *(f"S{g}" for g in range(2, GENES))]
BARCODES = [f"{c:08}-1" for c in range(CELLS)]


def write_10x_hdf5(folder: Path, kinds: list[str]) -> Path:
    path = folder / "filtered_feature_bc_matrix.h5"
    matrix = counts(GENES, 1).astype(np.int32)  # genes by cells as CSC is cells by genes as CSR
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(BARCODES, "S")
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(matrix, part)
        group["shape"] = [GENES, CELLS]
        features = {"id": IDS, "name": SYMBOLS, "feature_type": kinds, "genome": ["hg"] * GENES}
        for key, values in features.items():
            group[f"features/{key}"] = np.array(values, "S")
    return path


def write_10x_mtx(folder: Path, kinds: list[str], prefix: str = "") -> Path:
    rows = zip(IDS, SYMBOLS, kinds, strict=True)
    features = "".join("\t".join(row) + "\n" for row in rows)
    texts = {"features.tsv.gz": features, "barcodes.tsv.gz": "\n".join(BARCODES) + "\n"}
    for name, text in texts.items():
        (folder / f"{prefix}{name}").write_bytes(gzip.compress(text.encode()))
    with gzip.open(folder / f"{prefix}matrix.mtx.gz", "wb") as file:
        scipy_io.mmwrite(file, counts(GENES, 1).T.tocoo(), field="integer")
    return folder


@pytest.mark.parametrize("form", ["hdf5", "folder", "file", "file with a prefix"])
def test_10x(tmp_path: Path, form: str) -> None:
    genes_only = ["Gene Expression"] * GENES
    if form == "hdf5":
        path = write_10x_hdf5(tmp_path, genes_only)
    else:
        prefix = "GSM1_" if "prefix" in form else ""
        path = write_10x_mtx(tmp_path, genes_only, prefix)
        path = path / f"{prefix}matrix.mtx.gz" if "file" in form else path
    with open_source(path) as source:
        matrix = all_of(source, max_entries=89)
        assert_same(matrix.astype(np.float32), EXPECTED["X"])
        assert list(source.read_obs().index) == BARCODES
        names = source.var["gene_ids"] if form == "hdf5" else source.var.index
        assert list(names) == IDS
        assert source.describe()["format"] == ("10x HDF5" if form == "hdf5" else "10x MTX")
        assert source.name == str(path)
        before = source.fingerprint()
    with open_source(path) as source:
        assert source.fingerprint() == before


@pytest.mark.parametrize("write", [write_10x_hdf5, write_10x_mtx])
def test_10x_features_that_are_no_genes_are_counted(
    tmp_path: Path, write: Callable[[Path, list[str]], Path]
) -> None:
    path = write(tmp_path, KINDS)
    with pytest.warns(UserWarning, match=f"left out: {PROTEINS} Antibody Capture"):
        source = open_source(path)
    expected = sparse.csr_matrix(EXPECTED["X"][:, :-PROTEINS])
    assert_same(all_of(source).astype(np.float32), expected)


def test_10x_has_no_layers(tmp_path: Path) -> None:
    path = write_10x_hdf5(tmp_path, KINDS)
    with pytest.raises(InputError, match=r"no layer 'spliced'. Its layers: none"):
        open_source(path, layer="spliced")


def test_incomplete_10x_folder(tmp_path: Path) -> None:
    path = write_10x_mtx(tmp_path, KINDS)
    (path / "features.tsv.gz").unlink()
    with pytest.raises(InputError, match=r"must hold matrix.mtx, features.tsv"):
        open_source(path)


def test_mtx_without_names(tmp_path: Path) -> None:
    path = tmp_path / "counts.mtx"
    scipy_io.mmwrite(path, counts(GENES, 1))
    with pytest.raises(InputError, match=r"put features.tsv and barcodes.tsv beside it"):
        open_source(path)
