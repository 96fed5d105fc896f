"""Shard files of a one-dimensional Zarr v3 array, put together without zarr-python.

A shard (codec ``sharding_indexed``) is a file of encoded chunks, one after the other, each with its
CRC-32C behind it; then an index with the offset and size of each, 16 bytes a chunk; then the
index's CRC-32C. So no bit of the file changes unnoticed: without the chunks' sums, 81 % of changed
bits gave wrong tokens. Chunks are always whole: the last one of an array is filled up, and the
array's shape says what counts.

Encoding is left to numcodecs, which holds no GIL, so any number of threads may encode chunks
while one writes them; zarr-python's own pipeline does both under a lock and in Python.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import zarr

NO_CHUNK = 2**64 - 1  # in an index: there is none


@dataclass(frozen=True)
class EntryArray:
    """An array of a token store: its name, type and codecs.

    Parameters
    ----------
    name
        Of the array in its group.
    dtype
        Of its elements.
    delta
        Store the difference of each element to the one before it, modulo the type's range.
    shuffle
        What Blosc sorts by before LZ4: bytes or bits.

    Both shuffles see two bytes at a time, also of values of one byte: bits then come back in two
    thirds of the time, and take 0.5 % more space.
    """

    name: str
    dtype: np.dtype[Any]
    delta: bool
    shuffle: Literal["shuffle", "bitshuffle"]

    def encode(self, chunk: np.ndarray) -> bytes:
        """What is stored of a whole chunk. Holds no GIL, but for microseconds."""
        import google_crc32c
        from numcodecs.blosc import BITSHUFFLE, SHUFFLE, Blosc
        from numcodecs.delta import Delta

        stored = chunk.astype(self.dtype.newbyteorder("<"), copy=False)
        stored = stored.view(f"<u{self.dtype.itemsize}")
        if self.delta:
            stored = Delta(stored.dtype).encode(stored)
        shuffle = SHUFFLE if self.shuffle == "shuffle" else BITSHUFFLE
        blosc = Blosc("lz4", 5, shuffle, typesize=max(2, self.dtype.itemsize))
        encoded = bytes(blosc.encode(stored))
        return encoded + google_crc32c.value(encoded).to_bytes(4, "little")

    def create(self, root: zarr.Group, length: int, chunk: int, shard_chunks: int) -> None:
        """Write the metadata, which says the same as `encode`."""
        from zarr.codecs import BloscCodec, Crc32cCodec
        from zarr.codecs.numcodecs import Delta

        blosc = BloscCodec(
            cname="lz4", clevel=5, shuffle=self.shuffle, typesize=max(2, self.dtype.itemsize)
        )
        root.create_array(
            self.name,
            shape=(length,),
            dtype=self.dtype,
            chunks=(chunk,),
            shards=(chunk * shard_chunks,),
            filters=[Delta(dtype=self.dtype.newbyteorder("<").str)] if self.delta else None,
            compressors=[blosc, Crc32cCodec()],
            fill_value=0,
        )


class ShardFile:
    """A shard file in the making.

    Parameters
    ----------
    path
        Of the file; its folder is made.
    chunks
        Of the shard, at most.

    Attributes
    ----------
    path
        As given.
    """

    def __init__(self, path: Path, chunks: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._file = path, path.open("wb")
        self._index = np.full((chunks, 2), NO_CHUNK, "<u8")  # offset, size
        self._chunks = self._size = 0

    def append(self, encoded: bytes) -> None:
        """Write the next chunk."""
        self._index[self._chunks] = self._size, len(encoded)
        self._chunks += 1
        self._size += self._file.write(encoded)

    def finish(self) -> int:
        """Write the index; returns the file's size when it is on the disk."""
        import google_crc32c

        index = self._index.tobytes()
        self._size += self._file.write(index + google_crc32c.value(index).to_bytes(4, "little"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._size

    def close(self) -> None:
        """Give the file up, whatever is in it."""
        with contextlib.suppress(OSError):  # a full disk, which was reported before
            self._file.close()
