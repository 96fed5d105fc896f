"""Stream a source's cells as ragged batches, reading ahead of the consumer.

One thread reads and tokenises the next block while the consumer computes on the current one.
Every block is made from its cells alone, so where blocks begin and end changes nothing but
memory and speed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .tokens import Preprocessing, detect_input, tokenize

if TYPE_CHECKING:
    from .cells import RaggedCells
    from .config import CellPatchConfig
    from .detect import Expected
    from .genes import GeneVocabulary
    from .io.sources import CellBlock, CellSource

T = TypeVar("T")

SAMPLE_CELLS = 2_000  # cells that the kind of a matrix is told from
MAX_CELLS = 8_192  # of a block: its features take 20 MiB at the paper's sizes
MAX_ENTRIES = 1 << 22  # of a block: 4 million take some 80 MB on their way to tokens


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """Consecutive cells of a source.

    Parameters
    ----------
    start
        Position of the first cell in the source.
    cells
        The cells.
    unknown_entries
        Non-zero entries dropped because the vocabulary lacks their gene.
    empty_cells
        Cells without any entry.
    """

    start: int
    cells: RaggedCells
    unknown_entries: int
    empty_cells: int


class CellStream:
    """A source's cells, prepared for a model.

    Parameters
    ----------
    source
        Where the cells come from.
    vocabulary, config
        The model's.
    gene_column
        Column of var that holds the gene names; None finds the one that fits best.
    input
        What the matrix holds: ``"counts"``, ``"lognorm"``, or ``"auto"`` to find out.

    Attributes
    ----------
    match
        How the source's genes were matched, a `GeneMatch`.
    detected
        What the matrix holds, and why we think so.

    Raises
    ------
    InputError
        If no gene matches, or the matrix is not what was expected.
    """

    def __init__(
        self,
        source: CellSource,
        vocabulary: GeneVocabulary,
        config: CellPatchConfig,
        *,
        gene_column: str | None = None,
        input: Expected = "auto",  # noqa: A002  (the name users know)
    ) -> None:
        self.source = source
        self.match = vocabulary.match_var(source.var, gene_column, source.name)
        self._preprocessing = Preprocessing.from_config(config)
        self._vocabulary_size = vocabulary.size
        self.detected = detect_input(
            sample_of(source),
            source.name,
            input,
            target_sum=config.target_sum,
            gene_names=source.var.index,
        )

    def blocks(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        max_cells: int = MAX_CELLS,
        max_entries: int = MAX_ENTRIES,
    ) -> Iterator[TokenBlock]:
        """The cells ``start : stop`` in order, each once, in blocks of limited size."""
        tokens = np.asarray(self.match.tokens)
        names = self.source.var.index
        for block in self.source.blocks(start, stop, max_cells=max_cells, max_entries=max_entries):
            made = tokenize(
                block,
                tokens,
                self._preprocessing,
                self.detected.kind,
                self._vocabulary_size,
                self.source.name,
                names,
            )
            yield TokenBlock(block.start, made.cells, made.unknown_entries, made.empty_cells)


def sample_of(source: CellSource) -> CellBlock:
    """The first cells of a source, enough to tell what its matrix holds."""
    return next(source.blocks(0, min(SAMPLE_CELLS, source.n_cells), max_entries=MAX_ENTRIES))


def read_ahead(
    parts: Iterable[tuple[CellStream, int, int]],
    *,
    max_cells: int = MAX_CELLS,
    max_entries: int = MAX_ENTRIES,
) -> Generator[TokenBlock]:
    """The blocks of ``(stream, start, stop)`` parts, one part after the other.

    A block never crosses the end of a part. Close the iterator to stop before the end.
    """
    return _ahead(
        block
        for stream, start, stop in parts
        for block in stream.blocks(start, stop, max_cells=max_cells, max_entries=max_entries)
    )


def _ahead(items: Iterator[T]) -> Generator[T]:
    """``items``, the next of which is made by a thread while the current one is used."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="cellpatch-read") as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item  # type: ignore[misc]
