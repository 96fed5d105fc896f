"""Putting cells into any other order, with files where memory would not do.

Cells come in one order and are needed in another: cell ``c`` in row ``rows[c]``. They are sorted by
rows, see `sorting`, with a file for each bucket.

A piece of a bucket file is: int64 numbers of cells and entries; the cells' rows in the bucket,
uint32; their lengths, uint32; their genes; their values. Cells are gathered before they are
appended, and files are opened only for that, so thousands of buckets need neither thousands of
open files nor tiny pieces.

Resumable: from time to time the files are seen to the disk and their sizes noted together with
the next cell. A run that goes on cuts the files back to these sizes and begins with that cell.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...cells import RaggedCells
from ...errors import InputError
from ...files import make_folders, to_disk, write_whole
from ..sorting import Runs, by_bucket, by_row
from .partial import DELETE

BUCKET_BYTES = 1 << 27  # of a bucket; sorting it takes three times as much memory
GATHERED_BYTES = 1 << 26  # of cells that are appended together, which takes as much again twice
CHECKPOINT_BYTES = 1 << 28  # what a kill may cost: some seconds; with many buckets more,
CHECKPOINT_FILE_BYTES = 1 << 20  # as each file has to be seen to the disk: a megabyte is worth it
STATE = "buckets.json"
UINT32 = np.dtype("<u4")
CELL_BYTES = 8  # of a cell in a bucket file, besides its entries


def bytes_needed(
    cells: int, entries: int, gene_dtype: np.dtype[Any], value_dtype: np.dtype[Any]
) -> int:
    """What the files of so many cells take on the disk."""
    return CELL_BYTES * cells + (gene_dtype.itemsize + value_dtype.itemsize) * entries


class Buckets:
    """Cells on their way to other rows.

    Append the cells from `next_cell` on, then `finish`, then `read` the rows.

    Parameters
    ----------
    folder
        Of the files; made if it does not exist. What an earlier run has left there is taken over.
    rows
        int64 [cells]: the row of each cell, a permutation.
    expected_entries
        Of all cells, about: it decides how many rows a bucket has.
    gene_dtype, value_dtype
        Types of the entries.
    bucket_bytes, gathered_bytes, checkpoint_bytes
        See the constants at the head of this file.

    Attributes
    ----------
    next_cell
        The cell to be appended next.
    unknown_entries
        Of the cells before it.

    Raises
    ------
    InputError
        If the files of an earlier run are damaged.
    """

    def __init__(
        self,
        folder: Path,
        rows: np.ndarray,
        expected_entries: int,
        gene_dtype: np.dtype[Any],
        value_dtype: np.dtype[Any],
        *,
        bucket_bytes: int = BUCKET_BYTES,
        gathered_bytes: int = GATHERED_BYTES,
        checkpoint_bytes: int | None = None,
    ) -> None:
        self._folder, self._rows = folder, rows
        self._dtypes = gene_dtype, value_dtype
        self._gathered_bytes = gathered_bytes
        self._gathered: list[RaggedCells] = []
        self._gathered_now = self._unsafe = 0  # bytes: gathered, and written since a checkpoint
        self._forgotten = 0  # buckets
        self.next_cell = self.unknown_entries = 0
        expected = bytes_needed(len(rows), expected_entries, gene_dtype, value_dtype)
        self._bucket_rows = max(1, bucket_bytes * len(rows) // max(1, expected))
        self._checkpoint_bytes = checkpoint_bytes or max(
            CHECKPOINT_BYTES, CHECKPOINT_FILE_BYTES * self._buckets
        )
        make_folders(folder)
        if (folder / STATE).exists():
            self._resume()
        else:
            self._checkpoint()

    @property
    def is_complete(self) -> bool:
        """Whether all cells were appended."""
        return self.next_cell == len(self._rows)

    def append(self, cells: RaggedCells, unknown_entries: int = 0) -> None:
        """Take the cells from `next_cell` on, of the right types."""
        # A copy: a loader reuses the memory of batches that nobody holds any more.
        self._gathered.append(RaggedCells.concatenate([cells]))
        self.next_cell += len(cells)
        self.unknown_entries += unknown_entries
        self._gathered_now += bytes_needed(len(cells), cells.entries, *self._dtypes)
        if self._gathered_now >= self._gathered_bytes:
            self._scatter()
        if self._unsafe >= self._checkpoint_bytes:
            self._checkpoint()

    def finish(self) -> None:
        """See everything to the disk."""
        self._scatter()
        self._checkpoint()

    def read(self, row: int) -> Iterator[RaggedCells]:
        """The cells of the rows from ``row`` on, in order, up to a bucket at a time.

        Raises
        ------
        InputError
            If a file is gone or damaged.
        """
        while row < len(self._rows):
            bucket = row // self._bucket_rows
            first = bucket * self._bucket_rows
            cells = self._read_bucket(bucket, min(self._bucket_rows, len(self._rows) - first))
            yield cells.slice(row - first, len(cells))
            row = first + len(cells)

    def forget(self, row: int) -> None:
        """Delete the files that hold only rows before ``row``."""
        for bucket in range(self._forgotten, row // self._bucket_rows):
            self._file(bucket).unlink(missing_ok=True)
            self._forgotten = bucket + 1

    def _scatter(self) -> None:
        """Append what was gathered to the files of its buckets."""
        if not self._gathered:
            return
        cells = RaggedCells.concatenate(self._gathered)
        rows = self._rows[self.next_cell - len(cells) : self.next_cell]
        runs = Runs(
            rows=(rows % self._bucket_rows).astype(UINT32),
            lengths=cells.lengths.numpy().astype(UINT32),
            columns=cells.genes.numpy(),
            values=cells.values.numpy(),
        )
        for bucket, part in by_bucket(runs, rows // self._bucket_rows):
            with self._file(bucket).open("ab") as file:
                file.write(np.array([len(part.rows), len(part.columns)], "<i8").tobytes())
                for array in part:
                    file.write(array.tobytes())
        self._unsafe += self._gathered_now
        self._gathered, self._gathered_now = [], 0

    def _checkpoint(self) -> None:
        files = [self._file(bucket) for bucket in range(self._buckets)]
        for file in files:
            if file.exists():
                to_disk(file)
        to_disk(self._folder)  # the files' names
        state = {
            "cells": self.next_cell,
            "unknown_entries": self.unknown_entries,
            "bucket_rows": self._bucket_rows,
            "sizes": [file.stat().st_size if file.exists() else 0 for file in files],
        }
        write_whole(self._folder / STATE, json.dumps(state))
        self._unsafe = 0

    def _resume(self) -> None:
        try:
            state = json.loads((self._folder / STATE).read_text())
            self.next_cell, self.unknown_entries = state["cells"], state["unknown_entries"]
            self._bucket_rows, sizes = state["bucket_rows"], state["sizes"]
        except (ValueError, LookupError, TypeError) as error:
            raise self._damage(f"{STATE} cannot be read ({error})") from error
        if self.is_complete:  # files may be gone that were used up
            return
        for bucket, size in enumerate(sizes):
            file = self._file(bucket)
            if size and not (file.exists() and file.stat().st_size >= size):
                raise self._damage(f"{file.name} is gone or cut off")
            if file.exists():
                os.truncate(file, size)

    def _read_bucket(self, bucket: int, count: int) -> RaggedCells:
        """All cells of a bucket, in the order of rows."""
        file = self._file(bucket)
        try:
            pieces = list(self._pieces(np.fromfile(file, np.uint8)))
            runs = Runs(*map(np.concatenate, zip(*pieces, strict=True)))
        except (OSError, ValueError) as error:
            raise self._damage(f"{file.name} cannot be read ({error})") from error
        if not np.array_equal(np.sort(runs.rows), np.arange(count)):
            raise self._damage(f"{file.name} does not hold each of its {count} cells once")
        runs = by_row(runs)
        offsets = np.concatenate([[0], np.cumsum(runs.lengths, dtype=np.int64)])
        return RaggedCells(*map(torch.from_numpy, (offsets, runs.columns, runs.values)))

    def _pieces(self, content: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Places, lengths, genes and values of each piece of a file."""
        start = 0
        while start < len(content):
            cells, entries = np.frombuffer(content, "<i8", 2, start).tolist()
            start += 16
            piece = []
            counts = (cells, cells, entries, entries)
            for dtype, count in zip((UINT32, UINT32, *self._dtypes), counts, strict=True):
                piece.append(np.frombuffer(content, dtype, count, start))
                start += piece[-1].nbytes
            yield piece

    def _file(self, bucket: int) -> Path:
        return self._folder / str(bucket)

    @property
    def _buckets(self) -> int:
        return -(-len(self._rows) // self._bucket_rows)

    def _damage(self, what: str) -> InputError:
        return InputError(f"{self._folder}: {what}. {DELETE}: {self._folder.parent.parent}.")
