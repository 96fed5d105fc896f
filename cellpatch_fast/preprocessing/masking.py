"""Masking for pretraining: what the encoder sees of a cell, and what the decoder predicts.

Some of a cell's genes are hidden from the encoder; the decoder predicts their values, and the 0 of
some genes that the cell's input measured but the cell does not express. The decisions:

- **A cell's masks depend on (seed, epoch, identity of the cell) alone**, whatever the batch, the
  order, and the number of threads or machines. A random number is a hash of these three and a
  counter (the finaliser of SplitMix64): there is no state to pass along.
- **The unit that is hidden is the gene.** Where a cell has several entries of one gene (two names
  that mean the same), they are hidden or seen together; otherwise the encoder would see a value of
  the gene that the decoder is asked for. The caps and the number of zeros count entries.
- **Counts are exact.** Of n genes floor(hidden · n + 1/2) are hidden (in float64), but at least one
  and at most n - 1. A cell with one gene or none is seen as it is, and nothing of it is predicted.
  Every set of genes of that size is as likely as any other (selection sampling).
- **What is cut is uniform too.** Beyond ``max_encoder`` the encoder sees a random subset of what is
  not hidden. Beyond ``max_decoder`` the decoder predicts a random subset of the hidden entries, as
  many as keep the ratio of hidden entries and zeros (at least one); the others stay hidden.
- **Zeros** are drawn from the measured genes without repetition: by rejection where at most half of
  them are expressed or drawn, from a list of the others where more are. Where fewer are left than
  wanted, all are taken and the missing ones counted.

One call masks a batch in one thread, without the GIL; callers divide their cells among threads. For
cells of 1,500 genes one core at 2.5 GHz masks 80 million entries/s.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cells import RaggedCells
from ..config import Masking
from .masking_compiled import hash_integer, mask_cells

__all__ = ["MaskCounts", "Masked", "Masking", "Measured", "mask"]


class Measured:
    """The gene tokens that each input measured; where a cell lacks one of them, its value is 0.

    Parameters
    ----------
    table
        bool or uint8 [inputs, vocabulary size]: whether the input measured the token.
    """

    def __init__(self, table: np.ndarray) -> None:
        if table.ndim != 2 or table.dtype not in (np.bool_, np.uint8):
            raise ValueError(
                "measured must be a table of bool or uint8, [inputs, vocabulary size]; found "
                f"{table.dtype} {list(table.shape)}"
            )
        self.inputs, self.vocabulary_size = table.shape
        lists = [np.flatnonzero(row).astype(np.int32) for row in table]
        self.tokens = np.concatenate([np.empty(0, np.int32), *lists])  # one list after the other
        self.starts = np.cumsum([0, *map(len, lists)])  # [i + 1], of an input's list


@dataclass(frozen=True)
class MaskCounts:
    """What became of the entries of some cells. Counts of several batches can be added.

    Parameters
    ----------
    hidden
        Entries hidden from the encoder.
    unseen
        Entries neither hidden nor seen by the encoder, beyond ``max_encoder``.
    unpredicted
        Hidden entries that the decoder does not predict, beyond ``max_decoder``.
    zeros
        Zeros that the decoder predicts.
    missing_zeros
        Zeros that could not be drawn, as too few genes are measured but not expressed.
    unmasked_cells
        Cells of which nothing is hidden or predicted, as they have fewer than two genes.
    """

    hidden: int = 0
    unseen: int = 0
    unpredicted: int = 0
    zeros: int = 0
    missing_zeros: int = 0
    unmasked_cells: int = 0

    def __add__(self, other: MaskCounts) -> MaskCounts:
        return MaskCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, eq=False)
class Masked:
    """What a model is pretrained on; cells, and the genes of a cell, are in their order.

    Parameters
    ----------
    encoder
        What the encoder sees of each cell.
    decoder
        The genes that the decoder predicts of each cell, with the values it should find.
    counts
        What was hidden, and what is left out of both.
    """

    encoder: RaggedCells
    decoder: RaggedCells
    counts: MaskCounts


def mask(
    cells: RaggedCells,
    identities: np.ndarray,
    *,
    measured: Measured,
    inputs: np.ndarray | None = None,
    masking: Masking | None = None,
    seed: int,
    epoch: int,
) -> Masked:
    """Divide cells into what the encoder sees and what the decoder predicts.

    Runs in the calling thread and releases the GIL.

    Parameters
    ----------
    cells
        Cells on the CPU, each cell's entries ordered by gene (as `tokenize` makes them).
    identities
        int64 [cells]: what tells a cell from all others, its position in the data set.
    measured
        The gene tokens that may be drawn as zeros.
    inputs
        int64 [cells]: the row of ``measured`` that a cell belongs to; the first without it.
    masking
        How much is hidden; the paper's numbers without it.
    seed, epoch
        0 to 2^64 - 1. Together with a cell's identity they determine its masks.

    Returns
    -------
    Masked
        With genes and values in the types of ``cells`` and int64 offsets.

    Raises
    ------
    ValueError
        If the entries of a cell are not ordered by gene, a token lies outside the vocabulary, or
        an input outside ``measured``, naming the cell; if the arguments do not fit together.
    """
    cells.validate()
    masking = masking or Masking()
    count = len(cells)
    identities = np.ascontiguousarray(identities, np.int64)
    inputs = np.zeros(count, np.int64) if inputs is None else np.ascontiguousarray(inputs, np.int64)
    if not identities.shape == inputs.shape == (count,):
        raise ValueError(
            f"{count} cells need as many identities and inputs; found {list(identities.shape)} "
            f"and {list(inputs.shape)}"
        )
    offsets = cells.offsets.long().numpy()
    genes, values = _bits(cells.genes), _bits(cells.values)
    if measured.vocabulary_size - 1 > torch.iinfo(cells.genes.dtype).max:
        raise ValueError(
            f"tokens below {measured.vocabulary_size} may be drawn, which {cells.genes.dtype} "
            "cannot hold"
        )
    encoder = _Ragged.empty(count, len(genes), genes.dtype, values.dtype)
    most = _most_predicted(np.diff(offsets), masking, measured.vocabulary_size)
    decoder = _Ragged.empty(count, int(most.sum()), genes.dtype, values.dtype)
    counts = np.zeros(len(fields(MaskCounts)), np.int64)
    refused = mask_cells(
        offsets=offsets,
        genes=genes,
        values=values,
        identities=identities.view(np.uint64),
        inputs=inputs,
        tokens=measured.tokens,
        starts=measured.starts,
        vocabulary_size=measured.vocabulary_size,
        hidden_share=masking.hidden,
        zeros_share=masking.zeros,
        max_encoder=masking.max_encoder,
        max_decoder=masking.max_decoder,
        digit=((measured.vocabulary_size - 1).bit_length() + 1) // 2,
        run=_run_key(seed, epoch),
        encoder=encoder,
        decoder=decoder,
        counts=counts,
    )
    if refused >= 0:
        raise _explain(refused, cells, int(inputs[refused]), measured)
    return Masked(encoder.like(cells), decoder.like(cells), MaskCounts(*counts.tolist()))


class _Ragged(NamedTuple):
    """Ragged cells as arrays, with room for more entries than they have in the end."""

    offsets: np.ndarray  # [c + 1]
    genes: np.ndarray
    values: np.ndarray

    @classmethod
    def empty(cls, cells: int, room: int, genes: np.dtype, values: np.dtype) -> _Ragged:
        return cls(np.zeros(cells + 1, np.int64), np.empty(room, genes), np.empty(room, values))

    def like(self, cells: RaggedCells) -> RaggedCells:
        """The entries in use, in the types of ``cells``."""
        entries = int(self.offsets[-1])
        return RaggedCells(
            torch.from_numpy(self.offsets),
            torch.from_numpy(self.genes[:entries]).view(cells.genes.dtype),
            torch.from_numpy(self.values[:entries]).view(cells.values.dtype),
        )


def _bits(tensor: Tensor) -> np.ndarray:
    """The elements as unsigned integers of their size: 0 stays 0, and nothing else is computed."""
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
    return tensor.contiguous().view(unsigned[tensor.itemsize]).numpy()


def _most_predicted(lengths: np.ndarray, masking: Masking, vocabulary_size: int) -> np.ndarray:
    """int64 [cells]: as many entries as the decoder may predict of cells of these lengths."""
    zeros = np.minimum(np.floor(masking.zeros * lengths + 0.5), vocabulary_size)
    return np.minimum(lengths + zeros, masking.max_decoder).astype(np.int64)


def _run_key(seed: int, epoch: int) -> np.uint64:
    """What all cells of an epoch have in common."""
    for name, number in (("seed", seed), ("epoch", epoch)):
        if not 0 <= number < 1 << 64:
            raise ValueError(f"{name} must lie between 0 and 2^64 - 1, found {number}")
    return np.uint64(hash_integer(np.uint64(hash_integer(np.uint64(seed))) ^ np.uint64(epoch)))


def _explain(cell: int, cells: RaggedCells, input_: int, measured: Measured) -> ValueError:
    """Why the compiled code refused a cell."""
    if not 0 <= input_ < measured.inputs:
        return ValueError(
            f"cell {cell} of the batch is of input {input_}, but only the genes that inputs 0 to "
            f"{measured.inputs - 1} measured are known"
        )
    genes = cells.slice(cell, cell + 1).genes.long()
    outside = genes[(genes < 0) | (genes >= measured.vocabulary_size)]
    if len(outside):
        return ValueError(
            f"cell {cell} of the batch has gene token {int(outside[0])}, but the vocabulary has "
            f"tokens 0 to {measured.vocabulary_size - 1}"
        )
    entry = int(torch.nonzero(genes.diff() < 0)[0])
    return ValueError(
        f"the entries of cell {cell} of the batch are not ordered by gene: token "
        f"{int(genes[entry + 1])} follows {int(genes[entry])}"
    )
