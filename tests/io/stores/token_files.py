"""Ragged cells and token stores for tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import zarr

from cellpatch_fast import GeneVocabulary, RaggedCells
from cellpatch_fast.config import Preprocessing
from cellpatch_fast.io.interfaces import Chunks
from cellpatch_fast.io.sources.tables import FrameTable
from cellpatch_fast.io.stores.obs import write_obs
from cellpatch_fast.io.stores.token_writer import TokenWriter

DISCRETE, CONTINUOUS = Preprocessing(), Preprocessing(value_rounding="none", value_clip=None)
VOCABULARY = GeneVocabulary([""] * 61, [f"G{gene}" for gene in range(61)])
LARGE_VOCABULARY = GeneVocabulary(["", ""], ["A", "B"], [1, 66_000])
CHUNK, SHARD_CHUNKS = 7, 3  # entries and chunks: small and odd


def make_cells(
    lengths: Sequence[int], preprocessing: Preprocessing = DISCRETE, size: int = VOCABULARY.size
) -> RaggedCells:
    """Cells of these lengths, with ascending tokens below ``size`` and random values."""
    random = np.random.default_rng(sum(lengths) + len(lengths))
    offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
    tokens = [np.sort(random.integers(1, size, length)) for length in lengths]
    genes = np.concatenate([np.empty(0, np.int64), *tokens])
    values = random.integers(0, 6, len(genes)).astype(np.uint8)
    if not preprocessing.discrete:
        values = random.gamma(2, 1, len(genes)).astype(np.float32)
    genes = genes.astype(np.uint16 if size <= 1 << 16 else np.int32)
    return RaggedCells(*map(torch.from_numpy, (offsets, genes, values)))


def make_obs(cells: int) -> pd.DataFrame:
    return pd.DataFrame({"n": np.arange(cells)}, index=[f"c{cell}" for cell in range(cells)])


def open_writer(
    output: Path,
    cells: int,
    preprocessing: Preprocessing = DISCRETE,
    vocabulary: GeneVocabulary = VOCABULARY,
    **options: Any,
) -> TokenWriter:
    """A prepared writer of ``cells`` cells from one input that measured every other token."""
    options = {"chunk_entries": CHUNK, "shard_chunks": SHARD_CHUNKS} | options
    measured = {"one.h5ad": np.arange(vocabulary.size) % 2 == 1}
    settings = options.pop("settings", {"layer": "counts"})
    writer = TokenWriter(output, settings, cells, vocabulary, preprocessing, measured, **options)
    obs = make_obs(cells)
    try:
        writer.prepare(lambda root: write_obs(root, [FrameTable(obs)], ["one.h5ad"]))
    except BaseException:
        writer.close()
        raise
    return writer


def append(writer: TokenWriter, cells: RaggedCells, ends: Iterable[int]) -> None:
    """Append the cells that are missing, up to each of ``ends`` at a time; 2 unknown a cell."""
    for end in ends:
        if end > writer.next_cell:
            batch = cells.slice(writer.next_cell, end)
            writer.append(batch, 2 * len(batch))


def write_store(
    output: Path,
    cells: RaggedCells,
    preprocessing: Preprocessing = DISCRETE,
    vocabulary: GeneVocabulary = VOCABULARY,
    ends: Iterable[int] | None = None,
    **options: Any,
) -> dict[str, int]:
    """A whole run, or the rest of one, in batches that end at ``ends``."""
    with open_writer(output, len(cells), preprocessing, vocabulary, **options) as writer:
        append(writer, cells, [len(cells)] if ends is None else ends)
        return writer.finish()


def read_chunks(chunks: Chunks) -> np.ndarray:
    """All elements."""
    found = np.empty(chunks.length, chunks.dtype)
    chunks.read(range(-(-chunks.length // chunks.chunk)), found)
    return found


def read_with_zarr(path: Path, key: str) -> np.ndarray:
    """The array as zarr-python has it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in")
        return zarr.open_group(path, mode="r")[key][...]  # type: ignore[index, return-value]
