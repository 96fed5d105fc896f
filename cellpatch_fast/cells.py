"""RaggedCells, the one batch type that everything passes around; CellBlock, cells as stored.

A batch of cells is a CSR matrix without its column space: ``offsets`` says which entries belong
to which cell, ``genes`` and ``values`` hold the entries. There is no padding anywhere, so a
cell's neighbours in a batch cannot influence it, and memory is what the non-zeros need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .kernels.checks import check_types


@dataclass(frozen=True, eq=False)
class RaggedCells:
    """A batch of cells, each a run of (gene, value) entries.

    Parameters
    ----------
    offsets
        int64 or int32 [cells + 1], starting at 0 and never decreasing; cell ``c`` owns the
        entries ``offsets[c] : offsets[c + 1]``.
    genes
        uint16, uint32, int32 or int64 [entries]: gene token ids.
    values
        uint8 (binned) or floating point (continuous) [entries]: expression values.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices do not fit together. The *contents* are checked by
        `validate`, which costs a pass over the data.
    """

    offsets: Tensor  # [c + 1]
    genes: Tensor  # [n]
    values: Tensor  # [n]

    def __post_init__(self) -> None:
        check_types(self.offsets, self.genes, self.values)
        if len(self.offsets) == 0:
            raise ValueError("offsets needs at least one element: it has one more than the cells")
        if not self.offsets.device == self.genes.device == self.values.device:
            raise ValueError(
                f"offsets, genes and values are on different devices: {self.offsets.device}, "
                f"{self.genes.device}, {self.values.device}"
            )

    def __len__(self) -> int:
        """The number of cells."""
        return len(self.offsets) - 1

    @property
    def entries(self) -> int:
        """The number of entries of all cells together."""
        return len(self.genes)

    @property
    def device(self) -> torch.device:
        return self.genes.device

    @property
    def lengths(self) -> Tensor:
        """Entries of each cell, int64 [cells]."""
        return self.offsets.long().diff()

    def validate(self, genes: int | None = None) -> None:
        """Check the contents: offsets start at 0, never decrease, end at ``entries``.

        Parameters
        ----------
        genes
            Number of gene tokens; every token must be below it.

        Raises
        ------
        ValueError
            Naming the first offending position.
        """
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != self.entries:
            raise ValueError(
                f"offsets must run from 0 to the number of entries ({self.entries}); they run "
                f"from {int(self.offsets[0])} to {int(self.offsets[-1])}"
            )
        decreasing = torch.nonzero(self.lengths < 0)
        if len(decreasing):
            raise ValueError(f"offsets decrease after cell {int(decreasing[0])}")
        if genes is not None and self.entries:
            tokens = self.genes.long()
            outside = torch.nonzero((tokens < 0) | (tokens >= genes))
            if len(outside):
                entry = int(outside[0])
                raise ValueError(
                    f"entry {entry} has gene token {int(tokens[entry])}, but the model knows "
                    f"tokens 0 to {genes - 1}"
                )

    def slice(self, start: int, stop: int) -> RaggedCells:
        """Cells ``start`` to ``stop`` (views, except for the offsets)."""
        start, stop, _ = slice(start, stop).indices(len(self))
        offsets = self.offsets[start : max(start, stop) + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return RaggedCells(offsets - first, self.genes[first:last], self.values[first:last])

    def take(self, order: Tensor) -> RaggedCells:
        """The cells ``order`` (int64 [cells chosen]), in that order."""
        lengths = self.lengths[order]
        offsets = _offsets(lengths)
        # entry k of a chosen cell lies k places after that cell's first entry
        shift = self.offsets.long()[:-1][order] - offsets[:-1]
        entries = torch.arange(int(offsets[-1]), device=self.device)
        entries = entries + torch.repeat_interleave(shift, lengths)
        return RaggedCells(offsets, _index(self.genes, entries), self.values[entries])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RaggedCells:
        """The same cells on ``device``."""
        return RaggedCells(
            self.offsets.to(device, non_blocking=non_blocking),
            self.genes.to(device, non_blocking=non_blocking),
            self.values.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> RaggedCells:
        """The same cells in page-locked memory."""
        return RaggedCells(
            self.offsets.pin_memory(), self.genes.pin_memory(), self.values.pin_memory()
        )

    @classmethod
    def concatenate(cls, batches: Sequence[RaggedCells]) -> RaggedCells:
        """All cells of ``batches``, one batch after the other."""
        if not batches:
            raise ValueError("concatenate needs at least one batch")
        kinds = sorted({f"{batch.genes.dtype}, {batch.values.dtype}" for batch in batches})
        if len(kinds) > 1:
            raise ValueError(
                f"the batches differ in the types of genes and values: {'; '.join(kinds)}"
            )
        lengths = torch.cat([batch.lengths for batch in batches])
        return cls(
            _offsets(lengths),
            torch.cat([batch.genes for batch in batches]),
            torch.cat([batch.values for batch in batches]),
        )

    @classmethod
    def from_padded(cls, genes: Tensor, values: Tensor, keep: Tensor) -> RaggedCells:
        """Drop the padding of [cells, length] tensors; ``keep`` is true where an entry is real."""
        return cls(_offsets(keep.sum(1)), genes[keep], values[keep])

    def to_padded(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """``(genes, values)`` as [cells, length], padded with gene 0 and value 0."""
        lengths = self.lengths
        longest = int(lengths.max()) if len(self) else 0
        length = longest if length is None else length
        if length < longest:
            raise ValueError(f"a cell has {longest} entries, more than the padded length {length}")
        keep = torch.arange(length, device=self.device) < lengths[:, None]  # [c, length]
        genes = torch.zeros(keep.shape, dtype=torch.int64, device=self.device)
        values = torch.zeros(keep.shape, dtype=self.values.dtype, device=self.device)
        genes[keep] = self.genes.long()
        values[keep] = self.values
        return genes, values


def _offsets(lengths: Tensor) -> Tensor:
    """int64 [cells + 1] from [cells] lengths."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def _index(tensor: Tensor, entries: Tensor) -> Tensor:
    """``tensor[entries]``, also for the unsigned types that PyTorch cannot index."""
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32}.get(tensor.dtype)
    if signed is None:
        return tensor[entries]
    return tensor.view(signed)[entries].view(tensor.dtype)


@dataclass(frozen=True, eq=False)
class CellBlock:
    """A run of cells in file order, as a CSR matrix.

    Parameters
    ----------
    start
        Position of the first cell in the source.
    indptr
        int64 [cells + 1], starting at 0: cell ``start + c`` owns the entries
        ``indptr[c] : indptr[c + 1]``.
    indices
        Integers [entries]: columns, that is rows of the source's ``var``.
    data
        Any integer or floating-point dtype, as stored [entries].
    positions
        int64 [cells]: positions of the cells in the source, where they are not a run from
        ``start`` on.

    The arrays may be views of the data of an AnnData object: do not write to them.
    """

    start: int
    indptr: np.ndarray  # [c + 1]
    indices: np.ndarray  # [n]
    data: np.ndarray  # [n]
    positions: np.ndarray | None = None  # [c]

    def __len__(self) -> int:
        """The number of cells."""
        return len(self.indptr) - 1

    def position(self, cell: int) -> int:
        """Where the block's ``cell`` is in the source."""
        return self.start + cell if self.positions is None else int(self.positions[cell])

    @property
    def stop(self) -> int:
        """Position after the last cell."""
        return self.start + len(self)
