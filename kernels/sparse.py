"""Sparse times dense: sums of a dense matrix's rows, weighted by the entries of a sparse one.

One operation serves what a network on a graph needs: sums over the neighbours of a spot, with
weights that are learned, and products of a sparse expression matrix with a dense one, or of its
transpose. Its gradients are the same operation, by columns instead of rows, and one inner product
per entry.

The *pattern* of a matrix, where its entries are, is sorted by rows and by columns once and then
used in every step. Each number of a result is one sum in a fixed order: bits are the same on every
run, with any number of threads, on GPUs too, where scatters by atomics are not.

FLOP for n entries and d columns: 2·n·d forward, 4·n·d backward. Bytes: 4·n·d, from caches where the
dense matrix (Numba: 64 columns of it at a time) fits into them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import resolve_backend
from .checks import OFFSET_DTYPES, check_offsets_contents, integer_range, looks_at_contents
from .sparse_ops import multiply


class SparsePattern(NamedTuple):
    """Where the entries of a sparse matrix are, by rows (CSR) and by columns. See `pattern_of`."""

    offsets: Tensor  # int64 [rows + 1]
    columns: Tensor  # int64 [n]
    column_offsets: Tensor  # int64 [columns + 1]
    rows: Tensor  # int64 [n], of the entries sorted by column
    order: Tensor  # int64 [n]: which entry each of those is

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.offsets.shape[0] - 1, self.column_offsets.shape[0] - 1

    def transposed(self) -> SparsePattern:
        """The pattern of the transposed matrix, whose entries are sorted by this one's columns."""
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(self.order), device=self.order.device)
        return SparsePattern(self.column_offsets, self.rows, self.offsets, self.columns, back)

    def to(self, device: torch.device | str) -> SparsePattern:
        """The pattern on another device."""
        return SparsePattern(*(tensor.to(device) for tensor in self))


def pattern_of(offsets: Tensor, columns: Tensor, width: int) -> SparsePattern:
    """The pattern of a matrix in CSR form.

    Parameters
    ----------
    offsets
        int32 or int64 [rows + 1]; row ``r`` owns the entries ``offsets[r] : offsets[r + 1]``.
    columns
        int32 or int64 [n], below ``width``. A row may have a column twice: both count.
    width
        Columns of the matrix.

    Raises
    ------
    ValueError
        If offsets or columns do not fit.
    """
    for name, tensor in (("offsets", offsets), ("columns", columns)):
        if tensor.ndim != 1 or tensor.dtype not in OFFSET_DTYPES:
            raise ValueError(
                f"{name} must be one-dimensional, int32 or int64; found shape "
                f"{list(tensor.shape)}, {tensor.dtype}"
            )
    if len(offsets) == 0:
        raise ValueError("offsets needs at least one element: it has one more than the rows")
    check_offsets_contents(offsets, len(columns))
    lowest, highest = integer_range(columns)
    if len(columns) and (lowest < 0 or highest >= width):
        raise ValueError(
            f"columns run from {lowest} to {highest}, but the matrix has columns 0 to {width - 1}"
        )
    offsets, columns = offsets.long().contiguous(), columns.long().contiguous()
    order = torch.argsort(columns, stable=True)
    row = torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())
    counts = torch.bincount(columns, minlength=width)
    column_offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return SparsePattern(offsets, columns, column_offsets, row[order], order)


def sparse_product(
    pattern: SparsePattern, entries: Tensor, dense: Tensor, *, backend: str | None = None
) -> Tensor:
    """A sparse matrix times a dense one, differentiable in both.

    Parameters
    ----------
    pattern
        Where the sparse matrix, [rows, columns], has its entries.
    entries
        Its entries [n], in the order of the pattern's rows: float32, or the reference any floating
        dtype.
    dense
        [columns, d], of the same dtype.
    backend
        ``"reference"``, ``"numba"`` (CPU) or ``"triton"`` (CUDA); None for the fastest, which for
        other dtypes than float32 is the reference.

    Returns
    -------
    Tensor
        [rows, d]. By Numba and Triton, bits are the same on every run, and a row's depend on that
        row's entries, and the rows of ``dense`` that it names, alone; so do those of gradients.

    Raises
    ------
    ValueError
        If shapes, dtypes, devices or the backend do not fit.

    Examples
    --------
    Means over the neighbours of three spots, the first two of which are neighbours:

    >>> pattern = pattern_of(torch.tensor([0, 2, 4, 5]), torch.tensor([0, 1, 0, 1, 2]), 3)
    >>> weights = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0])
    >>> sparse_product(pattern, weights, torch.tensor([[2.0], [4.0], [7.0]])).flatten()
    tensor([3., 3., 7.])
    """
    _check(pattern, entries, dense)
    chosen = resolve_backend(backend, dense.device)
    if dense.dtype != torch.float32:
        if backend not in (None, "reference"):
            raise ValueError(
                f"the {backend} backend multiplies in float32, found {dense.dtype}: use "
                "backend='reference'"
            )
        chosen = "reference"
    if chosen == "reference":
        return reference_product(pattern, entries, dense)
    return multiply(pattern, entries, dense, chosen)


def reference_product(pattern: SparsePattern, entries: Tensor, dense: Tensor) -> Tensor:
    """The definition, and the oracle of tests: every entry's row is looked up, and added up."""
    rows, _ = pattern.shape
    row = torch.arange(rows, device=dense.device).repeat_interleave(pattern.offsets.diff())
    terms = entries[:, None] * dense[pattern.columns]  # [n, d]
    return dense.new_zeros((rows, dense.shape[1])).index_add(0, row, terms)


def _check(pattern: SparsePattern, entries: Tensor, dense: Tensor) -> None:
    _, columns = pattern.shape
    if entries.shape != pattern.columns.shape:
        raise ValueError(
            f"the pattern has {pattern.columns.shape[0]} entries, found entries of shape "
            f"{list(entries.shape)}"
        )
    if dense.ndim != 2 or dense.shape[0] != columns:
        raise ValueError(
            f"dense must be [{columns}, d], as the sparse matrix has {columns} columns; found "
            f"shape {list(dense.shape)}"
        )
    if not dense.is_floating_point() or entries.dtype != dense.dtype:
        raise ValueError(
            f"entries are {entries.dtype} and dense is {dense.dtype}: they need one floating dtype"
        )
    for name, tensor in (("entries", entries), ("dense", dense)):
        if tensor.device != pattern.offsets.device:
            raise ValueError(
                f"{name} are on {tensor.device}, but the pattern is on {pattern.offsets.device}"
            )
    if looks_at_contents(dense.device) and int(pattern.offsets[-1]) != len(pattern.columns):
        raise ValueError("the pattern's offsets do not fit its columns: make it with pattern_of")
