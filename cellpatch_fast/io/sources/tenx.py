"""10x Genomics output (.h5, or a folder with matrix.mtx) as AnnData, through scanpy.

Such files hold one sample, so they are read into memory. Features that are not genes
(antibodies, CRISPR guides) are left out, with a warning that counts them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ...errors import InputError, warn
from ..interfaces import reading

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData

MATRIX_NAMES = ("matrix.mtx", "matrix.mtx.gz")
GENES = "Gene Expression"


def is_mtx(path: Path) -> bool:
    """Whether ``path`` is an .mtx file or a folder with one."""
    if path.is_dir():
        return any((path / name).is_file() for name in MATRIX_NAMES)
    return path.name.endswith((".mtx", ".mtx.gz"))


def is_10x_hdf5(root: h5py.Group) -> bool:
    """Whether an HDF5 file has 10x's group ``matrix`` (or, before version 3, one per genome)."""
    return any("barcodes" in group for group in root.values() if hasattr(group, "keys"))


def files(path: Path) -> list[Path]:
    """The files that are read: ``path``, or those of its folder that belong to the matrix."""
    if path.name.endswith((".mtx", ".mtx.gz")):
        prefix = path.name.split("matrix.mtx")[0]
        return sorted(file for file in path.parent.glob(f"{prefix}*") if file.is_file())
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def read_10x_hdf5(path: Path) -> AnnData:
    """The genes of a 10x .h5 file."""
    scanpy = _scanpy(path)
    with reading(str(path), "it as 10x HDF5"), _without_name_warnings():
        adata = scanpy.read_10x_h5(path, gex_only=False)
    return _genes_only(adata, path)


def read_10x_mtx(path: Path) -> AnnData:
    """The genes of a folder with matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv.

    ``path`` is the folder or the matrix in it; a prefix that all three names share is kept.
    """
    scanpy = _scanpy(path)
    folder, prefix = path, ""
    if not path.is_dir():
        folder, prefix = path.parent, path.name.split("matrix.mtx")[0]
        if prefix == path.name:
            raise InputError(
                f"{path}: its genes and cells have no names. Name the file matrix.mtx and put "
                f"features.tsv and barcodes.tsv beside it, as 10x Genomics does."
            )
    advice = "The folder must hold matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv"
    with reading(str(path), "it as 10x MTX", advice), _without_name_warnings():
        adata = scanpy.read_10x_mtx(folder, var_names="gene_ids", prefix=prefix, gex_only=False)
    return _genes_only(adata, path)


def _genes_only(adata: AnnData, path: Path) -> AnnData:
    kinds = adata.var.get("feature_types")
    if kinds is None or (kinds == GENES).all():
        return adata
    others = ", ".join(f"{n} {kind}" for kind, n in kinds[kinds != GENES].value_counts().items())
    warn(f"{path}: features that are not genes are left out: {others}")
    with _without_name_warnings():
        return adata[:, (kinds == GENES).to_numpy()].copy()


def _without_name_warnings() -> warnings.catch_warnings:
    """Genes are matched by name here, repeated names are reported there."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _scanpy(path: Path) -> ModuleType:
    try:
        import scanpy
    except ImportError as error:
        raise InputError(
            f"{path}: reading 10x files needs scanpy: pip install 'cellpatch-fast[analysis]', or "
            f"convert the file to .h5ad."
        ) from error
    return scanpy
