"""Zarr stores behind an address: https://, s3://, gs:// and whatever else fsspec knows.

zarr-python's own fsspec store reads them. Web servers cannot list what they have: there, each
chunk that is read by zarr-python is asked for when the store is opened, since a missing one
would be zeros; for what `chunks_zarr` reads, a missing one is an error when it is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from .arrays import chunk_positions

if TYPE_CHECKING:
    import zarr
    from zarr.storage import FsspecStore

WEB = ("http", "https")
SILENCE = 60  # seconds without a byte after which a web server is given up
QUESTIONS = 64  # that a store is asked at a time


def open_group(address: str) -> tuple[zarr.Group, Callable[[], None]]:
    """The root group of a store, and what closes it.

    Raises
    ------
    InputError
        If a package is missing for this kind of address.
    Exception
        Whatever the libraries below raise if it cannot be read.
    """
    import zarr
    from zarr.core.sync import sync
    from zarr.storage import FsspecStore

    protocol = address.split("://")[0]
    try:
        import fsspec

        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise InputError(
            f"{address}: reading from {protocol}:// needs a package that is not installed "
            f"({error}). Run: pip install 'cellpatch-fast[cloud]'"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{address}: {protocol}:// is no kind of address that can be read. Give a path, or "
            f"an address that starts with https://, s3:// or gs://."
        ) from error
    store = FsspecStore.from_url(address, storage_options=_options(protocol), read_only=True)

    def close() -> None:
        store.close()
        if protocol in WEB:  # the others' file systems see to that themselves
            sync(_close_session(store))

    try:
        return zarr.open_group(store, mode="r"), close
    except BaseException:
        close()
        raise


def _options(protocol: str) -> dict[str, Any]:
    """Each store has its own connections, so that it can close them."""
    if protocol not in WEB:
        return {"skip_instance_cache": True}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    return {"skip_instance_cache": True, "client_kwargs": {"timeout": timeout}}


async def _close_session(store: FsspecStore) -> None:
    session = await store.fs.set_session()
    await session.close()


def present_keys(array: zarr.Array[Any], thorough: bool) -> set[str] | None:
    """The chunk files of ``array`` that its store has, relative to it.

    None if the store cannot list its files, and a missing one is noticed when it is read; unless
    ``thorough``, which asks for each.
    """
    from zarr.core.sync import sync

    from ..chunks.zarr import zarr_chunks

    if not set(WEB) & set(_protocols(array.store)):
        return set(sync(_listed(array)))
    if not thorough and zarr_chunks(array) is not None:
        return None
    keys = [array.metadata.encode_chunk_key(position) for position in chunk_positions(array)]
    answers = sync(_ask(array.store.exists, [f"{array.path}/{key}" for key in keys]))
    return {key for key, there in zip(keys, answers, strict=True) if there}


def _protocols(store: Any) -> Sequence[str]:
    protocol = store.fs.protocol
    return [protocol] if isinstance(protocol, str) else protocol


async def _listed(array: zarr.Array[Any]) -> list[str]:
    prefix = f"{array.path}/"
    return [key.removeprefix(prefix) async for key in array.store.list_prefix(prefix)]


async def _ask(question: Callable[[str], Any], keys: Iterable[str]) -> list[Any]:
    """The answers to a question about each key, several asked at a time."""
    free = asyncio.Semaphore(QUESTIONS)

    async def one(key: str) -> Any:
        async with free:
            return await question(key)

    return await asyncio.gather(*(one(key) for key in keys))
