"""A store behind an address is read like the folder it is a copy of, and its faults are named."""

from __future__ import annotations

import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
import zarr

from cellpatch_fast.errors import InputError, InputWarning
from cellpatch_fast.io.chunks import chunks_of
from cellpatch_fast.io.sources.matrices import CsrMatrix
from cellpatch_fast.io.sources.source import open_source
from cellpatch_fast.io.stores.tokens import TokenStore

from ..chunks.chunked import descriptors, failure, hammer
from ..conftest import CHUNK, SHARD
from ..stores.token_files import make_cells, read_chunks, write_store

pytest.importorskip("aiohttp")

Store = Callable[..., Path]

INDEX = 16 * SHARD // CHUNK + 4  # bytes


class Server(SimpleHTTPRequestHandler):
    """Serves a folder, with byte ranges, as web servers for data do."""

    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True
    broken: dict[str, int] = {}  # noqa: RUF012  (shared with the test on purpose)
    ranges = True
    silent = ""
    address: str
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Range')}")
        if self.silent and self.path.endswith(self.silent):
            time.sleep(1.5)
            self.close_connection = True
            return
        status = next((code for end, code in self.broken.items() if self.path.endswith(end)), 0)
        file = Path(self.translate_path(self.path))
        if status or not file.is_file():
            self.send_error(status or 404)
            return
        content = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.ranges:
            first, last = int(wanted[1] or 0), int(wanted[2] or len(content) - 1)
            if not wanted[1]:  # the last bytes
                first, last = max(0, len(content) - last), len(content) - 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", str(file.stat().st_mtime_ns))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[type[Server]]:
    """A server of ``tmp_path``; its ``address`` has no slash at its end."""

    class ThisServer(Server):
        broken: dict[str, int] = {}  # noqa: RUF012
        asked: list[str] = []  # noqa: RUF012

    class Listener(ThreadingHTTPServer):
        request_queue_size = 128  # connections that may come at once

    with Listener(("127.0.0.1", 0), partial(ThisServer, directory=tmp_path)) as http:
        ThisServer.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=[0.01])
        thread.start()
        yield ThisServer
        http.shutdown()
        thread.join()


@pytest.fixture
def published(stored: Store) -> Store:
    """``published(container, layout="csr")``: a store that the server has, as a folder."""

    def publish(container: str, layout: str = "csr") -> Path:
        path = stored(container, layout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(path)
        return path

    return publish


def assert_same(address: str, expected: Path) -> None:
    """All that a source gives is the same."""
    with open_source(address) as ours, open_source(expected) as theirs:
        facts = {"name": str(expected)}
        assert ours.describe() | facts == theirs.describe()
        pd.testing.assert_frame_equal(ours.var, theirs.var)
        pd.testing.assert_frame_equal(ours.read_obs(), theirs.read_obs())
        blocks = zip(
            ours.read_cells(max_entries=90), theirs.read_cells(max_entries=90), strict=True
        )
        for mine, other in blocks:
            for part in ("start", "indptr", "indices", "data"):
                np.testing.assert_array_equal(getattr(mine, part), getattr(other, part))


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("container", ["zarr-v2", "zarr-v3", "zarr-v3-sharded"])
def test_equal_to_the_folder(
    server: type[Server], published: Store, container: str, layout: str
) -> None:
    path = published(container, layout)
    before = descriptors()
    assert_same(f"{server.address}/{path.name}", path)
    patience = time.monotonic() + 20
    while descriptors() > before:  # the server's ends of the connections close by and by
        assert time.monotonic() < patience, "connections are left open"
        time.sleep(0.01)


def test_shards_are_read_in_parts(server: type[Server], published: Store) -> None:
    path = published("zarr-v3-sharded")
    with open_source(f"{server.address}/{path.name}") as source:
        assert isinstance(source.matrix, CsrMatrix)
        reader = chunks_of(source.matrix.data)
        expected = np.asarray(zarr.open_array(path / "X/data", mode="r")[:])
        server.asked.clear()
        hammer(reader, expected)
    indices = [request for request in server.asked if request.endswith(f"bytes=-{INDEX}")]
    assert len(indices) == -(-len(expected) // SHARD)  # once for each shard


def test_token_store(server: type[Server], tmp_path: Path) -> None:
    write_store(tmp_path / "tokens.zarr", make_cells([3, 0, 71, 5, 13]))
    with (
        TokenStore(f"{server.address}/tokens.zarr") as far,
        TokenStore(tmp_path / "tokens.zarr") as near,
    ):
        assert far.fingerprint() == near.fingerprint()
        np.testing.assert_array_equal(far.offsets, near.offsets)
        np.testing.assert_array_equal(far.measured(), near.measured())
        np.testing.assert_array_equal(read_chunks(far.genes), read_chunks(near.genes))
        np.testing.assert_array_equal(read_chunks(far.values), read_chunks(near.values))
        pd.testing.assert_frame_equal(far.read_obs(), near.read_obs())
        server.broken["/genes/c/2"] = 500
        assert "genes/c/2" in failure(far.genes, [6, 7]).place


def message_of(address: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught, open_source(address, **options) as source:
        for _ in source.read_cells(max_entries=50):
            pass
    message = str(caught.value)
    assert address in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("status", [404, 500, 403])
@pytest.mark.parametrize("part", ["indices", "data"])
@pytest.mark.parametrize(
    ("container", "file"), [("zarr-v2", "3"), ("zarr-v3", "c/3"), ("zarr-v3-sharded", "c/1")]
)
def test_chunk_that_the_server_refuses(
    server: type[Server], published: Store, container: str, file: str, part: str, status: int
) -> None:
    path = published(container)
    server.broken[f"/X/{part}/{file}"] = status
    message = message_of(f"{server.address}/{path.name}")
    assert f"the chunk file X/{part}/{file}" in message
    assert "cannot read cells" in message
    assert "Check the address" in message
    assert ("no such file" if status == 404 else str(status)) in message


@pytest.mark.parametrize("status", [404, 500])
def test_offsets_and_names_that_the_server_refuses(
    server: type[Server], published: Store, status: int
) -> None:
    path = published("zarr-v3")
    for key in ("X/indptr/c/0", "obs/_index/c/0", "var/_index/c/0"):
        server.broken = {key: status}
        message_of(f"{server.address}/{path.name}")


def test_chunk_of_a_dense_matrix_that_is_missing(server: type[Server], published: Store) -> None:
    """It may be a chunk of zeros that the writer left out, so reading goes on, with a warning."""
    path = published("zarr-v3", "dense")
    (path / "X/c/2/1").unlink()
    with pytest.warns(InputWarning, match="1 chunks .* are not stored"):
        assert_same(f"{server.address}/{path.name}", path)


def test_server_that_sends_whole_files_only(server: type[Server], published: Store) -> None:
    path = published("zarr-v3-sharded")
    server.ranges = False
    assert "the server sends whole files" in message_of(f"{server.address}/{path.name}")


def test_server_that_falls_silent(
    server: type[Server], published: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellpatch_fast.io.sources.remote.SILENCE", 0.5)
    path = published("zarr-v3")
    server.silent = "/X/data/c/3"
    message = message_of(f"{server.address}/{path.name}")
    assert "the chunk file X/data/c/3" in message
    assert "imeout" in message


def test_nothing_at_the_address(server: type[Server], tmp_path: Path) -> None:
    assert "cannot read the Zarr store" in message_of(f"{server.address}/nowhere.zarr")
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    assert "holds no obs and var" in message_of(f"{server.address}/other.zarr")


def test_nobody_at_the_address(server: type[Server]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/cells.zarr"
    assert "cannot read the Zarr store" in message_of(address)


def test_package_that_an_address_needs_is_missing() -> None:
    fsspec.register_implementation("absent", "package_that_is_not_there.FileSystem", clobber=True)
    message = message_of("absent://bucket/cells.zarr")
    assert "pip install 'cellpatch-fast[cloud]'" in message
    assert "absent://" in message


def test_unknown_kind_of_address() -> None:
    assert "https://, s3:// or gs://" in message_of("carrier-pigeon://bucket/cells.zarr")


@pytest.mark.parametrize("container", ["zarr-v2", "zarr-v3"])
def test_fingerprint_changes_with_the_content(
    server: type[Server], published: Store, container: str
) -> None:
    path = published(container)
    address = f"{server.address}/{path.name}"

    def fingerprint() -> str:
        with open_source(address) as source:
            return source.fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    with open_source(path) as near:
        assert near.fingerprint() == before
    codes = zarr.open_array(path / "obs/kind/codes")
    codes[7] = 1 - int(np.asarray(codes[7]))
    changed = fingerprint()
    assert changed != before
    zarr.open_array(path / "X/data")[11] = 97
    assert fingerprint() not in (before, changed)
