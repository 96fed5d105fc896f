"""Tokenise any number of cells: files in, one token store out, resumable at any moment.

Cells are read in file order and bounded memory, each once. Inputs may have different genes: every
one is aligned by the vocabulary while it streams, and the store keeps which tokens it measured.

With ``shuffle``, for training, cell ``c`` of the inputs goes to row ``rows[c]``, where ``rows`` is
``numpy.random.default_rng(seed).permutation(cells)``: one order over all inputs, which a reader
may then take block by block without ever seeing cells of one donor side by side. It takes 8 bytes
of memory per cell, and on the disk a copy of the tokens (see `io.buckets`) until it is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config import CellPatchConfig, Preprocessing, Reading
from ..errors import InputError
from ..genes import GeneVocabulary
from ..io.stores.buckets import Buckets, bytes_needed
from ..io.stores.obs import write_obs
from ..io.stores.partial import finished_counts, is_taken
from ..io.stores.token_writer import TokenWriter
from ..io.stores.tokens import ATTRIBUTE, KIND, gene_dtype, is_token_store, narrowed, value_dtype
from ..loading import CellLoader
from ..loading.inputs import CellStream, describe_input, open_stream
from ..progress import progress_bar
from .paths import input_paths, output_path
from .summary import Summary, gene_counts

if TYPE_CHECKING:
    from ..config import Expected
    from ..loading.windows import CellBatch
    from ..model import CellPatch

logger = logging.getLogger("cellpatch_fast")

MAX_CELLS, MAX_ENTRIES = 65_536, 1 << 22  # of a batch: 4 million entries take some 100 MB
HUMAN = "human"  # the vocabulary of this name is the bundled one


def tokenize(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    model: CellPatch | str | Path | None = None,
    vocabulary: GeneVocabulary | str | Path | None = None,
    config: CellPatchConfig | None = None,
    layer: str | None = None,
    use_raw: bool = False,
    gene_column: str | None = None,
    input: Expected = "auto",  # noqa: A002  (the name users know)
    shuffle: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Summary:
    """Turn the cells of files into a token store, which loads as fast as the disk reads.

    Parameters
    ----------
    inputs
        AnnData files (``.h5ad``, ``.zarr``, also the address of one) or 10x output; their cells
        follow each other in the store. Their genes may differ. Of several inputs,
        ``obs["cellpatch_input"]`` says which a cell comes from; a column of obs that only some
        have is missing in the others.
    output
        The store to make. Until it is complete it is called ``OUTPUT.partial``; running the same
        again finishes it.
    model
        The model that the tokens are for, which has a vocabulary and says how values are made: a
        `CellPatch`, a model directory, or the name of a model on the Hugging Face hub.
    vocabulary
        Without a model: a `GeneVocabulary`, the path of a ``vocabulary.json``, or ``"human"``
        for the bundled human reference, which is the default.
    config
        Without a model: how values are made (``target_sum``, ``value_clip`` and
        ``value_rounding``); the paper's way by default. ``value_rounding="none"`` keeps them
        continuous, as float16, as does `CellPatchConfig.for_few_cells`.
    layer, use_raw, gene_column, input, progress
        As in `tl.embed`.
    shuffle
        Put the cells of all inputs into one random order, for training. It takes 8 bytes of
        memory per cell, and while it runs 3 bytes per entry more on the disk.
    seed
        Of that order: the same seed gives the same store.
    overwrite
        Replace a token store at ``output`` once the new one is complete, and drop unfinished work
        that was begun with other settings. Anything else is never deleted.

    Returns
    -------
    Summary
        Counts and speed; its text is one line.

    Raises
    ------
    InputError
        If an input, the model or the vocabulary cannot be used, the output exists, unfinished
        work there was begun with other settings, or there is no room for the copy that shuffling
        needs.
    OSError
        If the output cannot be written, a full disk for one. What is done is kept.

    Examples
    --------
    >>> cellpatch_fast.atlas.tokenize(
    ...     ["a.h5ad", "b.h5ad"], "tokens.zarr", shuffle=True
    ... )  # doctest: +SKIP
    >>> store = cellpatch_fast.io.TokenStore("tokens.zarr")  # doctest: +SKIP
    """
    paths = input_paths(inputs)
    output = output_path(output, paths, KIND, ATTRIBUTE)
    if seed < 0:
        raise InputError(f"the seed must be at least 0, found {seed}")
    vocabulary, config = _resolved(model, vocabulary, config)
    reading = Reading(layer=layer, use_raw=use_raw, gene_column=gene_column, input=input)
    preprocessing = Preprocessing.from_config(config)
    with ExitStack() as opened:
        streams = []
        for path in paths:
            stream = _open(path, vocabulary, config, reading)
            opened.callback(stream.close)
            logger.info("%s", stream)
            streams.append(stream)
        genes = gene_counts(streams)
        settings = {
            "vocabulary": vocabulary.fingerprint,
            **dataclasses.asdict(preprocessing),
            "inputs": [
                describe_input(path, stream) for path, stream in zip(paths, streams, strict=True)
            ],
            **reading.record(),
            "shuffle": f"with seed {seed}" if shuffle else "",
            **genes,
        }
        cells = sum(stream.n_cells for stream in streams)
        summary = Summary(output, cells, **genes)
        if is_taken(output) and not overwrite:
            return summary.counted(finished_counts(output, ATTRIBUTE, settings))
        names = [str(path) for path in paths]
        with TokenWriter(
            output=output,
            settings=settings,
            cells=cells,
            vocabulary=vocabulary,
            preprocessing=preprocessing,
            measured={
                name: stream.measured()[0] for name, stream in zip(names, streams, strict=True)
            },
            shuffled=seed if shuffle else None,
            overwrite=overwrite,
        ) as writer:
            rows = np.random.default_rng(seed).permutation(cells) if shuffle else None
            tables = [stream.obs_table() for stream in streams]
            writer.prepare(lambda root: write_obs(root, tables, names, rows))
            started = time.perf_counter()
            if rows is None:
                tokenized = _write_in_order(writer, streams, progress)
            else:
                buckets = _buckets(writer, streams, rows, vocabulary, preprocessing)
                tokenized = _write_shuffled(
                    writer, buckets, streams, vocabulary, preprocessing, progress
                )
            seconds = time.perf_counter() - started
            counts = writer.finish()
    return replace(summary, computed=tokenized, seconds=seconds).counted(counts)


def _resolved(
    model: CellPatch | str | Path | None,
    vocabulary: GeneVocabulary | str | Path | None,
    config: CellPatchConfig | None,
) -> tuple[GeneVocabulary, CellPatchConfig]:
    """The vocabulary and the configuration, from a model or on their own."""
    if model is not None:
        if vocabulary is not None:
            raise InputError(
                "a model says what the tokens mean: give no vocabulary beside it (--model, "
                "--vocabulary)"
            )
        if config is not None:
            raise InputError("a model says how values are made: give no config beside it")
        if isinstance(model, str | Path):
            from ..model import CellPatch

            model = CellPatch.from_pretrained(model)
        return model.vocabulary, model.config
    if vocabulary is None or vocabulary == HUMAN:
        vocabulary = GeneVocabulary.human()
    elif isinstance(vocabulary, str | Path):
        vocabulary = GeneVocabulary.load(vocabulary)
    assert isinstance(vocabulary, GeneVocabulary)
    return vocabulary, config or CellPatchConfig()


def _open(
    path: Path | str, vocabulary: GeneVocabulary, config: CellPatchConfig, reading: Reading
) -> CellStream:
    if is_token_store(path):
        raise InputError(f"{path} is a token store already: give the AnnData or 10x files")
    stream = open_stream(path, vocabulary, config, reading)
    assert isinstance(stream, CellStream)
    return stream


def _batches(streams: Sequence[CellStream], start: int) -> Generator[CellBatch]:
    """The cells of all inputs from ``start`` on, in their order."""
    cells = sum(stream.n_cells for stream in streams)
    if start < cells:
        loader = CellLoader(
            streams, batch_size=MAX_CELLS, max_entries=MAX_ENTRIES, rows=[(start, cells)]
        )
        yield from loader


def _write_in_order(
    writer: TokenWriter, streams: Sequence[CellStream], progress: bool | None
) -> int:
    """Write the cells that are missing; returns how many those are."""
    earlier = writer.next_cell
    with (
        progress_bar(writer.cells, "tokenising", progress, done=earlier) as bar,
        contextlib.closing(_batches(streams, earlier)) as batches,
    ):
        for batch in batches:
            writer.append(batch.cells, int(batch.unknown_entries.sum()))
            bar.update(len(batch.cells))
    return writer.cells - earlier


def _buckets(
    writer: TokenWriter,
    streams: Sequence[CellStream],
    rows: np.ndarray,
    vocabulary: GeneVocabulary,
    preprocessing: Preprocessing,
) -> Buckets:
    """Where the cells wait for their rows, if there is room for that."""
    entries = sum(stream.expected_entries() for stream in streams)
    types = gene_dtype(vocabulary.size), value_dtype(preprocessing)
    buckets = Buckets(writer.work / "buckets", rows, entries, *types)
    missing = 1 - buckets.next_cell / len(rows)
    needed = int(missing * bytes_needed(len(rows), entries, *types))
    free = shutil.disk_usage(writer.work).free
    if free < needed:
        raise InputError(
            f"shuffling needs {needed / 1e9:.1f} GB for a copy of the tokens in {writer.work}, "
            f"besides the store itself, and {free / 1e9:.1f} GB are free there: free some space "
            "or choose another output, then repeat this, or leave the cells in their order"
        )
    return buckets


def _write_shuffled(
    writer: TokenWriter,
    buckets: Buckets,
    streams: Sequence[CellStream],
    vocabulary: GeneVocabulary,
    preprocessing: Preprocessing,
    progress: bool | None,
) -> int:
    """Write the cells to their rows; returns how many had to be read."""
    earlier = buckets.next_cell
    with (
        progress_bar(writer.cells, "tokenising", progress, done=earlier) as bar,
        contextlib.closing(_batches(streams, earlier)) as batches,
    ):
        for batch in batches:
            cells = narrowed(batch.cells, vocabulary.size, preprocessing, buckets.next_cell)
            buckets.append(cells, int(batch.unknown_entries.sum()))
            bar.update(len(cells))
    buckets.finish()
    with progress_bar(writer.cells, "shuffling", progress, done=writer.next_cell) as bar:
        for cells in buckets.read(writer.next_cell):
            # they are known for all cells together only
            writer.append(cells, 0 if writer.next_cell else buckets.unknown_entries)
            buckets.forget(writer.kept_cells)
            bar.update(len(cells))
    return writer.cells - earlier
