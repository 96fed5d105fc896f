"""Embed any number of cells: files in, one embedding store out, resumable at any moment.

Cells are read once, in file order, in bounded memory; the rows of the result are those of the
inputs, one after the other. A cell's embedding depends on the cell alone, so shards, batches and
interruptions leave no trace in it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .embedding import Embedder
from .errors import InputError
from .io.embeddings import ATTRIBUTE, EmbeddingWriter
from .io.obs import write_obs
from .io.partial import finished_counts, is_taken
from .model.storage import fingerprint
from .paths import describe_input, input_paths, output_path
from .progress import progress_bar
from .tokenization import tokenize

if TYPE_CHECKING:
    import torch

    from .detect import Expected
    from .embedding import EmbeddedCells
    from .model import CellPatch
    from .model.encoder import Pool
    from .streams import Stream

logger = logging.getLogger("cellpatch_fast")

__all__ = ["Summary", "embed", "tokenize"]

KEY = "X_cellpatch"


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
    input: Expected = "auto",  # noqa: A002  (the name users know)
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
        store. Of several inputs, ``obs["cellpatch_input"]`` says which a cell comes from; a
        column of obs that only some have is missing in the others.
    model
        A `CellPatch`, a model directory, or the name of a model on the Hugging Face hub.
    output
        The store to make: an AnnData Zarr store with ``obs`` and ``obsm["X_cellpatch"]``.
        Until it is complete it is called ``OUTPUT.partial``; running the same again finishes it.
    layer, use_raw, gene_column, input, pool, batch_size, backend, device, progress
        As in `tl.embed`.
    dtype
        Of the stored embedding.
    overwrite
        Replace an embedding store at ``output`` once the new one is complete, and drop
        unfinished work that was begun with other settings. Anything else is never deleted.

    Returns
    -------
    Summary
        Counts and speed; its text is one line.

    Raises
    ------
    InputError
        If an input or the model cannot be used, the output exists, or unfinished work there was
        begun with other settings.
    OSError
        If the output cannot be written, a full disk for one. What is done is kept.

    Examples
    --------
    >>> cellpatch_fast.atlas.embed("atlas.h5ad", "my-model", "atlas.zarr")  # doctest: +SKIP
    >>> adata = anndata.read_zarr("atlas.zarr")  # doctest: +SKIP
    """
    paths = input_paths(inputs)
    output = output_path(output, paths, EmbeddingWriter.KIND, ATTRIBUTE)
    if dtype not in ("float32", "float16"):
        raise InputError(f"unknown dtype {dtype!r}: choose float32 or float16")
    embedder = Embedder(model, pooling=pool, batch_size=batch_size, backend=backend, device=device)
    with ExitStack() as opened:
        streams = []
        options: dict[str, Any] = {"layer": layer, "use_raw": use_raw}
        options |= {"gene_column": gene_column, "input": input}
        for path in paths:
            stream = opened.enter_context(contextlib.closing(embedder.open(path, **options)))
            logger.info("%s", stream)
            streams.append(stream)
        settings = {
            "model": fingerprint(embedder.model),
            "vocabulary": embedder.model.vocabulary.fingerprint,
            "inputs": [
                describe_input(path, stream) for path, stream in zip(paths, streams, strict=True)
            ],
            "layer": layer or "",
            "use_raw": use_raw,
            "gene_column": gene_column or "",
            "pool": pool,
            "dtype": dtype,
            "backend": embedder.backend,
            "device": embedder.device.type,
        }
        cells = sum(stream.n_cells for stream in streams)
        matched = sum(stream.genes_matched for stream in streams)
        unknown = sum(stream.genes_unknown for stream in streams)
        summary = Summary(output, cells, 0, matched, unknown, 0, 0, 0.0)
        if is_taken(output) and not overwrite:
            counts = finished_counts(output, ATTRIBUTE, settings)
            return _counted(summary, counts)
        shape = (cells, embedder.width)
        with EmbeddingWriter(
            output, settings, *shape, np.dtype(dtype), KEY, overwrite=overwrite
        ) as writer:
            tables = [stream.obs_table() for stream in streams]
            writer.prepare(lambda root: write_obs(root, tables, [str(path) for path in paths]))
            earlier, started = writer.rows_done, time.perf_counter()
            with (
                progress_bar(cells, "embedding", progress, done=earlier) as bar,
                contextlib.closing(_missing_shards(writer, embedder, streams)) as done,
            ):
                for rows in done:
                    bar.update(rows)
            seconds = time.perf_counter() - started
            counts = writer.finish()
    summary = replace(summary, embedded=cells - earlier, seconds=seconds)
    return _counted(summary, counts)


def _counted(summary: Summary, counts: dict[str, int]) -> Summary:
    return replace(
        summary, unknown_entries=counts["unknown_entries"], empty_cells=counts["empty_cells"]
    )


def _missing_shards(
    writer: EmbeddingWriter, embedder: Embedder, streams: list[Stream]
) -> Generator[int]:
    """Compute all missing shards, writing each behind the next; yields numbers of cells done."""
    bounds = {shard: writer.bounds(shard) for shard in writer.missing}
    with (
        ThreadPoolExecutor(1, thread_name_prefix="cellpatch-write") as thread,
        contextlib.closing(embedder.run(streams, list(bounds.values()))) as batches,
    ):
        writing: Future[None] | None = None
        parts = _cut(batches, [stop - start for start, stop in bounds.values()])
        for shard, (start, stop) in bounds.items():
            rows = np.empty((stop - start, embedder.width), writer.dtype)
            counts = {"unknown_entries": 0, "empty_cells": 0}
            filled = 0
            while filled < len(rows):
                cells = next(parts)
                rows[filled : filled + len(cells)] = _fitting(cells.features, writer.dtype)
                filled += len(cells)
                counts["unknown_entries"] += int(cells.unknown_entries.sum())
                counts["empty_cells"] += int((cells.entries == 0).sum())
                yield len(cells)
            if writing is not None:
                writing.result()  # raises what went wrong there
            writing = thread.submit(writer.write, shard, rows, counts)
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
