"""CellLoader: cells from disk as ragged batches, ready for the model, as fast as the disk allows.

    loader = CellLoader("atlas.h5ad", model.vocabulary, model.config, batch_size=512)
    for batch in loader:
        features = model.encode(batch.cells)

An epoch is cut into windows (see `sampler`). Worker threads each take one window at a time: read
its byte ranges, decode the chunks without the GIL, tokenise in one compiled pass, all into memory
that is reused, and put it on its way to the GPU on a stream of its own. The consumer gets the
windows' batches in order.

- Windows are the only unit of work: threads never wait for each other's parts of one.
- How much is read ahead is bounded by threads and memory, see `windows.run`.
- The batches are the same, bit for bit, whatever the number of threads and the memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config import Reading
from ..devices import usable_cores
from ..errors import InputError
from ..preprocessing.masking import Masked, Masking, Measured, mask
from .columns import balancing_weights, read_column
from .inputs import CellStream, Stream, TokenStream, open_stream
from .sampler import Chosen, Epoch, Sampler, checked_windows
from .sampling import Sampling, warn_of_unequal_batches
from .windows import Assembly, CellBatch, run

if TYPE_CHECKING:
    from anndata import AnnData

    from ..cells import RaggedCells
    from ..config import CellPatchConfig, Expected
    from ..genes import GeneVocabulary
    from .windows import Mask

__all__ = ["CellBatch", "CellLoader"]

MEMORY_LIMIT = 1 << 30
# Of a window in file order, at most: what a window costs beside its entries, 2 to 5 ms, is then a
# tenth, also of a matrix, whose entries take seven times as much memory as tokens.
WINDOW_ENTRIES, WINDOW_BYTES = 1 << 23, 1 << 26
WINDOWS_IN_MEMORY = 8  # at least, where little memory is allowed and batches are small
MOST_THREADS = 8  # by default: more than feed a GPU, and windows in memory cost something


class CellLoader:
    """Iterates over the cells of token stores and AnnData files in ragged batches.

    Each iteration is one epoch; the next one shuffles anew. Close it, or use it in a ``with``
    statement, to close the files.

    Parameters
    ----------
    inputs
        Token stores, AnnData files (.h5ad; .zarr of version 2 or 3), 10x output, AnnData objects:
        one or several, whose cells follow each other. What is opened already (`CellStream`,
        `TokenStream`) stays open.
    vocabulary, config
        The model's. Token stores know how they were made and need none; if given, they must fit.
    batch_size, max_entries, shuffle, block_size, buffer_size, seed, drop_last
        How an epoch is cut into batches and ordered, see `sampling.Sampling`.
    rank, world_size, share_batches
        Which part of it this process takes, see there. Where ranks get unequal numbers of batches
        an `InputWarning` says so.
    weights
        With ``shuffle``: how often each cell comes, relative to the others, float [cells]; or the
        name of a categorical column of obs, whose categories then come equally often.
    sampler
        Says which cells come in which batch, instead of all the options above; see
        `sampler.Sampler`. The seed stays that of masks.
    rows
        The cells to take, as positions: int64 [cells], ascending; or as ranges
        ``[(start, stop), …]``, ascending too. All by default.
    obs
        Columns of obs that batches carry along.
    masking
        Hide genes for pretraining; `CellBatch.targets` are to be predicted. A cell's mask depends
        on the seed, the epoch and the cell's position only.
    layer, use_raw, gene_column, input
        Of AnnData inputs, see `tl.embed`.
    device
        Where the batches go; a CUDA device is fed from page-locked memory.
    threads
        Windows that are worked on at a time. It changes no batch.
    memory_limit
        Bytes for all windows in work, in waiting and with the consumer, beyond 8 bytes for each
        cell of the inputs and the batches that the consumer keeps. It changes no batch.

    Attributes
    ----------
    categories
        What the codes of each categorical column of ``obs`` mean.
    epoch
        Number of the next epoch; set it to repeat or to resume.
    first_batch
        Batches that the next epoch leaves out at its beginning, to resume; only this epoch.

    Raises
    ------
    InputError
        If an input cannot be read or does not fit the others or the vocabulary; while iterating,
        if it is damaged, or a batch needs more memory than ``memory_limit``.
    ValueError
        If an option makes no sense; while iterating, if the loader was closed.

    Examples
    --------
    >>> with CellLoader("tokens.zarr", shuffle=True, obs=["cell_type"]) as loader:  # doctest: +SKIP
    ...     for batch in loader:
    ...         loss = train_step(batch.cells, batch.obs["cell_type"])
    """

    def __init__(
        self,
        inputs: Any,
        vocabulary: GeneVocabulary | None = None,
        config: CellPatchConfig | None = None,
        *,
        batch_size: int = 512,
        max_entries: int | None = None,
        shuffle: bool = False,
        block_size: int = 64,
        buffer_size: int = 8_192,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        share_batches: bool = False,
        weights: np.ndarray | str | None = None,
        sampler: Sampler | None = None,
        rows: np.ndarray | Sequence[tuple[int, int]] | None = None,
        obs: Sequence[str] = (),
        masking: Masking | None = None,
        layer: str | None = None,
        use_raw: bool = False,
        gene_column: str | None = None,
        input: Expected = "auto",  # noqa: A002  (the name users know)
        device: torch.device | str = "cpu",
        threads: int | None = None,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        sampling = Sampling(
            batch_size=batch_size,
            max_entries=max_entries,
            shuffle=shuffle,
            block_size=block_size,
            buffer_size=buffer_size,
            seed=seed,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            share_batches=share_batches,
        )
        if sampler is not None:
            _refuse_options(sampling, weights)
        self.sampler, self._seed = sampler or sampling, seed
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, found {threads}")
        self.device, self.epoch, self.first_batch = torch.device(device), 0, 0
        self._threads = threads or min(usable_cores(), MOST_THREADS)
        self._memory_limit, self._masking = memory_limit, masking
        self._opened: list[Stream] = []
        self._closed = False
        reading = Reading(layer=layer, use_raw=use_raw, gene_column=gene_column, input=input)
        try:
            self.streams = [
                self._open(data, vocabulary, config, reading) for data in listed_inputs(inputs)
            ]
            self._prepare(weights, rows, obs)
        except BaseException:
            self.close()
            raise

    def _open(
        self,
        data: str | Path | AnnData | Stream,
        vocabulary: GeneVocabulary | None,
        config: CellPatchConfig | None,
        reading: Reading,
    ) -> Stream:
        if isinstance(data, CellStream | TokenStream):
            return data
        self._opened.append(open_stream(data, vocabulary, config, reading))
        return self._opened[-1]

    def _prepare(
        self,
        weights: np.ndarray | str | None,
        rows: np.ndarray | Sequence[tuple[int, int]] | None,
        obs: Sequence[str],
    ) -> None:
        self.n_cells = sum(stream.n_cells for stream in self.streams)
        self._chosen = Chosen(rows, self.n_cells)
        if isinstance(self.sampler, Sampling):
            warn_of_unequal_batches(self.sampler, len(self._chosen))
        self._sources = [stream.rows() for stream in self.streams]
        _check_same_types(self.streams)
        balanced = isinstance(weights, str)
        annotations = [stream.obs_table() for stream in self.streams] if obs or balanced else []
        names = [stream.name for stream in self.streams]
        columns = {name: read_column(annotations, names, name) for name in obs}
        self._obs = {name: column.values for name, column in columns.items()}
        self.categories = {
            name: column.categories
            for name, column in columns.items()
            if column.categories is not None
        }
        if isinstance(weights, str):
            weights = balancing_weights(read_column(annotations, names, weights), weights)
        if weights is not None and isinstance(self.sampler, Sampling):
            self.sampler = replace(self.sampler, weights=self._chosen_weights(weights))
        if self._masking is not None:
            self._prepare_masking()

    def _prepare_masking(self) -> None:
        """Which genes each input measured, and which input each cell is from."""
        tables = [stream.measured() for stream in self.streams]
        firsts = np.cumsum([0, *map(len, tables)])[:-1]
        inputs = [stream.input_of_cells() for stream in self.streams]
        self._measured = Measured(np.concatenate(tables))
        self._inputs = np.concatenate(
            [rows.astype(np.int32) + first for rows, first in zip(inputs, firsts, strict=True)],
            dtype=np.int32,
        )

    def _chosen_weights(self, weights: np.ndarray) -> np.ndarray:
        """The weights of the chosen cells."""
        weights = np.asarray(weights, np.float64)
        if weights.shape != (self.n_cells,):
            raise ValueError(
                f"weights must be one number per cell, [{self.n_cells}], found "
                f"{list(weights.shape)}"
            )
        return weights[self._chosen.rows(np.arange(len(self._chosen)))]

    def __len__(self) -> int:
        """Batches per epoch of this rank (`TypeError` with ``max_entries``)."""
        return self.sampler.batches_per_epoch(len(self._chosen))

    def __iter__(self) -> Generator[CellBatch]:
        number, first_batch = self.epoch, self.first_batch
        self.epoch, self.first_batch = number + 1, 0
        assembly = Assembly(
            self._sources,
            self._chosen,
            obs=self._obs,
            mask=self._mask(number),
            device=self.device,
        )
        size = min(WINDOW_BYTES, self._memory_limit // WINDOWS_IN_MEMORY)
        epoch = Epoch(
            number=number,
            cells=len(self._chosen),
            lengths=assembly.lengths,
            window_entries=min(WINDOW_ENTRIES, size // assembly.entry_bytes),
        )
        windows = checked_windows(self.sampler.windows(epoch), epoch.cells, first_batch)
        return self._until_closed(run(assembly, windows, self._threads, self._memory_limit))

    def _until_closed(self, batches: Generator[CellBatch]) -> Generator[CellBatch]:
        with contextlib.closing(batches):
            while not self._closed:
                try:
                    yield next(batches)  # kept by nobody but the consumer
                except StopIteration:
                    return
        raise ValueError("the loader was closed: keep it open while iterating over it")

    def _mask(self, number: int) -> Mask | None:
        """What hides genes in the epoch of this number."""
        if self._masking is None:
            return None

        def hide(cells: RaggedCells, rows: np.ndarray) -> Masked:
            return mask(
                cells,
                rows,
                measured=self._measured,
                inputs=self._inputs[rows],
                masking=self._masking,
                seed=self._seed,
                epoch=number,
            )

        return hide

    def close(self) -> None:
        """Close what this has opened."""
        self._closed = True
        for stream in self._opened:
            stream.close()

    def __enter__(self) -> CellLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def listed_inputs(inputs: Any) -> list[Any]:
    """One input, or several, as a list."""
    several = isinstance(inputs, Sequence) and not isinstance(inputs, str)
    listed = list(inputs) if several else [inputs]
    if not listed:
        raise InputError("no input was given")
    return listed


def _refuse_options(sampling: Sampling, weights: np.ndarray | str | None) -> None:
    """Raise `ValueError` if there are options that a sampler of the user's would not see."""
    given = [
        option.name
        for option in fields(Sampling)
        if option.name != "seed" and getattr(sampling, option.name) != option.default
    ]
    given += ["weights"] if weights is not None else []
    if given:
        raise ValueError(
            f"a sampler decides on its own which cells come in which batch: leave out "
            f"{', '.join(given)}, or leave out the sampler"
        )


def _check_same_types(streams: Sequence[Stream]) -> None:
    """Raise `InputError` unless all inputs give tokens and values of the same kind."""
    first = streams[0]
    for other in streams[1:]:
        if other.preprocessing != first.preprocessing:
            raise InputError(
                f"{first.name} and {other.name} were prepared differently: {first.preprocessing} "
                f"and {other.preprocessing}. Make their token stores with the same model."
            )
        if other.vocabulary_fingerprint != first.vocabulary_fingerprint:
            raise InputError(
                f"{first.name} and {other.name} have different vocabularies (fingerprints "
                f"{first.vocabulary_fingerprint[:12]} and {other.vocabulary_fingerprint[:12]}). "
                "Make their token stores with the same model."
            )
        if other.rows().types != first.rows().types:
            raise InputError(
                f"{first.name} and {other.name} store values as {first.rows().types[1]} and "
                f"{other.rows().types[1]}: read token stores of continuous values on their own"
            )
