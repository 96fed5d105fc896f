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
from .io.sources import open_source
from .model.storage import fingerprint
from .paths import input_paths, output_path
from .progress import progress_bar

if TYPE_CHECKING:
    import torch

    from .detect import Expected
    from .embedding import EmbeddedBlock
    from .loader import CellStream
    from .model import CellPatch
    from .model.encoder import Pool

logger = logging.getLogger("cellpatch_fast")

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
        for path in paths:
            source = opened.enter_context(open_source(path, layer=layer, use_raw=use_raw))
            stream = embedder.stream(source, gene_column=gene_column, input=input)
            logger.info("%s: %s; %s", source.name, stream.match, stream.detected.reason)
            streams.append(stream)
        settings = {
            "model": fingerprint(embedder.model),
            "vocabulary": embedder.model.vocabulary.fingerprint,
            "inputs": [
                _describe(path, stream) for path, stream in zip(paths, streams, strict=True)
            ],
            "layer": layer or "",
            "use_raw": use_raw,
            "gene_column": gene_column or "",
            "pool": pool,
            "dtype": dtype,
            "backend": embedder.backend,
            "device": embedder.device.type,
        }
        cells = sum(stream.source.n_cells for stream in streams)
        matched = sum(stream.match.matched for stream in streams)
        unknown = sum(len(stream.match.unknown) for stream in streams)
        summary = Summary(output, cells, 0, matched, unknown, 0, 0, 0.0)
        if is_taken(output) and not overwrite:
            counts = finished_counts(output, ATTRIBUTE, settings)
            return _counted(summary, counts)
        shape = (cells, embedder.width)
        with EmbeddingWriter(
            output, settings, *shape, np.dtype(dtype), KEY, overwrite=overwrite
        ) as writer:
            tables = [stream.source.obs_table() for stream in streams]
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


def _describe(path: Path, stream: CellStream) -> str:
    """An input, for people; another string if anything about it is different."""
    source = stream.source
    return (
        f"{path.name}: {source.n_cells} cells, {source.n_genes} genes, {stream.detected.kind}, "
        f"fingerprint {source.fingerprint()[:16]}"
    )


def _counted(summary: Summary, counts: dict[str, int]) -> Summary:
    return replace(
        summary, unknown_entries=counts["unknown_entries"], empty_cells=counts["empty_cells"]
    )


def _missing_shards(
    writer: EmbeddingWriter, embedder: Embedder, streams: list[CellStream]
) -> Generator[int]:
    """Compute all missing shards, writing each behind the next; yields numbers of cells done."""
    bounds = {shard: writer.bounds(shard) for shard in writer.missing}
    parts = (part for start, stop in bounds.values() for part in _parts(streams, start, stop))
    with (
        ThreadPoolExecutor(1, thread_name_prefix="cellpatch-write") as thread,
        contextlib.closing(embedder.run(parts)) as blocks,
    ):
        writing: Future[None] | None = None
        for shard, (start, stop) in bounds.items():
            rows = np.empty((stop - start, embedder.width), writer.dtype)
            counts = {"unknown_entries": 0, "empty_cells": 0}
            filled = 0
            while filled < len(rows):  # a block never crosses the end of a shard
                block = next(blocks)
                rows[filled : filled + len(block.rows)] = _fitting(block, writer.dtype)
                filled += len(block.rows)
                counts["unknown_entries"] += block.unknown_entries
                counts["empty_cells"] += block.empty_cells
                yield len(block.rows)
            if writing is not None:
                writing.result()  # raises what went wrong there
            writing = thread.submit(writer.write, shard, rows, counts)
        if writing is not None:
            writing.result()


def _fitting(block: EmbeddedBlock, dtype: np.dtype[np.floating[Any]]) -> np.ndarray:
    """The rows of a block as ``dtype``, none of which may overflow."""
    with np.errstate(over="ignore"):
        rows = block.rows.astype(dtype, copy=False)
    if dtype.itemsize < 4 and not np.isfinite(rows).all():
        raise InputError(
            f"the embedding has values up to {np.abs(block.rows).max():.3g}, beyond what {dtype} "
            "holds: store it as float32 (--dtype)"
        )
    return rows


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
