"""From inputs to a finished embedding store, shard by shard: what `embed` and `annotate` share.

Shards are computed in order; while one is computed, the one before is written. The settings that
the content depends on are kept beside it, so that a run goes on only with what it was begun with.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..inference.embedder import Embedder
from ..io.stores.embeddings import ATTRIBUTE, EmbeddingWriter
from ..io.stores.obs import write_obs
from ..io.stores.partial import finished_counts, is_taken
from ..loading.inputs import describe_input
from ..model.storage import fingerprint
from ..progress import progress_bar
from .paths import input_paths, output_path
from .selection import Selection, selected
from .summary import Summary, gene_counts

if TYPE_CHECKING:
    from ..config import Reading
    from ..inference.embedder import EmbeddedCells
    from ..io.sources.tables import Table
    from ..loading.inputs import Stream

logger = logging.getLogger("cellpatch_fast")
KEY = "X_cellpatch"
PROBABILITIES = "cellpatch_probabilities"


def make_store(
    inputs: str | Path | Sequence[str | Path],
    embedder: Embedder,
    output: str | Path,
    *,
    reading: Reading,
    selection: Selection,
    widths: dict[str, int],
    dtype: str,
    overwrite: bool,
    progress: bool | None,
    extras: Mapping[str, Any] = {},
    begin: Callable[[Sequence[Table], Sequence[str]], None] = lambda tables, names: None,
    finish: Callable[[EmbeddingWriter], None] = lambda writer: None,
) -> Summary:
    """Make a store with the arrays of ``widths``, or the rest of one.

    Parameters
    ----------
    extras
        What the content depends on besides the embedder, the reading and the selection.
    begin, finish
        Called with obs of the chosen cells and the inputs' names, and with a store that has all
        its rows.
    """
    paths = input_paths(inputs)
    output = output_path(output, paths, EmbeddingWriter.KIND, ATTRIBUTE)
    if dtype not in ("float32", "float16"):
        raise InputError(f"unknown dtype {dtype!r}: choose float32 or float16")
    with ExitStack() as opened:
        streams = []
        for path in paths:
            stream = opened.enter_context(contextlib.closing(embedder.open(path, reading)))
            logger.info("%s", stream)
            streams.append(stream)
        tables, chosen = _chosen_obs(streams, selection)
        begin(tables, [stream.name for stream in streams])
        genes = gene_counts(streams)
        settings = {
            "model": fingerprint(embedder.model),
            "vocabulary": embedder.model.vocabulary.fingerprint,
            "inputs": [
                describe_input(path, stream) for path, stream in zip(paths, streams, strict=True)
            ],
            **reading.record(),
            **selection.record(chosen),
            "pool": embedder.pooling,
            "dtype": dtype,
            "backend": embedder.backend,
            "device": embedder.device.type,
            **extras,
            **genes,
        }
        cells = sum(map(len, tables))
        summary = Summary(output, cells, **genes)
        if is_taken(output) and not overwrite:
            return summary.counted(finished_counts(output, ATTRIBUTE, settings))
        with EmbeddingWriter(
            output, settings, cells, widths, np.dtype(dtype), overwrite=overwrite
        ) as writer:
            writer.prepare(lambda root: write_obs(root, tables, [str(path) for path in paths]))
            earlier, started = writer.rows_done, time.perf_counter()
            with (
                progress_bar(cells, "embedding", progress, done=earlier) as bar,
                contextlib.closing(_missing_shards(writer, embedder, streams, chosen)) as done,
            ):
                for rows in done:
                    bar.update(rows)
            seconds = time.perf_counter() - started
            finish(writer)
            counts = writer.finish()
    return replace(summary, computed=cells - earlier, seconds=seconds).counted(counts)


def _chosen_obs(
    streams: Sequence[Stream], selection: Selection
) -> tuple[list[Table], np.ndarray | None]:
    """Obs of the cells that are chosen, by inputs, and which these are; None if all are."""
    tables: list[Table] = [stream.obs_table() for stream in streams]
    chosen = selection.of(tables, [stream.name for stream in streams])
    if chosen is None:
        return tables, None
    logger.info("%s of %s cells are chosen", f"{len(chosen):,}", f"{sum(map(len, tables)):,}")
    return selected(tables, chosen), chosen


def _missing_shards(
    writer: EmbeddingWriter,
    embedder: Embedder,
    streams: list[Stream],
    chosen: np.ndarray | None,
) -> Generator[int]:
    """Compute all missing shards, writing each behind the next; yields numbers of cells done."""
    bounds = {shard: writer.bounds(shard) for shard in writer.missing}
    wanted: list[tuple[int, int]] | np.ndarray = list(bounds.values())  # of the inputs' cells
    if chosen is not None:
        parts_of_chosen = [chosen[start:stop] for start, stop in bounds.values()]
        wanted = np.concatenate([chosen[:0], *parts_of_chosen])
    with (
        ThreadPoolExecutor(1, thread_name_prefix="cellpatch-write") as thread,
        contextlib.closing(embedder.run(streams, wanted)) as batches,
    ):
        writing: Future[None] | None = None
        parts = _cut(batches, [stop - start for start, stop in bounds.values()])
        for shard, (start, stop) in bounds.items():
            blocks = {
                key: np.empty((stop - start, width), writer.dtype)
                for key, width in writer.widths.items()
            }
            counts = {"entries": 0, "unknown_entries": 0, "empty_cells": 0}
            filled = 0
            while filled < stop - start:
                cells = next(parts)
                computed = {KEY: cells.features, PROBABILITIES: cells.probabilities}
                for key, block in blocks.items():
                    rows = computed[key]
                    assert rows is not None
                    block[filled : filled + len(cells)] = _fitting(rows, writer.dtype)
                filled += len(cells)
                counts["entries"] += int(cells.entries.sum())
                counts["unknown_entries"] += int(cells.unknown_entries.sum())
                counts["empty_cells"] += int((cells.entries == 0).sum())
                yield len(cells)
            if writing is not None:
                writing.result()  # raises what went wrong there
            writing = thread.submit(writer.write, shard, blocks, counts)
        if writing is not None:
            writing.result()


def _cut(batches: Iterator[EmbeddedCells], sizes: list[int]) -> Iterator[EmbeddedCells]:
    """The cells of ``batches``, cut where the next of ``sizes`` is full as well."""
    ends = iter(np.cumsum(sizes).tolist())
    done, end = 0, next(ends, 0)
    for cells in batches:
        start = 0
        while start < len(cells):
            stop = min(len(cells), start + end - done)
            yield cells.slice(start, stop)
            done += stop - start
            start = stop
            if done == end:
                end = next(ends, 0)


def _fitting(features: np.ndarray, dtype: np.dtype[np.floating[Any]]) -> np.ndarray:
    """The features as ``dtype``, none of which may overflow."""
    with np.errstate(over="ignore"):
        rows = features.astype(dtype, copy=False)
    if dtype.itemsize < 4 and not np.isfinite(rows).all():
        raise InputError(
            f"the embedding has values up to {np.abs(features).max():.3g}, beyond what {dtype} "
            "holds: store it as float32 (--dtype)"
        )
    return rows
