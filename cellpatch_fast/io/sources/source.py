"""AnnData sources: whatever holds cells x genes, as a stream of cells in file order.

`open_source` takes a path (.h5ad; AnnData .zarr, version 2 or 3, also zipped; 10x .h5 or .mtx),
the address of a .zarr store, or an AnnData object, and gives a `CellSource`, whose
`CellSource.read_cells` gives the cells of the chosen matrix (X, a layer or raw) as CSR blocks. A
file of any size takes bounded memory: 8 bytes per cell for ``indptr``, one block, and what
decoding needs. obs and var are read whole.

    with open_source("atlas.h5ad", layer="counts") as source:
        for block in source.read_cells([(0, 500), (90_000, 90_500)]):
            ...

What a file is gets decided by its content, not by its name.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...cells import CellBlock
from ...config import Reading
from ...errors import InputError
from ..interfaces import COPY_AGAIN, is_address
from . import containers, memory, tenx
from .identity import files_digest
from .matrices import MAX_ENTRIES, CsrMatrix, DenseMatrix, Matrix, read_blocks
from .stored import stored_matrix
from .tables import FrameTable, StoredTable, Table
from .transpose import MEMORY_LIMIT, CscMatrix

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = ["CellBlock", "CellSource", "open_source"]


class CellSource:
    """Cells to read, in file order. Made by `open_source`; a context manager.

    Use it from one thread at a time.

    Attributes
    ----------
    name
        The path as given, or "AnnData object".
    n_cells, n_genes
        Shape of the chosen matrix.
    var
        Annotation of its genes (raw's if ``use_raw``); the index holds their names.
    """

    def __init__(
        self,
        name: str,
        file_format: str,
        element: str,
        matrix: Matrix,
        var: pd.DataFrame,
        read_obs: Callable[[], pd.DataFrame],
        contents: dict[str, Any],
        identity: Callable[[], str],
        close: Callable[[], None] = lambda: None,
        obs_table: Callable[[], Table] | None = None,
    ) -> None:
        self.name = name
        self.var = var
        self.n_cells, self.n_genes = matrix.shape
        self._format, self._element, self._matrix = file_format, element, matrix
        self._read_obs, self._contents, self._identity = read_obs, contents, identity
        self._close = close
        self._obs_table = obs_table
        self._closed = False
        for count, noun in ((self.n_cells, "cells"), (self.n_genes, "genes")):
            if not count:
                raise InputError(
                    f"{name}: {element} holds 0 {noun} (its shape is {self.n_cells} x "
                    f"{self.n_genes}). Check the step that wrote it."
                )
        if len(var) != self.n_genes:
            raise InputError(
                f"{name}: {element} has {self.n_genes} columns, but var describes {len(var)} "
                f"genes. {COPY_AGAIN}."
            )

    @property
    def matrix(self) -> Matrix:
        """The chosen matrix."""
        if self._closed:
            raise ValueError(f"{self.name}: the source is closed")
        return self._matrix

    def read_cells(
        self,
        ranges: Iterable[tuple[int, int]] | None = None,
        *,
        max_entries: int = MAX_ENTRIES,
        whole: bool = True,
    ) -> Iterator[CellBlock]:
        """Cells in file order, each range in blocks of its own.

        They are read as the loader reads them, chunk by chunk: few ranges of a large file cost
        little, and a chunk that two ranges meet in is decoded once.

        Parameters
        ----------
        ranges
            Positions ``(start, stop)`` of the first cell and after the last; all cells by default.
        max_entries
            A block has at most so many stored entries, unless a single cell has more. A dense
            matrix stores one for every gene.
        whole
            Whether a range with more entries goes on in further blocks, or ends with its first.

        Raises
        ------
        InputError
            If the file is damaged; the message names the place and the cells.
        ValueError
            If a range or the limit makes no sense, or the source is closed.
        """
        ranges = [(0, self.n_cells)] if ranges is None else list(ranges)
        matrix = self.matrix
        for start, stop in ranges:
            if not 0 <= start <= stop <= self.n_cells:
                raise ValueError(f"cells {start}:{stop} are not within 0:{self.n_cells}")
        if max_entries < 1:
            raise ValueError("max_entries must be at least 1 for cells to be read")
        return read_blocks(matrix, ranges, max_entries, whole)

    def read_obs(self) -> pd.DataFrame:
        """Annotation of the cells, one row each, in file order."""
        obs = self._read_obs()
        if len(obs) != self.n_cells:
            raise InputError(
                f"{self.name}: {self._element} has {self.n_cells} rows, but obs describes "
                f"{len(obs)} cells. {COPY_AGAIN}."
            )
        return obs

    def obs_table(self) -> Table:
        """The same, read by columns and ranges: for files whose obs takes gigabytes."""
        return FrameTable(self.read_obs()) if self._obs_table is None else self._obs_table()

    def fingerprint(self) -> str:
        """A string that changes when the input does; `identity` says what is read for it."""
        facts = (self._identity(), self._element, self._matrix.shape, self._matrix.entries)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the source holds, for people: format, matrix, shape, dtype, layers, columns."""
        layouts = {CsrMatrix: "CSR", DenseMatrix: "dense"}
        facts = {
            "name": self.name,
            "format": self._format,
            "matrix": self._element,
            "layout": layouts.get(type(self._matrix), "CSC"),
            "dtype": str(self._matrix.dtype),
            "cells": self.n_cells,
            "genes": self.n_genes,
            "entries": self._matrix.entries,
        }
        return facts | self._contents | {"var_columns": list(self.var.columns)}

    def close(self) -> None:
        """Close the file (an AnnData object's own file stays open)."""
        self._closed = True
        if isinstance(self._matrix, CscMatrix):
            self._matrix.close()
        self._close()

    def __enter__(self) -> CellSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_source(
    data: str | Path | AnnData,
    *,
    layer: str | None = None,
    use_raw: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> CellSource:
    """Open cells for reading in file order.

    Parameters
    ----------
    data
        Path of an .h5ad file, an AnnData .zarr folder (or zip of one), 10x Genomics output
        (.h5, .mtx or its folder); address of an AnnData .zarr store (https://, s3://, gs://;
        needs the extra ``cloud``); or an AnnData object, also a backed one.
    layer, use_raw
        Which matrix: a layer, or ``raw.X``; X by default.
    memory_limit
        Bytes for reordering a matrix that is stored by genes (CSC); a larger one is reordered
        through temporary files.

    Raises
    ------
    InputError
        If there is no such file, matrix or cell, or it cannot be read.
    """
    reading = Reading(layer=layer, use_raw=use_raw)
    if not isinstance(data, str | Path):
        return _memory_source(data, reading, memory_limit)
    if is_address(data):
        container = containers.open_zarr(str(data))
    else:
        path = Path(data).expanduser()
        if not path.exists():
            raise InputError(f"{data}: no such file or folder. Check the path.")
        if tenx.is_mtx(path):
            return _tenx_source(path, "10x MTX", tenx.read_10x_mtx, reading)
        container = _open_container(path)
    try:
        if "obs" in container and "var" in container:
            return _container_source(container, reading, memory_limit)
        is_10x = container.file_format == "h5ad" and tenx.is_10x_hdf5(container.root)
    except BaseException:
        container.close()
        raise
    container.close()
    if is_10x:
        return _tenx_source(path, "10x HDF5", tenx.read_10x_hdf5, reading)
    raise InputError(f"{container.name} holds no obs and var. {containers.NOT_ANNDATA}.")


def _open_container(path: Path) -> containers.Container:
    import h5py

    if not os.access(path, os.R_OK):
        raise InputError(
            f"{path}: no permission to read it. Ask its owner, or use another account."
        )
    if path.is_dir():
        if any((path / key).exists() for key in ("zarr.json", ".zgroup")):
            return containers.open_zarr(path)
        raise InputError(f"{path} is a folder, but no Zarr store. {containers.NOT_ANNDATA}.")
    if h5py.is_hdf5(path):
        return containers.open_hdf5(path)
    if zipfile.is_zipfile(path):
        return containers.open_zarr(path)
    content = "is neither HDF5 nor zipped Zarr" if path.stat().st_size else "is empty (0 bytes)"
    raise InputError(f"{path} {content}. {containers.NOT_ANNDATA}; copy or download it again.")


def _container_source(
    container: containers.Container, reading: Reading, memory_limit: int
) -> CellSource:
    if "mod" in container and "X" not in container:  # MuData, of which each is an AnnData
        names = sorted(container.element("mod"))
        raise InputError(
            f"{container.name} is a MuData file, which holds {', '.join(names) or 'nothing'}. "
            "Write the one with genes to a file of its own: "
            "mudata.read(FILE)['rna'].write_h5ad('rna.h5ad')."
        )
    layers = containers.layer_names(container)
    raw = containers.raw_prefix(container)
    element = _chosen(container.name, reading, layers, "X" in container, raw is not None)
    key = f"{raw}X" if reading.use_raw else element
    matrix = stored_matrix(container, key, memory_limit)
    cells = containers.table_length(container, "obs")
    by_columns = StoredTable.can_read(container, "obs")
    containers.table_length(container, "var")
    if cells != matrix.shape[0]:
        raise InputError(
            f"{container.name}: {key} has {matrix.shape[0]} rows, but obs describes {cells} "
            f"cells. {COPY_AGAIN}."
        )
    return CellSource(
        name=container.name,
        file_format=container.file_format,
        element=element,
        matrix=matrix,
        var=containers.read_table(container, f"{raw}var" if reading.use_raw else "var"),
        read_obs=lambda: containers.read_table(container, "obs"),
        contents={
            "layers": layers,
            "raw": raw is not None,
            "obs_columns": containers.column_names(container, "obs"),
        },
        identity=lambda: container.identity(key),
        close=container.close,
        obs_table=(lambda: StoredTable(container, "obs", cells)) if by_columns else None,
    )


def _memory_source(adata: AnnData, reading: Reading, memory_limit: int) -> CellSource:
    name = "AnnData object"
    memory.require_anndata(adata, "an input must be a path or an AnnData object")
    layers, raw = sorted(adata.layers), adata.raw
    element = _chosen(name, reading, layers, adata.X is not None, raw is not None)
    if reading.layer is not None:
        values = adata.layers[reading.layer]
    else:
        values = raw.X if reading.use_raw else adata.X
    matrix, identity, close = memory.matrix_of(values, f"{name} ({element})", memory_limit)
    return CellSource(
        name=name,
        file_format=name,
        element=element,
        matrix=matrix,
        var=raw.var if reading.use_raw else adata.var,
        read_obs=lambda: adata.obs,
        contents={
            "layers": layers,
            "raw": raw is not None,
            "obs_columns": list(adata.obs.columns),
        },
        identity=lambda: identity() + memory.names_identity(adata),
        close=close,
    )


def _tenx_source(
    path: Path,
    file_format: str,
    read: Callable[[Path], AnnData],
    reading: Reading,
) -> CellSource:
    _chosen(str(path), reading, layers=[], has_x=True, has_raw=False)
    adata = read(path)
    matrix, *_ = memory.matrix_of(adata.X, str(path), MEMORY_LIMIT)
    return CellSource(
        name=str(path),
        file_format=file_format,
        element="X",
        matrix=matrix,
        var=adata.var,
        read_obs=lambda: adata.obs,
        contents={"layers": [], "raw": False, "obs_columns": list(adata.obs.columns)},
        identity=lambda: files_digest(tenx.files(path)),
    )


def _chosen(name: str, reading: Reading, layers: list[str], has_x: bool, has_raw: bool) -> str:
    """The name of the chosen matrix (``"X"``, ``"layers/..."``, ``"raw/X"``) if it is there."""
    listed = f"Its layers: {', '.join(layers) if layers else 'none'}; raw: {_yes(has_raw)}"
    if reading.layer is not None:
        if reading.layer not in layers:
            raise InputError(f"{name} has no layer {reading.layer!r}. {listed}; X: {_yes(has_x)}.")
        return f"layers/{reading.layer}"
    if reading.use_raw:
        if not has_raw:
            raise InputError(f"{name} has no raw. {listed}; X: {_yes(has_x)}.")
        return "raw/X"
    if not has_x:
        raise InputError(f"{name} has no X. {listed}. Choose a layer or raw.")
    return "X"


def _yes(there: bool) -> str:
    return "yes" if there else "no"
