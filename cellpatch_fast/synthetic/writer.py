"""AnnData files written from the first cell to the last, a piece at a time.

anndata writes matrices that are in memory. Here the arrays of an .h5ad file or a .zarr store grow,
and each of their chunks (in a .zarr: shards) is written once, when it is full: some megabytes are
in memory, whatever the number of cells, and what is on disk does not depend on the pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 1 << 18  # elements: 1 MiB of counts, which HDF5 writes without going through its cache
SHARD_CHUNKS = 32  # in a .zarr: 32 MiB of counts per file
COMPRESSIONS = {".h5ad": ("gzip", "lzf"), ".zarr": ("lz4", "zstd")}
INDEX = "_index"


def require_writable(path: Path, compression: str | None) -> None:
    """`InputError` if there is something at ``path``, or what is asked for does not exist."""
    if path.suffix not in COMPRESSIONS:
        raise InputError(f"{path}: the name of the file must end in {' or '.join(COMPRESSIONS)}")
    if compression not in (None, *COMPRESSIONS[path.suffix]):
        raise InputError(
            f"a {path.suffix} cannot be compressed with {compression!r}: choose "
            f"{' or '.join(COMPRESSIONS[path.suffix])}, or None"
        )
    if path.exists():
        raise InputError(f"{path} exists: choose another name, or delete it")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}: make it first")


class AnnDataWriter:
    """An AnnData file of counts in the making; a context manager.

    Parameters
    ----------
    path
        Of the new file or store, which must not exist.
    suffix
        ``".h5ad"`` or ``".zarr"``: which of them it is.
    cells
        How many there will be.
    var
        The genes.
    categories
        Of each column of obs; all of them are categorical.
    uns
        Unstructured annotation.
    index_type
        Of row offsets and columns alike, else SciPy cannot use them: int64 if there may be more
        than 2^31 - 1 entries, else int32.
    compression
        One of `COMPRESSIONS`, or None.
    """

    def __init__(
        self,
        path: Path,
        suffix: str,
        *,
        cells: int,
        var: pd.DataFrame,
        categories: Mapping[str, Sequence[str]],
        uns: Mapping[str, Any],
        index_type: np.dtype[Any],
        compression: str | None,
    ) -> None:
        self._compression = compression
        self._index_type = index_type
        self._file: Any  # closed at the end; a store has nothing to close
        self._root: Any
        if suffix == ".h5ad":
            import h5py

            self._root = self._file = h5py.File(path, "w-")
        else:
            import zarr

            self._root, self._file = zarr.create_group(path, zarr_format=3), None
        self._parts: dict[str, _Growing] = {}
        self._cells = cells
        self._entries = 0
        self._create(var, categories, uns)

    def append(
        self,
        offsets: np.ndarray,
        columns: np.ndarray,
        counts: np.ndarray,
        names: Sequence[str],
        codes: Mapping[str, np.ndarray],
    ) -> None:
        """Write the next cells.

        Parameters
        ----------
        offsets
            int64 [cells + 1]: where their entries are.
        columns, counts
            [entries]: ascending within a cell.
        names
            Of the cells.
        codes
            [cells], of each column of obs: places in its categories.
        """
        entries = slice(offsets[0], offsets[-1])
        self._parts["X/data"].append(counts[entries])
        self._parts["X/indices"].append(columns[entries])
        self._parts["X/indptr"].append(offsets[1:] - offsets[0] + self._entries)
        self._parts[f"obs/{INDEX}"].append(np.array(names, object))
        for column, values in codes.items():
            self._parts[f"obs/{column}/codes"].append(values)
        self._entries += int(offsets[-1] - offsets[0])
        if self._entries > np.iinfo(self._index_type).max:
            raise OverflowError(f"{self._entries:,} entries are too many for {self._index_type}")

    def finish(self) -> None:
        """Write what has not filled a chunk."""
        for part in self._parts.values():
            part.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def _create(
        self, var: pd.DataFrame, categories: Mapping[str, Sequence[str]], uns: Mapping[str, Any]
    ) -> None:
        import anndata
        from anndata.io import write_elem

        root = self._root
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        with anndata.settings.override(  # which differ between versions
            zarr_write_format=3, auto_shard_zarr_v3=False, allow_write_nullable_strings=True
        ):
            for name in ("layers", "obsm", "obsp", "varm", "varp"):
                write_elem(root, name, {})
            write_elem(root, "var", var)
            write_elem(root, "uns", dict(uns))
            matrix = root.create_group("X")
            matrix.attrs.update(_encoding("csr_matrix", "0.1.0", shape=[self._cells, len(var)]))
            obs = root.create_group("obs")
            listed = {"_index": INDEX, "column-order": list(categories)}
            obs.attrs.update(_encoding("dataframe", "0.2.0", **listed))
            for column, names in categories.items():
                group = obs.create_group(column)
                group.attrs.update(_encoding("categorical", "0.2.0", ordered=False))
                write_elem(group, "categories", np.array(names, object))
                codes = np.min_scalar_type(-len(names))
                self._grow(group, f"obs/{column}/codes", codes).attrs.update(_encoding("array"))
        index = self._grow(obs, f"obs/{INDEX}", None)
        index.attrs.update(_encoding("string-array"))
        self._grow(matrix, "X/data", np.dtype(np.float32))
        for name in ("indices", "indptr"):
            self._grow(matrix, f"X/{name}", self._index_type)
        self._parts["X/indptr"].append(np.zeros(1, np.int64))

    def _grow(self, group: Any, path: str, dtype: np.dtype[Any] | None) -> Any:
        """Make an array without elements; ``dtype`` None is for strings."""
        name = path.rpartition("/")[2]
        if self._file is not None:
            import h5py

            array = group.create_dataset(
                name,
                shape=(0,),
                dtype=dtype or h5py.string_dtype(),
                maxshape=(None,),
                chunks=(CHUNK,),
                compression=self._compression,
                shuffle=self._compression is not None and dtype is not None,
            )
            unit = CHUNK
        else:
            array = group.create_array(
                name,
                shape=(0,),
                dtype=dtype or str,
                chunks=(CHUNK,),
                shards=(CHUNK * SHARD_CHUNKS,) if dtype else None,
                compressors=self._compressor(dtype),
            )
            unit = CHUNK * SHARD_CHUNKS if dtype else CHUNK
        self._parts[path] = _Growing(array, unit)
        return array

    def _compressor(self, dtype: np.dtype[Any] | None) -> Any:
        from zarr.codecs import BloscCodec

        if self._compression is None:
            return None
        codec: Any = BloscCodec  # by the names that users know
        shuffle = "shuffle" if dtype else "noshuffle"
        size = dtype.itemsize if dtype else 1
        return codec(cname=self._compression, clevel=3, shuffle=shuffle, typesize=size)


class _Growing:
    """An array on disk that is written in whole units from its start to its end."""

    def __init__(self, array: Any, unit: int) -> None:
        self._array, self._unit = array, unit
        self._held: list[np.ndarray] = []
        self._size = 0  # of what is held

    def append(self, values: np.ndarray) -> None:
        self._held.append(values)
        self._size += len(values)
        if self._size >= self._unit:
            held = np.concatenate(self._held)
            whole = len(held) - len(held) % self._unit
            self._write(held[:whole])
            self._held, self._size = [held[whole:].copy()], len(held) - whole

    def flush(self) -> None:
        if self._size:
            self._write(np.concatenate(self._held))
        self._held, self._size = [], 0

    def _write(self, values: np.ndarray) -> None:
        start = self._array.shape[0]
        self._array.resize((start + len(values),))
        self._array[start:] = values


def _encoding(kind: str, version: str = "0.2.0", **others: Any) -> dict[str, Any]:
    """Attributes by which anndata knows an element."""
    return {"encoding-type": kind, "encoding-version": version, **others}
