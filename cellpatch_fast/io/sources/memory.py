"""The matrix of an AnnData object: in memory, or backed by a file.

What is in memory is handed on as views; what is backed is read like the file that it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from ...genes.names import first_names
from . import containers
from .matrices import CsrMatrix, DenseMatrix, Matrix, check_dtype, check_offsets
from .stored import stored_matrix
from .transpose import CscMatrix

if TYPE_CHECKING:
    from anndata import AnnData


def require_anndata(value: object, expected: str) -> None:
    """Raise `InputError`, which begins with what is ``expected``, for what is no AnnData object."""
    from anndata import AnnData

    if isinstance(value, AnnData):
        return
    if isinstance(value, str | Path):
        reason = f"the path {str(value)!r}: read it first (anndata.read_h5ad)"
    elif isinstance(modalities := getattr(value, "mod", None), Mapping):  # MuData
        reason = (
            f"a {type(value).__name__} that holds {first_names(list(modalities)) or 'none'}: pass "
            "the one with genes, as in mdata['rna']"
        )
    else:
        reason = (
            f"{type(value).__module__}.{type(value).__qualname__}: anndata.AnnData(X, obs, var) "
            "makes one of cells x genes"
        )
    raise InputError(f"{expected}, found {reason}")


def matrix_of(
    values: Any, name: str, memory_limit: int
) -> tuple[Matrix, Callable[[], str], Callable[[], None]]:
    """``values`` (X, a layer or raw.X of an AnnData object) as a `Matrix`, its identity, and what
    gives back the files that reading it opens.

    Raises
    ------
    InputError
        If it is neither a scipy CSR or CSC matrix, nor a NumPy array, nor backed by a file.
    """
    from anndata.abc import CSCDataset, CSRDataset
    from scipy import sparse

    if isinstance(values, CSRDataset | CSCDataset):
        return _backed(values.group, memory_limit)
    if _is_hdf5(values):
        return _backed(values, memory_limit)
    matrix: Matrix
    if sparse.issparse(values) and values.format in ("csr", "csc"):
        indptr = values.indptr.astype(np.int64, copy=False)
        owners = values.shape[0] if values.format == "csr" else values.shape[1]
        check_offsets(indptr, owners, len(values.indices), len(values.data), name)
        indices, data = values.indices, values.data
        if values.format == "csr":
            matrix = CsrMatrix(name, values.shape, indptr, indices, data)
        else:
            matrix = CscMatrix(name, values.shape, indptr, indices, data, memory_limit)
        parts = [indptr, indices, data]
    elif isinstance(values, np.ndarray) and values.ndim == 2:
        parts = [np.asarray(values)]
        matrix = DenseMatrix(name, values.shape, parts[0])
    else:
        raise InputError(
            f"{name} is a {type(values).__module__}.{type(values).__qualname__}. Expected a "
            f"scipy CSR or CSC matrix or a two-dimensional NumPy array; AnnData's to_memory() "
            f"gives one, and a file can be passed by its path."
        )
    check_dtype(matrix.dtype, name)
    return matrix, lambda: _digest(parts), lambda: None


def names_identity(adata: AnnData) -> str:
    """Changes when the names of cells or genes do."""
    from pandas.util import hash_pandas_object

    names = (hash_pandas_object(names).to_numpy() for names in (adata.obs_names, adata.var_names))
    return _digest(list(names))


def _digest(arrays: list[np.ndarray]) -> str:
    digest = hashlib.blake2b()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _is_hdf5(values: Any) -> bool:
    import h5py

    return isinstance(values, h5py.Dataset)


def _backed(stored: Any, memory_limit: int) -> tuple[Matrix, Callable[[], str], Callable[[], None]]:
    """The matrix in ``stored``, a group or array of an open file that stays its owner's."""
    if type(stored).__module__.startswith("zarr."):
        import zarr

        path = Path(str(getattr(stored.store, "root", "")))
        if not path.is_dir() or not path.is_absolute():
            raise InputError(
                f"the AnnData object is backed by the Zarr store {stored.store}, which is not a "
                f"local folder. Call its to_memory() first."
            )
        root, key = zarr.open_group(stored.store, mode="r"), stored.path
        file_format = f"Zarr v{stored.metadata.zarr_format}"
    else:
        root, key, path = stored.file, stored.name.strip("/"), Path(stored.file.filename)
        file_format = "h5ad"
    container = containers.Container(root, str(path), path, file_format, lambda: None)
    matrix = stored_matrix(container, key, memory_limit)
    return matrix, lambda: container.identity(key), container.close
