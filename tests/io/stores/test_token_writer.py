"""The token writer: what any Zarr reader reads, each shard written once, always resumable."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellpatch_fast import RaggedCells
from cellpatch_fast.errors import InputError
from cellpatch_fast.io import TokenStore
from cellpatch_fast.io.stores import token_writer
from cellpatch_fast.io.stores.embeddings import EmbeddingWriter
from cellpatch_fast.io.stores.partial import JOURNAL, partial_of
from cellpatch_fast.io.stores.token_writer import LENGTHS

from ...conftest import tree
from .token_files import (
    CHUNK,
    CONTINUOUS,
    DISCRETE,
    LARGE_VOCABULARY,
    SHARD_CHUNKS,
    VOCABULARY,
    append,
    make_cells,
    open_writer,
    read_chunks,
    read_with_zarr,
    write_store,
)

SHARD = CHUNK * SHARD_CHUNKS
# empty cells at the ends and in a row, cells that end with a chunk and a shard, one over 3 shards
LENGTHS_OF_CELLS = [0, 5, 2, 14, 0, 0, 71, 1, 3, 13, 40, 6, 0, 9, 11, 30, 8, 0]
CELLS = make_cells(LENGTHS_OF_CELLS)
SHARDS = sum(LENGTHS_OF_CELLS) // SHARD


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "tokens.zarr"


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    write_store(tmp_path / "uninterrupted.zarr", CELLS)
    return tree(tmp_path / "uninterrupted.zarr")


def assert_holds(path: Path, cells: RaggedCells) -> None:
    """Our reader and zarr-python find these cells."""
    values = cells.values.numpy()
    values = values if values.dtype == np.uint8 else values.astype(np.float16)
    expected = {"offsets": cells.offsets.numpy(), "genes": cells.genes.numpy(), "values": values}
    for key, wanted in expected.items():
        assert np.array_equal(read_with_zarr(path, key), wanted), key
    with TokenStore(path) as store:
        assert (store.n_cells, store.entries) == (len(cells), cells.entries)
        assert np.array_equal(store.offsets, expected["offsets"])
        assert np.array_equal(read_chunks(store.genes), expected["genes"])
        assert np.array_equal(read_chunks(store.values), expected["values"])


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=19),
    chunk=st.integers(1, 13),
    shard_chunks=st.integers(1, 5),
    discrete=st.booleans(),
    data=st.data(),
)
def test_cells_come_back_whatever_the_sizes(
    lengths: list[int], chunk: int, shard_chunks: int, discrete: bool, data: st.DataObject
) -> None:
    preprocessing = DISCRETE if discrete else CONTINUOUS
    cells = make_cells(lengths, preprocessing)
    ends = sorted(data.draw(st.sets(st.integers(1, len(lengths))), label="ends") | {len(lengths)})
    with TemporaryDirectory() as folder:
        output = Path(folder) / "tokens.zarr"
        counts = write_store(
            *(output, cells, preprocessing, VOCABULARY, ends),
            chunk_entries=chunk,
            shard_chunks=shard_chunks,
        )
        assert counts == {
            "entries": cells.entries,
            "unknown_entries": 2 * len(lengths),
            "empty_cells": lengths.count(0),
        }
        assert_holds(output, cells)


@pytest.mark.parametrize("lengths", [[0, 0, 0], [SHARD], [CHUNK, 0], [2 * SHARD, SHARD - CHUNK]])
def test_ends_that_meet(output: Path, lengths: list[int]) -> None:
    """No entries at all; a full last shard; a full last chunk."""
    cells = make_cells(lengths)
    write_store(output, cells)
    assert_holds(output, cells)
    shards = output / "genes" / "c"
    assert (len(list(shards.iterdir())) if shards.exists() else 0) == -(-cells.entries // SHARD)


def test_full_size_chunks(output: Path) -> None:
    """The sizes that users get, with a cell that is longer than a chunk."""
    cells = make_cells([70_001, 0, 3, 61_000])
    write_store(
        *(output, cells),
        chunk_entries=token_writer.CHUNK_ENTRIES,
        shard_chunks=token_writer.SHARD_CHUNKS,
    )
    assert_holds(output, cells)
    with TokenStore(output) as store:
        assert store.genes.chunk == token_writer.CHUNK_ENTRIES


def test_tokens_beyond_16_bits(output: Path) -> None:
    cells = make_cells([5, 0, 33], size=LARGE_VOCABULARY.size)
    write_store(output, cells, vocabulary=LARGE_VOCABULARY)
    assert_holds(output, cells)
    with TokenStore(output) as store:
        assert store.genes.dtype == np.uint32
        assert store.vocabulary_size == 66_001


def test_batches_leave_no_trace(output: Path, expected: dict[str, bytes]) -> None:
    write_store(output, CELLS, ends=range(1, len(CELLS) + 1))
    assert tree(output) == expected


def test_threads_leave_no_trace(output: Path, expected: dict[str, bytes]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        write_store(output, CELLS)
    finally:
        torch.set_num_threads(before)
    assert tree(output) == expected


def test_nothing_is_called_finished_before_it_is(output: Path) -> None:
    with open_writer(output, len(CELLS)) as writer:
        append(writer, CELLS, [3, 17])
        with pytest.raises(ValueError, match="not complete"):
            writer.finish()
        with pytest.raises(ValueError, match="2 cells after 17 of 18"):
            writer.append(CELLS.slice(0, 2))
    assert not output.exists()


def test_value_that_float16_cannot_hold_is_refused(output: Path) -> None:
    cells = make_cells([2, 0, 5, 3], CONTINUOUS)
    cells.values[4] = 65_504  # the largest one that it can
    write_store(output, cells, CONTINUOUS)
    assert_holds(output, cells)
    cells.values[5] = 70_000
    with (
        open_writer(output, 4, CONTINUOUS, overwrite=True) as writer,
        pytest.raises(InputError, match=r"cell 2 .* the value 70000, .* up to 65,504"),
    ):
        writer.append(cells)


@pytest.mark.parametrize("seed", range(5))
def test_interrupted_run_goes_on(output: Path, expected: dict[str, bytes], seed: int) -> None:
    """Interrupted three times after any cell, with other batches each time."""
    chance = random.Random(seed)
    for _ in range(3):
        with open_writer(output, len(CELLS)) as writer:
            begun, kept = writer.next_cell, len(writer._shards)
            reach = chance.randint(begun, len(CELLS))
            cuts = sorted(chance.sample(range(begun, reach + 1), min(3, reach - begun + 1)))
            append(writer, CELLS, cuts)
            entries = int(CELLS.offsets[writer.next_cell])
            while writer._encoding:  # as if the threads had been quick
                writer._write_chunk()
            writer._wait_for_shard()
            assert len(writer._shards) == max(kept, entries // SHARD)
    assert write_store(output, CELLS) == {"entries": 213, "unknown_entries": 36, "empty_cells": 5}
    assert tree(output) == expected
    assert not partial_of(output).exists()


def test_whole_shards_are_not_written_again(output: Path) -> None:
    with open_writer(output, len(CELLS)) as writer:
        append(writer, CELLS, [4, 9, 12])  # the second and third batch cross borders of shards
        while writer._encoding:
            writer._write_chunk()
    shards = sorted((writer.store / "genes" / "c").iterdir())
    assert len(shards) == 8
    times = [shard.stat().st_mtime_ns for shard in shards[:-1]]
    with open_writer(output, len(CELLS)) as writer:
        assert writer.next_cell == writer.kept_cells == 9
        append(writer, CELLS, [18])
        writer.finish()
    after = [output / "genes" / "c" / shard.name for shard in shards[:-1]]
    assert [shard.stat().st_mtime_ns for shard in after] == times


@pytest.mark.parametrize("array", ["genes", "values"])
@pytest.mark.parametrize("damage", ["gone", "cut", "lengths"])
def test_damaged_shard_is_written_again(
    output: Path, expected: dict[str, bytes], damage: str, array: str
) -> None:
    with open_writer(output, len(CELLS)) as writer:
        append(writer, CELLS, range(1, 16))
        while writer._encoding:
            writer._write_chunk()
    shard, lengths = writer.store / array / "c" / "3", writer.work / LENGTHS
    if damage == "gone":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        lengths.write_bytes(lengths.read_bytes()[: 4 * 6 + 1])
    with open_writer(output, len(CELLS)) as writer:
        assert writer.kept_cells == 6  # cell 6 fills the shards 1 to 3
        assert len(writer._shards) == 3 + (damage == "lengths")
        append(writer, CELLS, [18])
        writer.finish()
    assert tree(output) == expected


def test_other_settings_do_not_continue(output: Path) -> None:
    open_writer(output, 3).close()
    with pytest.raises(InputError, match=r"other settings.*\n  layer: was 'counts', is now 'raw'"):
        open_writer(output, 3, settings={"layer": "raw"})
    open_writer(output, 3, settings={"layer": "raw"}, overwrite=True).close()


def test_unfinished_embeddings_are_not_continued_as_tokens(output: Path) -> None:
    EmbeddingWriter(output, {"layer": "counts"}, 3, {"X": 2}, np.dtype("float32")).close()
    with pytest.raises(
        InputError, match="kind: was 'embedding store', is now 'token store'"
    ) as caught:
        open_writer(output, 3)
    assert len(str(caught.value).splitlines()) == 2


def test_second_writer_is_refused(output: Path) -> None:
    with (
        open_writer(output, 3),
        pytest.raises(InputError, match="another process is writing there"),
    ):
        open_writer(output, 3, overwrite=True)
    open_writer(output, 3).close()


def test_sizes_of_unfinished_work_are_kept(output: Path) -> None:
    """A shard's place depends on them."""
    with open_writer(output, len(CELLS)) as writer:
        append(writer, CELLS, [9])
    write_store(output, CELLS, chunk_entries=CHUNK + 4, shard_chunks=1)
    with TokenStore(output) as store:
        assert store.genes.chunk == CHUNK
    assert_holds(output, CELLS)


def test_damaged_journal(output: Path) -> None:
    open_writer(output, 3).close()
    journal = partial_of(output) / JOURNAL
    content = json.loads(journal.read_text())
    del content["done"]["shards"]
    journal.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"cannot read the unfinished store .*start anew"):
        open_writer(output, 3)


def test_no_thread_stays_behind(output: Path) -> None:
    with open_writer(output, len(CELLS)) as writer:
        append(writer, CELLS, [9])
    names = {thread.name.rsplit("_", 1)[0] for thread in threading.enumerate()}
    assert not names & {"cellpatch-encode", "cellpatch-write"}
