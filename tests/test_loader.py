"""The loader delivers every cell once, in order, whatever the blocks, and leaves no thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellpatch_fast import CellPatch, InputError
from cellpatch_fast.cells import RaggedCells
from cellpatch_fast.io.sources import open_source
from cellpatch_fast.loader import CellStream, TokenBlock, read_ahead

from .conftest import GENES, MakeCells

CELLS = 211


@pytest.fixture(scope="module")
def stream(
    make_cells: MakeCells, small_model: CellPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CellStream]:
    path = tmp_path_factory.mktemp("loader") / "cells.h5ad"
    make_cells(CELLS).write_h5ad(path)
    with open_source(path) as source:
        yield CellStream(source, small_model.vocabulary, small_model.config)


def together(blocks: list[TokenBlock]) -> RaggedCells:
    return RaggedCells.concatenate([block.cells for block in blocks])


def same(found: RaggedCells, expected: RaggedCells) -> bool:
    return (
        torch.equal(found.offsets, expected.offsets)
        and np.array_equal(found.genes.numpy(), expected.genes.numpy())
        and torch.equal(found.values, expected.values)
    )


def reading_threads() -> list[str]:
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith("cellpatch-read")]


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    cuts=st.lists(st.integers(0, CELLS), max_size=3).map(lambda cuts: sorted({0, *cuts, CELLS})),
    max_cells=st.integers(1, 300),
    max_entries=st.integers(1, 20_000),
)
def test_every_cell_comes_once_and_in_order(
    stream: CellStream, cuts: list[int], max_cells: int, max_entries: int
) -> None:
    (whole,) = stream.blocks()
    parts = [(stream, a, b) for a, b in itertools.pairwise(cuts)]
    blocks = list(read_ahead(parts, max_cells=max_cells, max_entries=max_entries))
    assert same(together(blocks), whole.cells)
    starts = np.cumsum([0, *(len(block.cells) for block in blocks)])
    assert [block.start for block in blocks] == starts[:-1].tolist()
    assert set(cuts) <= set(starts.tolist())  # no block crosses the end of a part
    assert max(len(block.cells) for block in blocks) <= max_cells
    assert sum(block.unknown_entries for block in blocks) == whole.unknown_entries > 0
    assert sum(block.empty_cells for block in blocks) == whole.empty_cells == 1


def test_stream_says_what_it_found(stream: CellStream) -> None:
    assert stream.match.matched == GENES
    assert stream.match.unknown == ["unknown1", "unknown2", "ENSG99999999999"]
    assert stream.detected.kind == "counts"


def test_what_the_matrix_holds_is_checked_against_what_is_expected(
    stream: CellStream, small_model: CellPatch
) -> None:
    with pytest.raises(InputError, match="log-normalised values were expected"):
        CellStream(stream.source, small_model.vocabulary, small_model.config, input="lognorm")


def test_one_block_is_read_ahead_and_no_more(
    stream: CellStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory holds the block in use and the next one."""
    asked = []
    blocks = stream.source.blocks

    def counted(*arguments: int, **limits: int) -> Iterator[object]:
        for block in blocks(*arguments, **limits):
            asked.append(block.start)
            yield block

    monkeypatch.setattr(stream.source, "blocks", counted)
    used = 0
    for _ in read_ahead([(stream, 0, CELLS)], max_cells=10):
        used += 1
        assert len(asked) <= used + 1
    assert used == len(asked) == 22


def test_stopping_early_leaves_no_thread(stream: CellStream) -> None:
    blocks = read_ahead([(stream, 0, CELLS)], max_cells=5)
    assert next(blocks).start == 0
    assert reading_threads()
    blocks.close()
    assert not reading_threads()


def test_an_error_while_reading_reaches_the_consumer(
    make_cells: MakeCells,
    small_model: CellPatch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cellpatch_fast.loader.SAMPLE_CELLS", 100)  # the error is further on
    adata = make_cells(CELLS)
    adata.X.data[adata.X.indptr[150]] = -2
    path = tmp_path / "negative.h5ad"
    adata.write_h5ad(path)
    with open_source(path) as source:
        stream = CellStream(source, small_model.vocabulary, small_model.config)
        seen = 0
        with pytest.raises(InputError, match=r"cell 150 .*the value is -2"):  # noqa: PT012
            for block in read_ahead([(stream, 0, 100), (stream, 100, CELLS)], max_cells=25):
                seen += len(block.cells)
        assert seen == 150
    assert not reading_threads()
