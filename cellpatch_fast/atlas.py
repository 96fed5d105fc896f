"""Embed any number of cells: files in, one embedding store out, resumable at any moment.

Cells are read once, in file order, in bounded memory; the rows of the result are those of the
inputs, one after the other. A cell's embedding depends on the cell alone, so shards, batches and
interruptions leave no trace in it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from .embedding import Embedder
from .errors import InputError
from .io.embeddings import (
    EmbeddingWriter,
    differences,
    finished_settings,
    remove,
)
from .io.sources import open_source
from .loader import CellStream
from .model.storage import fingerprint
from .progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from .detect import Expected
    from .io.sources import CellSource
    from .model import CellPatch
    from .model.encoder import Pool

logger = logging.getLogger("cellpatch_fast")

KEY = "X_cellpatch"
SOURCE_COLUMN = "cellpatch_input"  # of obs, where there are several inputs


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Parameters
    ----------
    output
        The finished store.
    cells
        Cells in it; ``embedded`` of them were computed by this run, the others by an earlier,
        interrupted one (or all, where the store was finished already).
    genes_matched, genes_unknown
        Genes of the inputs that the model's vocabulary has and lacks, summed over inputs.
    unknown_entries
        Non-zero entries dropped because of unknown genes.
    empty_cells
        Cells without any known gene.
    seconds
        From the first cell read to the last one written.
    """

    output: Path
    cells: int
    embedded: int
    genes_matched: int
    genes_unknown: int
    unknown_entries: int
    empty_cells: int
    seconds: float

    def __str__(self) -> str:
        if not self.embedded:
            return f"{self.output} is complete already: {self.cells:,} cells, nothing to do"
        earlier = self.cells - self.embedded
        resumed = f" ({earlier:,} of them earlier)" if earlier else ""
        return (
            f"{self.output}: {self.cells:,} cells{resumed}, {self.genes_matched:,} genes matched, "
            f"{self.genes_unknown:,} unknown, {self.empty_cells:,} empty cells, "
            f"{self.embedded / self.seconds:,.0f} cells/s"
        )


def embed(
    inputs: str | Path | Sequence[str | Path],
    model: CellPatch | str | Path,
    output: str | Path,
    *,
    layer: str | None = None,
    use_raw: bool = False,
    gene_column: str | None = None,
    expected: Expected = "auto",
    pool: Pool = "flatten",
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int | None = None,
    backend: str | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Summary:
    """Embed the cells of files into an embedding store.

    Parameters
    ----------
    inputs
        AnnData files (``.h5ad``, ``.zarr``) or 10x output; their cells follow each other in the
        store.
    model
        A `CellPatch`, a model directory, or the name of a model on the Hugging Face hub.
    output
        The store to make: an AnnData Zarr store with ``obs`` and ``obsm["X_cellpatch"]``.
        Until it is complete it is called ``OUTPUT.partial``; running the same again finishes it.
    layer, use_raw, gene_column, expected, pool, batch_size, backend, device, progress
        As in `tl.embed`.
    dtype
        Of the stored embedding.
    overwrite
        Delete what is at ``output`` first.

    Returns
    -------
    Summary
        Counts and speed; its text is one line.

    Raises
    ------
    InputError
        If an input or the model cannot be used, the output exists, or unfinished work there was
        begun with other settings.
    """
    paths = [Path(inputs)] if isinstance(inputs, str | Path) else [Path(path) for path in inputs]
    if not paths:
        raise InputError("no input was given")
    if dtype not in ("float32", "float16"):
        raise InputError(f"unknown dtype {dtype!r}: choose float32 or float16")
    output = Path(output)
    embedder = Embedder(model, pooling=pool, batch_size=batch_size, backend=backend, device=device)
    with ExitStack() as opened:
        sources = [
            opened.enter_context(open_source(path, layer=layer, use_raw=use_raw)) for path in paths
        ]
        streams = [_stream(source, embedder, gene_column, expected) for source in sources]
        settings = {
            "model": fingerprint(embedder.model),
            "vocabulary": embedder.model.vocabulary.fingerprint,
            "inputs": [str(path.resolve()) for path in paths],
            "input contents": [source.fingerprint() for source in sources],
            "input kinds": [stream.detected.kind for stream in streams],
            "layer": layer or "",
            "use_raw": use_raw,
            "gene_column": gene_column or "",
            "pool": pool,
            "dtype": dtype,
            "backend": embedder.backend,
        }
        cells = sum(source.n_cells for source in sources)
        matched = sum(stream.match.matched for stream in streams)
        unknown = sum(len(stream.match.unknown) for stream in streams)
        if overwrite:
            remove(output)
        if output.exists():
            _require_same(output, settings)
            return Summary(output, cells, 0, matched, unknown, 0, 0, 0.0)
        with _Run(output, settings, cells, embedder, np.dtype(dtype)) as run:
            run.write_obs(sources, paths)
            with progress_bar(cells, "embedding", progress, done=run.cells_done()) as bar:
                embedded, started = 0, time.perf_counter()
                for rows in run.embed(streams):
                    embedded += rows
                    bar.update(rows)
            seconds = time.perf_counter() - started
            totals = run.finish()
    return Summary(output, cells, embedded, matched, unknown, *totals, seconds)


def _stream(
    source: CellSource, embedder: Embedder, gene_column: str | None, expected: Expected
) -> CellStream:
    model = embedder.model
    stream = CellStream(
        source, model.vocabulary, model.config, gene_column=gene_column, expected=expected
    )
    logger.info("%s: %s; %s", source.name, stream.match, stream.detected.reason)
    return stream


def _require_same(output: Path, settings: dict[str, object]) -> None:
    """Refuse an output that is not what this run would make."""
    before = finished_settings(output)
    if before is None:
        raise InputError(
            f"{output} exists and is not an embedding store; choose another output, or replace "
            "it with --overwrite (overwrite=True)"
        )
    if before != settings:
        raise InputError(
            f"{output} exists and was made with other settings; choose another output, or "
            f"replace it with --overwrite (overwrite=True).{differences(before, settings)}"
        )


class _Run:
    """One run: computes the shards that are missing and writes them behind the computation."""

    def __init__(
        self,
        output: Path,
        settings: dict[str, object],
        cells: int,
        embedder: Embedder,
        dtype: np.dtype[np.floating],
    ) -> None:
        self._dtype = dtype
        self._writer = EmbeddingWriter(output, settings, cells, embedder.width, dtype, KEY)
        self._embedder = embedder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cellpatch-write")
        self._writing: Future[None] | None = None

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(wait=True)
        self._writer.close()

    def cells_done(self) -> int:
        writer = self._writer
        return sum(self._bounds(shard)[1] - self._bounds(shard)[0] for shard in writer.done)

    def write_obs(self, sources: list[CellSource], paths: list[Path]) -> None:
        """Write obs before anything is computed, so that what is wrong with it shows early."""
        if not self._writer.has_obs():
            self._writer.write_obs(_concatenated_obs(sources, paths))

    def embed(self, streams: list[CellStream]) -> Iterator[int]:
        """Compute and write all missing shards; yields numbers of cells done."""
        missing = [s for s in range(self._writer.shards) if s not in self._writer.done]
        blocks = self._embedder.run(
            part for shard in missing for part in _parts(streams, *self._bounds(shard))
        )
        with contextlib.closing(blocks):
            for shard in missing:
                start, stop = self._bounds(shard)
                rows = np.empty((stop - start, self._embedder.width), self._dtype)
                filled, record = 0, {"unknown": 0, "empty": 0}
                while filled < len(rows):  # a block never crosses the end of a shard
                    block = next(blocks)
                    rows[filled : filled + len(block.rows)] = block.rows
                    filled += len(block.rows)
                    record["unknown"] += block.unknown_entries
                    record["empty"] += block.empty_cells
                    yield len(block.rows)
                self._wait()
                self._writing = self._thread.submit(self._writer.write, shard, rows, record)
        self._wait()

    def finish(self) -> tuple[int, int]:
        """Complete the store; the totals of unknown entries and empty cells."""
        records = self._writer.done.values()
        unknown, empty = (sum(record[name] for record in records) for name in ("unknown", "empty"))
        self._writer.finish()
        return unknown, empty

    def _bounds(self, shard: int) -> tuple[int, int]:
        rows = self._writer.shard_rows
        return shard * rows, min((shard + 1) * rows, self._writer.rows)

    def _wait(self) -> None:
        """Until the last shard is written; raises what went wrong there."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None


def _parts(
    streams: list[CellStream], start: int, stop: int
) -> Iterator[tuple[CellStream, int, int]]:
    """The rows ``start : stop`` of all streams together, as ranges of each."""
    for stream in streams:
        cells = stream.source.n_cells
        first, last = max(start, 0), min(stop, cells)
        if first < last:
            yield stream, first, last
        start, stop = start - cells, stop - cells


def _concatenated_obs(sources: list[CellSource], paths: list[Path]) -> pd.DataFrame:
    """obs of all inputs, one after the other; several inputs are told apart by a column."""
    if len(sources) == 1:
        return sources[0].read_obs()
    from anndata import AnnData, concat

    return concat(
        [AnnData(obs=source.read_obs()) for source in sources],
        join="outer",
        label=SOURCE_COLUMN,
        keys=[str(path) for path in paths],
    ).obs
