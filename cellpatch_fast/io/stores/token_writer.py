"""Writing a token store: front to back, each shard once, at the speed of compression.

`partial` says how a store becomes complete or stays resumable. Entries fill a chunk, chunks are
encoded by threads without the GIL, encoded chunks go to the end of the open shard file, and a
thread sees a full shard to the disk while the next one fills. So memory holds some chunks, never
a shard.

The codecs are standard, so any Zarr v3 reader that has numcodecs' delta reads the store: token
differences (tokens ascend within a cell, so the high bytes are nearly all 0) and values of a few
bits, both through Blosc's shuffles and LZ4, with a CRC-32C behind each chunk.

A resumed run must not depend on where the interrupted one was. Cells are appended in batches, and
a shard that is full is noted together with the first cell of the batch that filled it, the
counts before that cell, and (in a file of its own) the cells' lengths. A resumed run begins with
that cell again and skips the entries that are on the disk already.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from ...files import names_to_disk
from .partial import PartialStore
from .shards import EntryArray, ShardFile
from .tokens import (
    ATTRIBUTE,
    FORMAT_VERSION,
    KIND,
    consolidate,
    gene_dtype,
    narrowed,
    value_dtype,
    without_codec_warnings,
)

if TYPE_CHECKING:
    import zarr
    from zarr.core.array_spec import ArrayConfigParams

    from ...cells import RaggedCells
    from ...config import Preprocessing
    from ...genes import GeneVocabulary

CHUNK_ENTRIES = 32_768  # what a reader decodes at once: 22 cells of 1,500 genes
SHARD_CHUNKS = 1_024  # 33.5 million entries, some 34 MB of genes and 8 MB of values
WAITING_CHUNKS = 64  # that are being encoded, or wait for it
OFFSETS_CHUNK = 1 << 20
WHOLE: ArrayConfigParams = {"write_empty_chunks": True}  # so that what is missing is damage
LENGTHS = "lengths"  # of the cells appended so far, uint32


@dataclass(frozen=True)
class Checkpoint:
    """What a resumed run needs to go on after a shard.

    Parameters
    ----------
    cells
        The cell to begin with: the first one of the batch that filled the shard.
    unknown_entries
        Of the cells before it.
    genes, values
        Bytes of the shard's files.
    """

    cells: int
    unknown_entries: int
    genes: int = 0
    values: int = 0


class TokenWriter(PartialStore):
    """Writes a token store, or goes on with one that was interrupted. A context manager.

    `prepare` it, `append` the cells from `next_cell` on, then `finish`.

    Parameters
    ----------
    output, settings, overwrite
        As in `PartialStore`.
    cells
        How many cells the store will have.
    vocabulary, preprocessing
        What the tokens and values mean.
    measured
        For each input, by its name, which tokens' genes it measured: bool [vocabulary size].
    shuffled
        The seed of the cells' order; None for the order of the inputs.
    chunk_entries, shard_chunks
        Sizes of a chunk and of a shard.

    Attributes
    ----------
    next_cell
        The cell to be appended next.
    kept_cells
        The cell that a resumed run would begin with: nobody needs those before it any more.

    Raises
    ------
    InputError
        As in `PartialStore`.
    """

    KIND = KIND

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        cells: int,
        vocabulary: GeneVocabulary,
        preprocessing: Preprocessing,
        measured: Mapping[str, np.ndarray],
        *,
        shuffled: int | None = None,
        overwrite: bool = False,
        chunk_entries: int = CHUNK_ENTRIES,
        shard_chunks: int = SHARD_CHUNKS,
    ) -> None:
        self.cells, self.next_cell, self.kept_cells = cells, 0, 0
        self._vocabulary, self._preprocessing = vocabulary, preprocessing
        self._measured, self._shuffled = measured, shuffled
        self._chunk, self._shard_chunks = chunk_entries, shard_chunks
        self._arrays = (
            EntryArray("genes", gene_dtype(vocabulary.size), delta=True, shuffle="shuffle"),
            EntryArray("values", value_dtype(preprocessing), delta=False, shuffle="bitshuffle"),
        )
        self._unknown = 0  # entries of the cells before next_cell
        self._skip = 0  # entries to come that are on the disk already
        self._shards: list[Checkpoint] = []  # those that are on the disk
        self._filled = 0  # entries in the open chunk
        self._buffers = self._new_buffers()
        self._begun = 0  # chunks that were handed to the encoders
        self._encoding: deque[tuple[list[Future[bytes]], Checkpoint | None]] = deque()
        self._files: list[ShardFile] = []  # of the open shard
        self._keeping: Future[None] | None = None  # the shard before it, on its way to the disk
        self._encoders = ThreadPoolExecutor(torch.get_num_threads(), "cellpatch-encode")
        self._keeper = ThreadPoolExecutor(1, "cellpatch-write")
        self._lengths: BinaryIO | None = None
        super().__init__(output, settings, overwrite=overwrite)

    def append(self, cells: RaggedCells, unknown_entries: int = 0) -> None:
        """Write the next cells.

        Parameters
        ----------
        cells
            The cells from `next_cell` on. Their tokens are below the vocabulary's size.
        unknown_entries
            How many of their entries were left out.

        Raises
        ------
        InputError
            If a value is beyond what float16 holds.
        OSError
            If the disk is full, for one. What is done is kept.
        """
        if self.next_cell + len(cells) > self.cells:
            raise ValueError(f"{len(cells)} cells after {self.next_cell} of {self.cells}")
        here = Checkpoint(self.next_cell, self._unknown)
        cells = narrowed(cells, self._vocabulary.size, self._preprocessing, self.next_cell)
        entries = (cells.genes.numpy(), cells.values.numpy())
        self._lengths_file().write(cells.lengths.numpy().astype("<u4").tobytes())
        written = min(self._skip, cells.entries)
        self._skip -= written
        while written < cells.entries:
            count = min(self._chunk - self._filled, cells.entries - written)
            for buffer, array in zip(self._buffers, entries, strict=True):
                buffer[self._filled : self._filled + count] = array[written : written + count]
            written += count
            self._filled += count
            if self._filled == self._chunk:
                self._end_chunk(here)
        self.next_cell += len(cells)
        self._unknown += unknown_entries

    def finish(self) -> dict[str, int]:
        """Complete the store and give it its name; returns its counts."""
        if not self._prepared or self.next_cell != self.cells or self._skip:
            raise ValueError("the store is not complete")
        if self._filled:
            for buffer in self._buffers:
                buffer[self._filled :] = 0  # chunks of Zarr are whole; the shape says what counts
            entries = self._begun * self._chunk + self._filled
            self._end_chunk(None)
        else:
            entries = self._begun * self._chunk
        while self._encoding:
            self._write_chunk()
        self._wait_for_shard()
        for file in self._files:  # the last shard, unless it was full
            file.finish()
        self._files = []
        self._lengths_file().flush()
        counts = self._write_metadata(entries)
        self._publish()
        return counts

    def close(self) -> None:
        """Let others write; what is done stays."""
        self._encoders.shutdown(cancel_futures=True)
        self._keeper.shutdown()
        for file in self._files:
            file.close()
        if self._lengths is not None:
            with contextlib.suppress(OSError):  # a full disk, which was reported before
                self._lengths.close()
        super().close()

    def _end_chunk(self, here: Checkpoint | None) -> None:
        """Have the full buffers encoded; write what is encoded if too much of it waits."""
        futures = [
            self._encoders.submit(array.encode, buffer)
            for array, buffer in zip(self._arrays, self._buffers, strict=True)
        ]
        self._begun += 1
        ends_shard = self._begun % self._shard_chunks == 0
        self._encoding.append((futures, here if ends_shard else None))
        self._buffers, self._filled = self._new_buffers(), 0
        while len(self._encoding) > WAITING_CHUNKS:
            self._write_chunk()

    def _new_buffers(self) -> list[np.ndarray]:
        return [np.empty(self._chunk, array.dtype) for array in self._arrays]

    def _write_chunk(self) -> None:
        """Put the oldest encoded chunk in the open shard."""
        futures, ends_shard = self._encoding.popleft()
        if not self._files:
            self._wait_for_shard()
            for array in self._arrays:
                path = self.store / array.name / "c" / str(len(self._shards))
                self._files.append(ShardFile(path, self._shard_chunks))
        for file, future in zip(self._files, futures, strict=True):
            file.append(future.result())
        if ends_shard is not None:
            self._lengths_file().flush()
            files, self._files = self._files, []
            self._keeping = self._keeper.submit(self._keep, files, ends_shard)

    def _wait_for_shard(self) -> None:
        if self._keeping is not None:
            self._keeping.result()  # raises what went wrong there
            self._keeping = None

    def _keep(self, files: list[ShardFile], checkpoint: Checkpoint) -> None:
        """See a full shard to the disk, and note it."""
        with contextlib.ExitStack() as closing:
            for file in files:
                closing.callback(file.close)
            genes, values = (file.finish() for file in files)
        for file in files:
            names_to_disk(file.path, self.store)
        os.fsync(self._lengths_file().fileno())
        self._shards.append(replace(checkpoint, genes=genes, values=values))
        self._write_journal()
        self.kept_cells = checkpoint.cells

    def _lengths_file(self) -> BinaryIO:
        if self._lengths is None:
            self._lengths = (self.work / LENGTHS).open("ab")
        return self._lengths

    def _create(self, write_obs: Callable[[zarr.Group], None]) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec, ZstdCodec

        self.work.mkdir()
        (self.work / LENGTHS).touch()
        root = zarr.open_group(self.store, mode="w", zarr_format=3)
        write_obs(root)
        root.create_array(
            "measured",
            data=np.array([*self._measured.values()], np.uint8),
            chunks=(1, self._vocabulary.size),
            compressors=[ZstdCodec(), Crc32cCodec()],
            config=WHOLE,
        )

    def _done(self) -> dict[str, Any]:
        return {
            "chunk_entries": self._chunk,
            "shard_chunks": self._shard_chunks,
            "shards": [asdict(shard) for shard in self._shards],
        }

    def _resume(self, done: dict[str, Any]) -> None:
        self._chunk, self._shard_chunks = done["chunk_entries"], done["shard_chunks"]
        self._buffers = self._new_buffers()
        lengths = self.work / LENGTHS
        with_length = lengths.stat().st_size // 4 if lengths.exists() else 0
        for number, facts in enumerate(done["shards"]):
            shard = Checkpoint(**facts)
            if shard.cells > with_length or not self._is_whole(number, shard):
                break
            self._shards.append(shard)
        self._begun = len(self._shards) * self._shard_chunks
        last = self._shards[-1] if self._shards else Checkpoint(0, 0)
        self.next_cell = self.kept_cells = last.cells
        self._unknown = last.unknown_entries
        lengths.touch()
        os.truncate(lengths, 4 * self.next_cell)
        before = int(np.fromfile(lengths, "<u4").sum(dtype=np.int64))
        self._skip = self._begun * self._chunk - before
        self._remove_unfinished()

    def _is_whole(self, number: int, shard: Checkpoint) -> bool:
        files = {name: self.store / name / "c" / str(number) for name in ("genes", "values")}
        return all(
            file.is_file() and file.stat().st_size == getattr(shard, name)
            for name, file in files.items()
        )

    def _remove_unfinished(self) -> None:
        """What was written after the last shard that is kept: other shards, metadata."""
        for array in self._arrays:
            folder = self.store / array.name
            for file in (folder / "c").glob("*"):
                if int(file.name) >= len(self._shards):
                    file.unlink()
            (folder / "zarr.json").unlink(missing_ok=True)
        if (self.store / "offsets").exists():
            shutil.rmtree(self.store / "offsets")

    def _write_metadata(self, entries: int) -> dict[str, int]:
        """Everything that is known only now: shapes, offsets and counts."""
        import zarr
        from zarr.codecs import BloscCodec, Crc32cCodec
        from zarr.codecs.numcodecs import Delta

        lengths = np.fromfile(self.work / LENGTHS, "<u4")  # [c]
        offsets = np.zeros(self.cells + 1, np.int64)  # [c + 1]
        np.cumsum(lengths, out=offsets[1:])
        if offsets[-1] != entries:
            raise ValueError(f"{offsets[-1]} entries by the cells' lengths, {entries} were written")
        counts = {
            "entries": entries,
            "unknown_entries": self._unknown,
            "empty_cells": int((lengths == 0).sum()),
        }
        with without_codec_warnings():
            root = zarr.open_group(self.store, mode="r+", use_consolidated=False)
            for array in self._arrays:
                array.create(root, entries, self._chunk, self._shard_chunks)
            root.create_array(
                "offsets",
                data=offsets,
                chunks=(min(OFFSETS_CHUNK, len(offsets)),),
                filters=Delta(dtype="<i8"),
                compressors=[
                    BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=8),
                    Crc32cCodec(),
                ],
                config=WHOLE,
            )
            root.attrs[ATTRIBUTE] = {
                "format_version": FORMAT_VERSION,
                "version": version("cellpatch-fast"),
                "vocabulary": {
                    "fingerprint": self._vocabulary.fingerprint,
                    "size": self._vocabulary.size,
                },
                "preprocessing": asdict(self._preprocessing),
                "counts": counts,
                "settings": self.settings,
                "shuffled": self._shuffled,
                "inputs": [*self._measured],
            }
            consolidate(self.store)
        return counts
