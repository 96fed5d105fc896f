"""Byte ranges of any Zarr store: a zip file, or files behind an address.

The store's own ``get`` does the work, on the event loop that zarr-python keeps for it. It comes
from many threads, and what one call asks for is fetched concurrently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .files import Fetched, Range

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer


class StoreFiles:
    """The files of a Zarr store; see `Ranges`."""

    most = 16 * 2**20  # a request costs some 50 ms, in which a fast line carries that much

    def __init__(self, store: Store) -> None:
        self._store = store

    def fetch(self, ranges: Sequence[Range]) -> Fetched:
        from zarr.core.sync import sync

        starts, total = [], 0
        parts: list[np.ndarray] = []
        counts: list[int | Exception | None] = []
        for wanted, content in zip(ranges, sync(self._get(ranges)), strict=True):
            starts.append(total)
            if content is None or isinstance(content, Exception):
                counts.append(content)
                continue
            if isinstance(content, BaseException):
                raise content
            part = content.as_numpy_array().view(np.uint8)
            asked = -wanted.start if wanted.start < 0 else (wanted.stop or 0) - wanted.start
            if len(part) > asked > 0:
                counts.append(
                    OSError("the server sends whole files where parts of them are asked for")
                )
                continue
            counts.append(len(part))
            parts.append(part)
            total += len(part)
        return Fetched(np.concatenate([np.empty(0, np.uint8), *parts]), starts, counts)

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
        content, _, (count,) = self.fetch([Range(file, start, stop)])
        if count is None:
            raise FileNotFoundError("there is no such file")
        if isinstance(count, Exception):
            raise count
        rest = content
        for buffer in buffers:
            given, rest = rest[: len(buffer)], rest[len(buffer) :]
            buffer[: len(given)] = given.data
        return count

    def close(self) -> None:
        """The store stays its owner's."""
