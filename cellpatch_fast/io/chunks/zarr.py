"""Chunks of Zarr arrays, version 2 and 3, sharded or not, in a folder or any other store.

zarr-python opens the array and understands its metadata; from there on only its stores' byte
ranges are used, and for a local folder not even those. The index of a shard is read once, when
the first chunk of that shard is wanted, checked against its checksum, and kept.

A chunk file that is not there reads as zeros in Zarr, which is also what half-copied stores look
like. Here it is an error, except for the files that whoever opened the array found missing and
took for zeros. Inside a shard there is no doubt: the index says which chunks are left out.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import summary
from . import stretches
from .codecs import Crc32c, Pipeline, zarr_pipeline
from .direct import FILE_END, DirectChunks, Located
from .files import LocalFiles, Range, Ranges
from .remote import StoreFiles

if TYPE_CHECKING:
    import zarr

LEFT_OUT = -1  # offset and size of a chunk that a shard does not hold: 2^64 - 1, unsigned
CHECKSUM = {"name": "crc32c"}


class ZarrChunks(DirectChunks):
    """The chunks of a Zarr array; made by `zarr_chunks`.

    Parameters
    ----------
    array
        Of one dimension.
    pipeline
        What undoes its codecs.
    may_lack
        Keys (such as ``"c/3"``) of chunk files that need not be there.
    """

    def __init__(
        self, array: zarr.Array[Any], pipeline: Pipeline, may_lack: Collection[str]
    ) -> None:
        super().__init__(
            array.shape[0], array.dtype.newbyteorder("="), array.chunks[0], _files_of(array)
        )
        self._array, self._pipeline = array, pipeline
        self._prefix = f"{array.path}/" if array.path else ""
        self._permitted = {self._prefix + key for key in may_lack}
        fill_value = array.metadata.fill_value
        self._fill = self.dtype.type(0 if fill_value is None else fill_value)

    def place(self, chunk: int) -> str:
        return place_of(self._array, chunk * self.chunk)

    def _find(self, chunks: np.ndarray) -> Iterator[Located]:
        whole = np.array([0]), np.array([FILE_END])
        for first, chunk in enumerate(chunks.tolist()):
            yield Located(first, self._key(chunk), *whole, self._pipeline)

    def _key(self, number: int) -> str:
        return self._prefix + self._array.metadata.encode_chunk_key((number,))

    def _may_lack(self, file: str) -> bool:
        return file in self._permitted

    def _fill_value(self) -> Any:
        return self._fill


class ShardedChunks(ZarrChunks):
    """The inner chunks of a sharded Zarr array.

    Parameters
    ----------
    at_start, checked
        Where the shards' index is, and whether a checksum follows it.
    """

    def __init__(
        self,
        array: zarr.Array[Any],
        pipeline: Pipeline,
        may_lack: Collection[str],
        at_start: bool,
        checked: bool,
    ) -> None:
        super().__init__(array, pipeline, may_lack)
        self._per_shard = array.shards[0] // array.chunks[0]  # type: ignore[index]
        self._at_start, self._checked = at_start, checked
        self._shards: dict[int, tuple[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def _find(self, chunks: np.ndarray) -> Iterator[Located]:
        shards, inner = np.divmod(chunks, self._per_shard)
        for first, last in stretches(shards):
            key, index = self._shard(int(shards[first]), int(chunks[first]))
            starts, sizes = index[inner[first:last]].T
            located = Located(first, key, starts, starts + sizes, self._pipeline)
            if starts.min() != LEFT_OUT:
                yield located
                continue
            for begin, end in stretches(starts == LEFT_OUT):
                if starts[begin] != LEFT_OUT:
                    yield located.part(begin, end)

    def _shard(self, shard: int, chunk: int) -> tuple[str, np.ndarray]:
        """A shard's key and index; ``chunk`` is one that is wanted from it."""
        entry = self._shards.get(shard)
        if entry is None:
            with self._lock:
                entry = self._shards.get(shard)
                if entry is None:
                    key = self._key(shard)
                    try:
                        entry = self._shards[shard] = key, self._read_index(key)
                    except MemoryError:
                        raise
                    except Exception as error:
                        self._fail(chunk, summary(error), error)
        return entry

    def _read_index(self, key: str) -> np.ndarray:
        """int64 [chunks, 2]: offset and size of each chunk in the shard ``key``."""
        size = 16 * self._per_shard + 4 * self._checked
        where = Range(key, 0, size) if self._at_start else Range(key, -size, None)
        content, _, (count,) = self._files.fetch([where])
        if isinstance(count, Exception):
            raise count
        if count is None:
            if not self._may_lack(key):
                raise FileNotFoundError("there is no such file")
            return np.full((self._per_shard, 2), LEFT_OUT)
        if count != size:
            raise ValueError(f"the index of the shard has {count} bytes instead of {size}")
        try:
            listed = Crc32c().unpack(content.data, size) if self._checked else content
        except ValueError as error:
            raise ValueError(f"the index of the shard is damaged: {error}") from error
        index = np.frombuffer(listed, "<i8").reshape(-1, 2).astype(np.int64)  # a copy
        left_out = index == LEFT_OUT
        beyond = (index < 0) | (index >= 1 << 62)  # sums of which could be anything
        if (left_out[:, 0] != left_out[:, 1]).any() or beyond[~left_out].any():
            raise ValueError("the index of the shard is damaged")
        return index


def zarr_chunks(array: zarr.Array[Any], may_lack: Collection[str] = ()) -> ZarrChunks | None:
    """``array`` by chunks, or None if zarr-python has to read it: codecs, types, dimensions.

    Parameters
    ----------
    may_lack
        Keys (such as ``"c/3"``) of chunk files that stand for the fill value if they are not
        there. That any other is not there is an error.
    """
    dtype = array.dtype
    if len(array.shape) != 1 or dtype.kind not in "iufb" or not dtype.isnative:
        return None
    if array.metadata.zarr_format == 2:
        pipeline = zarr_pipeline(_v2_codecs(array.metadata), dtype)
        return None if pipeline is None else ZarrChunks(array, pipeline, may_lack)
    codecs = [_flat(codec.to_dict()) for codec in array.metadata.codecs]
    if codecs[0]["name"] != "sharding_indexed":
        pipeline = zarr_pipeline(codecs, dtype)
        return None if pipeline is None else ZarrChunks(array, pipeline, may_lack)
    sharding = codecs[0]
    pipeline = zarr_pipeline([_flat(codec) for codec in sharding["codecs"]], dtype)
    little, *checks = (_flat(codec) for codec in sharding["index_codecs"])
    known_index = little == {"name": "bytes", "endian": "little"} and checks in ([], [CHECKSUM])
    if pipeline is None or len(codecs) > 1 or not known_index:
        return None
    at_start = sharding["index_location"] == "start"
    return ShardedChunks(array, pipeline, may_lack, at_start, bool(checks))


def place_of(array: zarr.Array[Any], row: int) -> str:
    """Where a row of the first axis is stored, in words."""
    stored = array.shards or array.chunks
    first = (row // stored[0], *(0 for _ in stored[1:]))
    key = array.metadata.encode_chunk_key(first)
    file = f"{array.path}/{key}" if array.path else key
    if len(stored) > 1:
        return f"the chunk files from {file} on"
    if array.shards is None:
        return f"the chunk file {file}"
    return f"the chunk file {file} (inner chunk {row % stored[0] // array.chunks[0]})"


def _flat(codec: Mapping[str, Any]) -> dict[str, Any]:
    """A codec's name and settings. Those of numcodecs go by the names that Zarr has for them."""
    name = str(codec["name"])
    if name != "numcodecs.crc32c":  # which may stand in front, as Zarr's own does not
        name = name.removeprefix("numcodecs.")
    return {"name": name, **codec.get("configuration", {})}


def _v2_codecs(metadata: Any) -> list[dict[str, Any]]:
    """What version 2 calls filters and compressor, as version 3 would list them."""
    used = [*(metadata.filters or ()), *([metadata.compressor] if metadata.compressor else [])]
    settings = [codec.get_config() for codec in used]
    codecs = [_flat({"name": f"numcodecs.{s['id']}", "configuration": s}) for s in settings]
    of_numbers = int(bool(codecs) and codecs[0]["name"] == "delta")
    codecs.insert(of_numbers, {"name": "bytes", "endian": sys.byteorder})
    return codecs


def _files_of(array: zarr.Array[Any]) -> Ranges:
    from zarr.storage import LocalStore

    store = array.store
    if type(store) is LocalStore:
        return LocalFiles(store.root.absolute())
    return StoreFiles(store)
