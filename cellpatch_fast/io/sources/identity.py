"""Whether an input is still what it was, told by its content.

Times of files say nothing: they change with a copy, and stay when a file system is coarse. So the
annotation (obs, var) is read whole, and so is every array of the matrix up to `WHOLE_BYTES`. Of a
larger one that many bytes are read, in blocks that lie evenly from its beginning to its end: half a
second for a matrix of any size, if chunks are small, and `LEAST_BLOCKS` blocks if they are not. So
a matrix that was written anew is another one, whereas numbers changed in place in a few cells of a
large file may go unnoticed. How things are compressed does not matter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..interfaces import reading

WHOLE_BYTES = 1 << 26  # of an array of numbers, decoded
BLOCK_BYTES = 1 << 18  # what is read at a time, but for chunks that are larger
LEAST_BLOCKS = 8
PARTS = ("codes", "categories", "values", "mask", "indptr", "indices", "data")  # of a group


def content_digest(elements: Iterable[tuple[Any, bool]], name: str) -> str:
    """A digest of groups and arrays of HDF5 or Zarr, each with whether all of it is to be read.

    Raises
    ------
    InputError
        If an array of the file called ``name`` is damaged: which one, and where.
    """
    digest = hashlib.blake2b()
    for element, whole in elements:
        for piece in _pieces(element, whole, name):
            digest.update(piece)
    return digest.hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """A digest of whole files and their names."""
    digest = hashlib.blake2b()
    for path in paths:
        with path.open("rb") as file:
            digest.update(repr((path.name, hashlib.file_digest(file, "blake2b").digest())).encode())
    return digest.hexdigest()


def _pieces(element: Any, whole: bool, name: str) -> Iterator[bytes]:
    """Attributes, names and content of an element and of all that is in it."""
    attributes = {key: np.asarray(value).tolist() for key, value in dict(element.attrs).items()}
    yield repr(sorted(attributes.items())).encode()
    if not hasattr(element, "shape"):
        for part in _names(element, attributes):
            yield repr(part).encode()
            yield from _pieces(element[part], whole, name)
        return
    yield repr((element.shape, str(element.dtype))).encode()
    for rows in _ranges(element, whole) if element.shape else [()]:
        where = f" from row {rows.start:,} on" if isinstance(rows, slice) else ""
        with reading(name, f"{element.name.strip('/')}{where}"):
            values = np.asarray(element[rows])
        if values.dtype.hasobject or values.dtype.kind == "T":  # strings of any length
            yield repr(values.tolist()).encode()
        else:
            yield values.tobytes()


def _names(group: Any, attributes: dict[str, Any]) -> list[str]:
    """What is in a group. Not every place far away can list that, but anndata's encodings say."""
    from zarr.storage import FsspecStore

    if not isinstance(getattr(group, "store", None), FsspecStore):
        return sorted(group)
    columns = [attributes["_index"], *attributes["column-order"]] if "_index" in attributes else []
    return sorted(name for name in {*columns, *PARTS} if name in group)


def _ranges(array: Any, whole: bool) -> Iterator[slice]:
    """Rows to read: whole chunks at a time."""
    row_bytes = max(1, array.dtype.itemsize * math.prod(array.shape[1:]))
    chunk = array.chunks[0] if array.chunks else 1
    step = -(-max(1, BLOCK_BYTES // row_bytes) // chunk) * chunk
    blocks = -(-array.shape[0] // step)
    if whole or array.shape[0] * row_bytes <= WHOLE_BYTES:
        numbers = range(blocks)
    else:
        count = min(blocks, max(LEAST_BLOCKS, WHOLE_BYTES // (step * row_bytes)))
        numbers = np.linspace(0, blocks - 1, count).astype(int).tolist()
    return (slice(block * step, (block + 1) * step) for block in numbers)
