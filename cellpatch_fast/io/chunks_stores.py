"""Byte ranges of any Zarr store: a zip file, or files behind an address.

The store's own ``get`` does the work, on the event loop that zarr-python keeps for it. It comes
from many threads, and what one call asks for is fetched concurrently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .chunks_files import Range

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer


class StoreFiles:
    """The files of a Zarr store; see `Ranges`."""

    most = 16 * 2**20  # a request costs some 50 ms, in which a fast line carries that much

    def __init__(self, store: Store) -> None:
        self._store = store

    def fetch(self, ranges: Sequence[Range]) -> Iterator[memoryview | None]:
        from zarr.core.sync import sync

        for wanted, content in zip(ranges, sync(self._get(ranges)), strict=True):
            if isinstance(content, BaseException):
                raise content
            if content is None:
                yield None
                continue
            found = content.as_numpy_array().data
            asked = -wanted.start if wanted.start < 0 else (wanted.stop or 0) - wanted.start
            if len(found) > asked > 0:
                raise OSError("the server sends whole files where parts of them are asked for")
            yield found

    async def _get(self, ranges: Sequence[Range]) -> list[Buffer | BaseException | None]:
        from zarr.abc.store import RangeByteRequest, SuffixByteRequest
        from zarr.core.buffer import default_buffer_prototype

        def request(start: int, stop: int | None) -> ByteRequest | None:
            if start < 0:
                return SuffixByteRequest(-start)
            return None if stop is None else RangeByteRequest(start, stop)

        prototype = default_buffer_prototype()
        gets = (
            self._store.get(file, prototype, request(start, stop)) for file, start, stop in ranges
        )
        return await asyncio.gather(*gets, return_exceptions=True)

    def fill(self, file: str, start: int, buffers: Sequence[memoryview]) -> int:
        stop = start + sum(map(len, buffers))
        (content,) = self.fetch([Range(file, start, stop)])
        if content is None:
            raise FileNotFoundError("there is no such file")
        rest = content
        for buffer in buffers:
            given, rest = rest[: len(buffer)], rest[len(buffer) :]
            buffer[: len(given)] = given
        return len(content)

    def close(self) -> None:
        """The store stays its owner's."""
