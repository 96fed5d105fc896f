"""Ragged attention, as every backend gets it: queries of a cell attend over the cell's entries.

One description serves the three uses of the operator: keys and values given per entry
(`ids` None), looked up in tables, or looked up and added to a part that an entry has an amount
of. CellPatch is the last: its patches are the queries, its projected genes the tables, and
expression values the amounts. `attention.py` has the public functions and says what each field
is for; here is only what backends need to know.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RaggedAttention(NamedTuple):
    """Checked input of the operator: contiguous; one floating dtype from query to value_part."""

    query: Tensor  # [1 or c, q, h, d]: the same for all cells, or per cell
    key: Tensor  # [r, h, d]: one row per entry, or of a table where there are ids
    value: Tensor  # [r, h, d]
    offsets: Tensor  # int64 [c + 1]
    ids: Tensor | None  # integers [n]: the row of each entry
    amounts: Tensor | None  # [n], uint8 or floating
    key_part: Tensor | None  # [h, d], times the amount; or [bins, h, d], where the amount is a bin
    value_part: Tensor | None  # as key_part
    bias: Tensor | None  # float32 [n, h]: added to scaled scores; an entry with -inf has no weight
    seed: Tensor | None  # int64 [1]: of the weights that are dropped
    scale: float  # of scores
    dropout: float  # probability that a weight is dropped

    # shapes rather than len(): an operator traced with symbolic shapes would fix a length

    @property
    def cells(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def entries(self) -> int:
        return (self.key if self.ids is None else self.ids).shape[0]

    @property
    def queries(self) -> int:
        return self.query.shape[1]

    @property
    def heads(self) -> int:
        return self.query.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def binned(self) -> bool:
        """Whether amounts are bins, each with a row of its own in the parts."""
        return self.key_part is not None and self.key_part.ndim == 3


class Gradients(NamedTuple):
    """Gradients of the tensors of a `RaggedAttention`; None where there is no such tensor."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_part: Tensor | None = None
    value_part: Tensor | None = None
    bias: Tensor | None = None
