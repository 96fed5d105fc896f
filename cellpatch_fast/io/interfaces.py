"""What the parts of `io` agree on: arrays, chunks, and how damage is told.

An array on disk is a `StoredArray` (ranges of its first axis, through the library it belongs to)
and, where many threads shall decode it, `Chunks`. Whatever goes wrong below becomes one
`InputError` that names the file, the part and what to do: `reading` sees to that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import InputError, summary

COPY_AGAIN = "The file is truncated or damaged: copy or download it again"
FAR_AWAY = "Check the address, the connection and your permission, or have the store written anew"


def remedy(name: str) -> str:
    """What to do about a file, or a store behind an address, that cannot be read."""
    return FAR_AWAY if is_address(name) else COPY_AGAIN


def is_address(name: object) -> bool:
    """Whether ``name`` is an address such as ``https://...``, not a path."""
    return isinstance(name, str) and "://" in name


@contextlib.contextmanager
def reading(name: str, what: str, advice: str | None = None) -> Iterator[None]:
    """Turn any error of the libraries below into an `InputError`: ``name``, ``what``, advice.

    HDF5, Zarr and their codecs report damage with whatever exception is at hand (OSError,
    KeyError, RuntimeError, ValueError, zlib.error, ...), so nothing narrower would do. Keep the
    body to calls of those libraries.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BlockingIOError as error:
        raise InputError(
            f"{name}: cannot read {what} ({summary(error)}). Another program has it open for "
            f"writing: wait until it is done."
        ) from error
    except Exception as error:
        raise InputError(
            f"{name}: cannot read {what} ({summary(error)}). {advice or remedy(name)}."
        ) from error


class StoredArray(Protocol):
    """An array of which ranges of the first axis can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """In the machine's byte order."""

    @property
    def chunk(self) -> int:
        """Rows that are decoded together; 1 if any range costs what it holds."""

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy the rows ``start : start + len(out)`` into ``out``."""

    def place(self, start: int) -> str:
        """Where the row ``start`` is stored, for messages."""

    def chunks(self) -> Chunks | None:
        """A reader of its own that decodes chunks outside of the libraries, where that is
        possible. The caller closes it."""


class Chunks(Protocol):
    """A stored array, flattened, as equal chunks that many threads decode at a time."""

    @property
    def length(self) -> int:
        """Elements."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """In the machine's byte order."""

    @property
    def chunk(self) -> int:
        """Elements of a chunk; the last one may have fewer."""

    def read(self, chunks: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        """Decode ``chunks`` (ascending numbers) one behind the other into ``out``.

        That is one-dimensional, contiguous, of `dtype`, and has exactly the chunks' length. Byte
        ranges that adjoin are read together; reading and decoding hold no GIL, and many threads
        may call this at a time.

        Raises
        ------
        ChunkError
            If a chunk cannot be read or decoded.
        """

    def place(self, chunk: int) -> str:
        """Where a chunk is stored, for messages."""

    def close(self) -> None:
        """Give back file descriptors."""


class ChunkError(Exception):
    """A chunk that cannot be read; the caller knows which cells that are.

    Parameters
    ----------
    chunk
        Its number.
    place
        Where it is stored.
    reason
        What is wrong with it.
    """

    def __init__(self, chunk: int, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.chunk, self.place, self.reason = chunk, place, reason
