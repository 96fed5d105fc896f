"""Embed or annotate any number of cells: files in, one store out, resumable at any moment.

Cells are read once, in file order, in bounded memory; the rows of the result are those of the
inputs, one after the other. A cell's embedding depends on the cell alone, so shards, batches and
interruptions leave no trace in it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .errors import InputError
from .inference.embedder import Embedder
from .inference.evaluation import Evaluation, evaluate, require_analysis
from .inference.labels import label_column, most_likely, require_threshold, true_labels
from .io.stores.embeddings import ATTRIBUTE, EmbeddingWriter
from .io.stores.obs import write_obs
from .io.stores.partial import finished_counts, is_taken
from .loading.inputs import reading_options
from .model.storage import fingerprint
from .paths import describe_input, input_paths, output_path
from .progress import progress_bar
from .tokenization import tokenize
from .training.folder import warn_of_unfinished

if TYPE_CHECKING:
    import torch

    from .inference.embedder import EmbeddedCells
    from .loading.inputs import Stream
    from .model import CellPatch, CellPatchAnnotator
    from .model.encoder import Pool
    from .preprocessing.detection import Expected

logger = logging.getLogger("cellpatch_fast")

__all__ = ["Annotated", "Summary", "annotate", "embed", "tokenize"]

KEY = "X_cellpatch"
PROBABILITIES = "cellpatch_probabilities"
LABEL, PROBABILITY = "cellpatch_label", "cellpatch_probability"
READ_ROWS = 1 << 16  # of probabilities at a time


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
    warn_of_unfinished(model)
    embedder = Embedder(model, pooling=pool, batch_size=batch_size, backend=backend, device=device)
    reading = reading_options(layer, use_raw, gene_column, input)
    widths = {KEY: embedder.width}
    return _make(inputs, embedder, output, reading, widths, dtype, overwrite, progress)


@dataclass(frozen=True)
class Annotated:
    """What `annotate` did.

    Parameters
    ----------
    summary
        Of the store.
    cells
        Number of cells with each label, the most frequent first.
    evaluation
        Agreement with the labels that were given; None without them.
    """

    summary: Summary
    cells: dict[str, int]
    evaluation: Evaluation | None = None

    def __str__(self) -> str:
        labels = ", ".join(f"{name} {count:,}" for name, count in self.cells.items())
        text = f"{self.summary}\nlabels: {labels}"
        return text if self.evaluation is None else f"{text}\n{self.evaluation}"


def annotate(
    inputs: str | Path | Sequence[str | Path],
    model: CellPatchAnnotator | str | Path,
    output: str | Path,
    *,
    threshold: float = 0.0,
    embedding: bool = True,
    label: str | None = None,
    label_map: Mapping[str, str] | None = None,
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
) -> Annotated:
    """Annotate the cells of files: labels, their probabilities, and the embedding, in a store.

    Parameters
    ----------
    inputs, layer, use_raw, gene_column, input, pool, dtype, batch_size
        As in `embed`.
    backend, device, overwrite, progress
        As in `embed`.
    model
        A `CellPatchAnnotator`, its directory, or its name on the Hugging Face hub.
    output
        The store to make: an AnnData Zarr store with ``obs["cellpatch_label"]``,
        ``obs["cellpatch_probability"]``, ``obsm["cellpatch_probabilities"]`` [cells, classes] (in
        the order of the label's categories) and ``obsm["X_cellpatch"]``.
    threshold
        A cell whose label has a lower probability is ``"unknown"``.
    embedding
        Store the embedding too.
    label
        Column of obs with true labels, to compare with. Those that are not among the model's
        classes are warned of and have a row in the evaluation's table of truth x prediction.
    label_map
        What labels are called in the model, ``{name in obs: class}``, where the names differ;
        several may be one class. Others stay as they are.

    Returns
    -------
    Annotated
        Counts, speed, and the agreement with ``label``.

    Raises
    ------
    InputError, OSError
        As `embed`; or if the model is no annotator.
    """
    if label is not None:
        require_analysis()
    elif label_map is not None:
        raise InputError("a label map renames true labels: name their column with --label (label=)")
    warn_of_unfinished(model)
    embedder = Embedder(
        model,
        pooling=pool,
        batch_size=batch_size,
        backend=backend,
        device=device,
        annotate=True,
    )
    assert embedder.annotator is not None
    classes = embedder.annotator.classes
    require_threshold(threshold, classes)
    truth: list[np.ndarray] = []

    def add_labels(writer: EmbeddingWriter) -> None:
        writer.add_columns(_labels(writer, classes, threshold))

    def read_truth(streams: Sequence[Stream]) -> None:
        if label is not None:
            tables, names = zip(*((s.obs_table(), s.name) for s in streams), strict=True)
            truth.append(true_labels(tables, names, label, label_map, classes))

    reading = reading_options(layer, use_raw, gene_column, input)
    widths = {PROBABILITIES: len(classes)} | ({KEY: embedder.width} if embedding else {})
    extras = {
        "head": fingerprint(embedder.annotator, whole=True),
        "classes": list(classes),
        "threshold": threshold,
        "embedding": embedding,
    }
    summary = _make(
        *(inputs, embedder, output, reading, widths, dtype, overwrite, progress),
        extras=extras,
        begin=read_truth,
        finish=add_labels,
    )
    return _annotated(summary, classes, truth[0] if truth else None)


def _annotated(summary: Summary, classes: Sequence[str], truth: np.ndarray | None) -> Annotated:
    """What a finished store says."""
    import zarr
    from anndata.io import read_elem

    labels = read_elem(zarr.open_group(summary.output, mode="r")[f"obs/{LABEL}"])
    counts = labels.value_counts().sort_values(ascending=False, kind="stable")
    cells = {str(name): int(count) for name, count in counts.items() if count}
    evaluation = None if truth is None else evaluate(truth, np.asarray(labels), classes)
    return Annotated(summary, cells, evaluation)


def _labels(writer: EmbeddingWriter, classes: Sequence[str], threshold: float) -> dict[str, Any]:
    """Columns of obs from the probabilities in a store, a part at a time."""

    codes = np.empty(writer.rows, np.int32)
    highest = np.empty(writer.rows, np.float32)
    for start in range(0, writer.rows, READ_ROWS):
        stop = min(start + READ_ROWS, writer.rows)
        codes[start:stop], highest[start:stop] = most_likely(
            writer.read(PROBABILITIES, start, stop), threshold
        )
    return {LABEL: label_column(codes, classes), PROBABILITY: highest}


def _make(
    inputs: str | Path | Sequence[str | Path],
    embedder: Embedder,
    output: str | Path,
    reading: dict[str, Any],
    widths: dict[str, int],
    dtype: str,
    overwrite: bool,
    progress: bool | None,
    *,
    extras: Mapping[str, Any] = {},
    begin: Callable[[Sequence[Stream]], None] = lambda streams: None,
    finish: Callable[[EmbeddingWriter], None] = lambda writer: None,
) -> Summary:
    """Make a store with the arrays of ``widths``, or the rest of one.

    Parameters
    ----------
    extras
        What the content depends on besides the embedder and the reading.
    begin, finish
        Called with the opened inputs, and with a store that has all its rows.
    """
    paths = input_paths(inputs)
    output = output_path(output, paths, EmbeddingWriter.KIND, ATTRIBUTE)
    if dtype not in ("float32", "float16"):
        raise InputError(f"unknown dtype {dtype!r}: choose float32 or float16")
    with ExitStack() as opened:
        streams = []
        for path in paths:
            stream = opened.enter_context(contextlib.closing(embedder.open(path, **reading)))
            logger.info("%s", stream)
            streams.append(stream)
        begin(streams)
        settings = {
            "model": fingerprint(embedder.model),
            "vocabulary": embedder.model.vocabulary.fingerprint,
            "inputs": [
                describe_input(path, stream) for path, stream in zip(paths, streams, strict=True)
            ],
            "layer": reading["layer"] or "",
            "use_raw": reading["use_raw"],
            "gene_column": reading["gene_column"] or "",
            "pool": embedder.pooling,
            "dtype": dtype,
            "backend": embedder.backend,
            "device": embedder.device.type,
            **extras,
        }
        cells = sum(stream.n_cells for stream in streams)
        matched = sum(stream.genes_matched for stream in streams)
        unknown = sum(stream.genes_unknown for stream in streams)
        summary = Summary(output, cells, 0, matched, unknown, 0, 0, 0.0)
        if is_taken(output) and not overwrite:
            counts = finished_counts(output, ATTRIBUTE, settings)
            return _counted(summary, counts)
        with EmbeddingWriter(
            output, settings, cells, widths, np.dtype(dtype), overwrite=overwrite
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
            finish(writer)
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
            blocks = {
                key: np.empty((stop - start, width), writer.dtype)
                for key, width in writer.widths.items()
            }
            counts = {"unknown_entries": 0, "empty_cells": 0}
            filled = 0
            while filled < stop - start:
                cells = next(parts)
                found = {KEY: cells.features, PROBABILITIES: cells.probabilities}
                for key, block in blocks.items():
                    rows = found[key]
                    assert rows is not None
                    block[filled : filled + len(cells)] = _fitting(rows, writer.dtype)
                filled += len(cells)
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
