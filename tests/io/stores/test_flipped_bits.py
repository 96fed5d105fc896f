"""A bit that changes in a shard file is noticed, by this package and by every reader of Zarr."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from cellpatch_fast.errors import InputError
from cellpatch_fast.io import TokenStore
from cellpatch_fast.io.sources.tables import FrameTable
from cellpatch_fast.io.stores import embeddings
from cellpatch_fast.io.stores.embeddings import EmbeddingWriter
from cellpatch_fast.io.stores.obs import write_obs
from cellpatch_fast.loading.rows import TokenRows

from .token_files import CONTINUOUS, DISCRETE, make_cells, read_with_zarr, write_store

CHUNK, SHARD_CHUNKS = 211, 3  # entries and chunks: two shards, the second one with two chunks
CELLS = [101, 0, 307, 11, 223, 1, 300]
FLIPS = 67  # of each file


@contextlib.contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    content = file.read_bytes()
    byte, place = bit // 8, bit % 8
    changed = bytes([content[byte] ^ 1 << place])
    file.write_bytes(content[:byte] + changed + content[byte + 1 :])
    yield
    file.write_bytes(content)


def random_bits(file: Path) -> list[int]:
    """Bits of a file, wherever they are, and the first and the last one."""
    bits = 8 * file.stat().st_size
    return [0, bits - 1, *random.Random(file.name).sample(range(bits), FLIPS)]


def read_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Genes and values as the loader reads them."""
    with TokenStore(path) as store:
        rows = TokenRows(store.name, store.offsets, store.genes, store.values)
        tokens = np.empty(store.entries, store.genes.dtype)
        values = np.empty(store.entries, store.values.dtype)
        rows.part(np.arange(store.n_cells)).write(tokens, values)
        return tokens, values


@pytest.mark.parametrize("continuous", [False, True])
def test_any_bit_of_a_token_store_is_refused_with_shard_and_cells_named(
    tmp_path: Path, continuous: bool
) -> None:
    path = tmp_path / "tokens.zarr"
    preprocessing = CONTINUOUS if continuous else DISCRETE
    cells = make_cells(CELLS, preprocessing)
    write_store(path, cells, preprocessing, chunk_entries=CHUNK, shard_chunks=SHARD_CHUNKS)
    offsets, size = cells.offsets.numpy(), CHUNK * SHARD_CHUNKS
    read_all(path)
    for array in ("genes", "values"):
        for shard in (0, 1):
            file = path / array / "c" / str(shard)
            first = int(np.searchsorted(offsets, shard * size, side="right")) - 1
            end = int(np.searchsorted(offsets, (shard + 1) * size, side="left"))
            last = min(end, len(CELLS)) - 1
            for bit in random_bits(file):
                with flipped(file, bit), pytest.raises(InputError) as caught:
                    read_all(path)
                named = re.fullmatch(
                    rf"{path}: cannot read cells (\d+)(?: to (\d+))?, stored in the chunk file "
                    rf"{array}/c/{shard} .*checksum.*\. .*copy or download it again\.",
                    str(caught.value),
                )
                assert named, str(caught.value)
                low, high = int(named[1]), int(named[2] or named[1])
                assert first <= low <= high <= last, (bit, named[0])
    tokens, values = read_all(path)
    assert np.array_equal(tokens, cells.genes.numpy())
    assert np.array_equal(values, cells.values.numpy().astype(values.dtype))


@pytest.mark.parametrize("key", ["genes", "values"])
def test_zarr_python_refuses_it_too(tmp_path: Path, key: str) -> None:
    path = tmp_path / "tokens.zarr"
    write_store(path, make_cells(CELLS), chunk_entries=CHUNK, shard_chunks=SHARD_CHUNKS)
    with flipped(path / key / "c" / "0", 131), pytest.raises(ValueError, match="checksum"):
        read_with_zarr(path, key)


@pytest.mark.parametrize("key", ["offsets", "measured"])
def test_bits_of_the_small_arrays_are_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "tokens.zarr"
    write_store(path, make_cells(CELLS), chunk_entries=CHUNK, shard_chunks=SHARD_CHUNKS)
    (file,) = (file for file in (path / key / "c").rglob("*") if file.is_file())
    for bit in random_bits(file)[:23]:
        refused = pytest.raises(InputError, match=rf"cannot read {key}.*checksum")
        with flipped(file, bit), refused, TokenStore(path) as store:
            store.measured()


def test_any_bit_of_an_embedding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By anndata, and with shard and cells named by the writer, which reads probabilities."""
    rows, width, key = 53, 11, "X_cellpatch"
    monkeypatch.setattr(embeddings, "CHUNK_ROWS", 5)
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 10 * width * 4)  # 10 rows
    features = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    obs = pd.DataFrame(index=[f"c{row}" for row in range(rows)])
    output = tmp_path / "out.zarr"
    with EmbeddingWriter(output, {}, rows, {key: width}, np.dtype("float32")) as writer:
        writer.prepare(lambda root: write_obs(root, [FrameTable(obs)], ["one"]))
        for shard in writer.missing:
            writer.write(shard, {key: features[slice(*writer.bounds(shard))]}, {})
        file = writer.store / "obsm" / key / "c" / "2" / "0"
        for bit in random_bits(file):
            with flipped(file, bit), pytest.raises(InputError) as caught:
                writer.read(key, 7, 41)
            found = re.match(
                rf"{writer.store}: cannot read rows (\d+) to (\d+) of obsm/{key}, stored in the "
                rf"chunk file obsm/{key}/c/2/0",
                str(caught.value),
            )
            assert found, str(caught.value)
            assert 20 <= int(found[1]) <= int(found[2]) <= 29
        assert np.array_equal(writer.read(key, 7, 41), features[7:41])
        writer.finish()
    file = output / "obsm" / key / "c" / "2" / "0"
    for bit in random_bits(file)[:13]:
        with flipped(file, bit), pytest.raises(ValueError, match="checksum"):
            anndata.read_zarr(output)
    assert np.array_equal(anndata.read_zarr(output).obsm[key], features)
