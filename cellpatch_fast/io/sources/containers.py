"""AnnData on disk: where an .h5ad file or a .zarr store keeps its matrix, obs and var.

h5py and zarr-python give both formats the same face (groups with keys and attributes), and
anndata's ``read_elem`` reads obs and var from either, in the encodings of every anndata version
that it knows. Only the matrix is read by our own code, because it must never be loaded whole.
What anndata's ``read_elem`` leaves to ``read_h5ad`` is repeated here: obs and var as one
compound dataset, with their categories in ``uns``, and ``raw.X`` beside ``X`` (anndata < 0.7).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from ..interfaces import COPY_AGAIN, StoredArray, reading
from . import remote
from .arrays import Hdf5Array, ZarrArray, absent_chunks, local_keys
from .identity import content_digest

if TYPE_CHECKING:
    import pandas as pd

NOT_ANNDATA = (
    "Expected an AnnData file (.h5ad or .zarr) or 10x Genomics output (.h5, or a folder with "
    "matrix.mtx)"
)
SPARSE_PARTS = ("indptr", "indices", "data")


@dataclass(frozen=True, eq=False)
class Container:
    """An open .h5ad file or .zarr store.

    Parameters
    ----------
    root
        h5py.Group or zarr.Group that holds ``obs``, ``var`` and the rest.
    name
        The file, for messages.
    path
        The file or folder itself; None if it is far away.
    file_format
        In words, such as ``"Zarr v3"``.
    close_root
        Closes the file.
    """

    root: Any
    name: str
    path: Path | None
    file_format: str
    close_root: Callable[[], None]

    def __contains__(self, key: str) -> bool:
        with reading(self.name, f"its element {key!r}"):
            return key in self.root

    def element(self, key: str) -> Any:
        """The group or array ``key``."""
        with reading(self.name, f"its element {key!r}"):
            return self.root[key]

    def array(self, element: Any, key: str, may_lack: Collection[str] = ()) -> StoredArray:
        """``element``, an array of this container, ready to be read.

        Parameters
        ----------
        may_lack
            Keys of a Zarr array's chunk files that are not there, which the caller takes for
            zeros. That any other is not there is noticed when it is read.
        """
        if not hasattr(element, "shape"):
            raise InputError(f"{self.name}: {key} is a group, not an array. {COPY_AGAIN}.")
        return ZarrArray(element, may_lack) if self._is_zarr else Hdf5Array(element)

    def absent_chunks(self, element: Any, thorough: bool = True) -> list[tuple[str, int, int]]:
        """Key, first row and end of a Zarr array's chunks (or shards) that are not stored.

        An HDF5 file is checked as a whole, when it is opened.

        Parameters
        ----------
        thorough
            Whether a store that cannot list its files is asked for each of them. What `array`
            is to read does not need that: there, a missing chunk is noticed in time.
        """
        if not self._is_zarr:
            return []
        if self.path is not None:
            return absent_chunks(element, local_keys(self.path, element.path))
        with reading(self.name, f"the list of chunks of {element.path}"):
            present = remote.present_keys(element, thorough)
        return [] if present is None else absent_chunks(element, present)

    def identity(self, key: str) -> str:
        """Changes when the matrix ``key``, obs or var do; see `identity` for what that reads."""
        raw = raw_prefix(self)
        var = f"{raw}var" if raw and key == f"{raw}X" else "var"
        with reading(self.name, "its content"):
            parts = [(part, part != key) for part in ("obs", var, key) if part in self.root]
            elements = ((self.root[part], whole) for part, whole in parts)
            return content_digest(elements, self.name)

    def close(self) -> None:
        """Close the file."""
        self.close_root()

    @property
    def _is_zarr(self) -> bool:
        return self.file_format.startswith("Zarr")


def open_hdf5(path: Path) -> Container:
    """Open an HDF5 file; whether it holds AnnData is for the caller to see."""
    import h5py

    with reading(str(path), "the file"):
        file = h5py.File(path, "r")
    return Container(file, str(path), path, "h5ad", file.close)


def open_zarr(place: Path | str) -> Container:
    """Open a Zarr folder, a zip file of one, or one behind an address (https://, s3://, ...).

    Raises
    ------
    InputError
        If it cannot be read, or the package that an address needs is missing.
    """
    import zarr
    from zarr.storage import ZipStore

    name = str(place)
    path = place if isinstance(place, Path) else None
    with reading(name, "the Zarr store"):
        if path is None:
            root, close = remote.open_group(name)
        elif path.is_dir():
            root = zarr.open_group(path, mode="r")
            close = root.store.close
        else:
            root = zarr.open_group(ZipStore(path, mode="r"), path=_zipped_root(path), mode="r")
            close = root.store.close
        version = root.metadata.zarr_format
    return Container(root, name, path, f"Zarr v{version}", close)


def _zipped_root(path: Path) -> str:
    """The folder inside a zip file that is the store: the top, or the only folder there."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    return tops.pop() if len(tops) == 1 else ""


def layer_names(container: Container) -> list[str]:
    return sorted(container.element("layers")) if "layers" in container else []


def raw_prefix(container: Container) -> str | None:
    """``"raw/"``, ``"raw."`` (anndata < 0.7) or None."""
    return next((prefix for prefix in ("raw/", "raw.") if f"{prefix}X" in container), None)


def refuse_absent(absent: list[tuple[str, int, int]], part: str, name: str) -> None:
    if absent:
        raise InputError(
            f"{name}: missing chunks of {part}: {len(absent)} (the first is {absent[0][0]!r}). "
            f"They would be read as zeros. The store is incomplete: copy or download it again."
        )


def table_length(container: Container, key: str) -> int:
    """Rows of the data frame ``key`` (``"obs"`` or ``"var"``), without reading it."""
    element = container.element(key)
    if hasattr(element, "shape"):  # anndata < 0.7
        return int(element.shape[0])
    with reading(container.name, f"the index of {key}"):
        index_key = text(element.attrs["_index"])
        index = element[index_key]
        if not hasattr(index, "shape"):  # e.g. a categorical or nullable index
            index = index["codes"] if "codes" in index else index["values"]
        length = int(index.shape[0])
        absent = container.absent_chunks(index)
    refuse_absent(absent, f"the index of {key}", container.name)
    return length


def column_names(container: Container, key: str) -> list[str]:
    """The columns of the data frame ``key``, without reading it."""
    element = container.element(key)
    if hasattr(element, "shape"):  # anndata < 0.7
        return list(element.dtype.names[1:])
    with reading(container.name, f"the columns of {key}"):
        return [text(name) for name in element.attrs["column-order"]]


def read_table(container: Container, key: str) -> pd.DataFrame:
    """The data frame ``key``: ``"obs"``, ``"var"``, ``"raw/var"``, ..."""
    import pandas as pd
    from anndata import OldFormatWarning
    from anndata.io import read_elem

    with reading(container.name, key), warnings.catch_warnings():
        warnings.simplefilter("ignore", OldFormatWarning)
        table = read_elem(container.root[key])
        if isinstance(table, np.ndarray):  # anndata < 0.7
            table = pd.DataFrame(table)
            table = table.set_index(table.columns[0])
            for column in table.columns:
                categories = f"uns/{column}_categories"
                if categories in container.root:
                    names = np.atleast_1d(read_elem(container.root[categories]))
                    if table[column].max() < len(names):  # else they are of var, or of obs
                        table[column] = pd.Categorical.from_codes(table[column], names)
    if not isinstance(table, pd.DataFrame):
        raise InputError(f"{container.name}: {key} is not a table. {NOT_ANNDATA}.")
    return table


def text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
