"""The matrix of a `Container` as a `Matrix`: found out about, and checked, without reading it.

Only ``indptr`` is read here, since every check and every block needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import InputError, warn
from ..chunks import read_whole
from ..interfaces import COPY_AGAIN, StoredArray, reading
from .containers import SPARSE_PARTS, Container, refuse_absent, text
from .matrices import CsrMatrix, DenseMatrix, Matrix, check_dtype, check_offsets
from .transpose import CscMatrix

LAYOUTS = {"csr_matrix": "CSR", "csr": "CSR", "csc_matrix": "CSC", "csc": "CSC"}


def stored_matrix(container: Container, key: str, memory_limit: int) -> Matrix:
    """The matrix at ``key``: CSR, CSC (also h5sparse's, anndata < 0.7) or dense.

    Raises
    ------
    InputError
        If it is something else, or parts of it are missing or do not fit together.
    """
    element = container.element(key)
    name = f"{container.name} ({key})"
    if hasattr(element, "shape"):
        return _dense(container, element, key, name)
    with reading(name, "its encoding"):
        attributes = dict(element.attrs)
    encoding = text(attributes.get("encoding-type", attributes.get("h5sparse_format")))
    if encoding not in LAYOUTS:
        raise InputError(f"{name} is stored as {encoding!r}. Expected a CSR, CSC or dense matrix.")
    with reading(name, "its shape"):
        cells, genes = map(int, attributes["shape" if "shape" in attributes else "h5sparse_shape"])
    by_cells = LAYOUTS[encoding] == "CSR"
    indptr, indices, data = _sparse_parts(container, key, name, cells if by_cells else genes)
    if by_cells:
        return CsrMatrix(name, (cells, genes), indptr, indices, data)
    return CscMatrix(name, (cells, genes), indptr, indices, data, memory_limit)


def _sparse_parts(
    container: Container, key: str, name: str, owners: int
) -> tuple[np.ndarray, StoredArray, StoredArray]:
    """indptr (int64 [owners + 1]), indices and data, checked against one another."""
    arrays, absent = {}, {}
    for part in SPARSE_PARTS:
        arrays[part], absent[part] = _array_and_gaps(container, f"{key}/{part}")
        if len(arrays[part].shape) != 1:
            raise InputError(f"{name}: {part} has shape {arrays[part].shape}. {COPY_AGAIN}.")
    indptr, indices, data = arrays.values()
    check_dtype(data.dtype, name)
    for part in ("indptr", "indices"):
        if arrays[part].dtype.kind not in "iu":
            raise InputError(f"{name}: {part} has dtype {arrays[part].dtype}. {COPY_AGAIN}.")
    if data.shape[0]:  # else the offsets are all zero and need not be stored
        refuse_absent(absent["indptr"], "indptr", name)
    refuse_absent(absent["data"], "data", name)
    with reading(name, "indptr"):
        offsets = read_whole(indptr).astype(np.int64, copy=False)
    check_offsets(offsets, owners, indices.shape[0], data.shape[0], name)
    gaps = [gap for gap in absent["indices"] if not _may_be_zeros(offsets, *gap[1:])]
    refuse_absent(gaps, "indices", name)
    return offsets, indices, data


def _array_and_gaps(
    container: Container, key: str
) -> tuple[StoredArray, list[tuple[str, int, int]]]:
    """An array, and the key, first row and end of each chunk that is not stored.

    Whoever asks decides whether those may be zeros; if not, the array is not to be read.
    """
    stored = container.element(key)
    absent = container.absent_chunks(stored, thorough=False) if hasattr(stored, "shape") else []
    return container.array(stored, key, {chunk for chunk, _, _ in absent}), absent


def _may_be_zeros(offsets: np.ndarray, first: int, last: int) -> bool:
    """Whether the indices ``first : last`` can all be 0, which Zarr writers may leave out.

    A row has an index once at most, so this takes as many rows as there are entries.
    """
    if last - first >= len(offsets):
        return False
    owners = np.searchsorted(offsets, np.arange(first, last), side="right")
    return bool((np.diff(owners) > 0).all())


def _dense(container: Container, element: Any, key: str, name: str) -> DenseMatrix:
    if not element.shape or len(element.shape) != 2:
        raise InputError(
            f"{name} has shape {element.shape}. Expected two dimensions: cells, genes."
        )
    array, absent = _array_and_gaps(container, key)
    check_dtype(array.dtype, name)
    if absent:
        # a writer may leave out chunks of zeros, so this need not be damage
        warn(
            f"{name}: {len(absent)} chunks (the first is {absent[0][0]!r}) are not stored, so "
            f"they are read as zeros. If that is not meant, copy the store again."
        )
    return DenseMatrix(name, element.shape, array)
