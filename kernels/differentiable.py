"""The encoder where gradients are needed: training, and attention alone.

The projected tables are made by PyTorch, so that autograd carries their gradients on to the gene
embedding and the projections: two products of [genes, D] by [D, D], 0.2 GFLOP at the paper's sizes,
once per step. The cross-attention is the operator of `attention.py`, which never holds anything of
size entries x patches. What follows works on one tile of patches per cell and is the reference's.

On a CPU only the rows of the genes that occur in the batch are used: of 70,000 a small batch has a
few thousand. In training these rows alone are projected, because the products of all of them,
forward and backward, took longer than the attention of 64 cells; a processor's library may round a
row otherwise when it comes with others, so there a cell's result depends on its batch, by rounding.
Where nothing is recorded, the whole tables are projected once and kept, and it does not.

Two things become ordinary inputs of the operator here:

- What all keys and all values have in common (biases) is added to the rows of the tables: in the
  softmax it cancels, but where weights are dropped it does not leave the values unchanged.
- The padding tokens of a cell are one more entry: gene 0, value 0, biased by the logarithm of
  their number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .attention import attend
from .checks import integer_range
from .kept import Kept
from .ragged import RaggedAttention
from .reference import Encoded
from .weights import EncoderWeights


def encode(
    weights: EncoderWeights,
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    *,
    pads: Tensor | None,
    mean: bool,
    dropout: float,
    backend: str,
) -> Encoded:
    """As `reference.encode`, with the cross-attention on a fast backend."""
    attended, _ = patch_attention(
        weights, offsets, genes, values, pads=pads, dropout=dropout, backend=backend
    )
    features = reference.finish(weights, attended, dropout=dropout).features.float()
    return Encoded(reference.mean_over_patches(features) if mean else features)


def patch_attention(
    weights: EncoderWeights,
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    *,
    pads: Tensor | None,
    dropout: float,
    backend: str,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attended values [c, p, D] and log-sum-exp [c, h, p] of the encoder's cross-attention.

    ``bias`` [n] is added to all scores of an entry.
    """
    entries = _Entries(offsets, genes, values, bias)
    if pads is not None:
        entries = _with_pads(entries, pads)
    if genes.device.type == "cuda" or torch.compiler.is_compiling():
        projected = _project(weights)
    else:
        rows, entries = _rows_that_occur(len(weights.genes), entries)
        if needs_gradient(weights, values):
            projected = _project(weights._replace(genes=weights.genes[rows]))
        else:
            whole = kept.of(weights)
            projected = whole._replace(key=whole.key[rows], value=whole.value[rows])
    found = attend(
        RaggedAttention(
            query=projected.query,
            key=projected.key,
            value=projected.value,
            offsets=entries.offsets,
            ids=entries.genes,
            amounts=entries.values,
            key_part=projected.key_part,
            value_part=projected.value_part,
            bias=entries.bias,
            seed=None,
            scale=projected.query.shape[-1] ** -0.5,
            dropout=dropout,
        ),
        backend,
    )
    return found.output.flatten(2), found.log_sum_exp


def needs_gradient(weights: EncoderWeights, values: Tensor) -> bool:
    """Whether autograd would record an encoding."""
    inputs = (*weights.tensors(), values)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


class _Projected(NamedTuple):
    query: Tensor  # [1, p, h, d]
    key: Tensor  # [g, h, d]
    value: Tensor  # [g, h, d]
    key_part: Tensor  # [h, d] or [bins, h, d]
    value_part: Tensor


def _project(weights: EncoderWeights) -> _Projected:
    wq, wk, wv = weights.cross.in_weight.chunk(3)
    bq, bk, bv = weights.cross.in_bias.chunk(3)
    if weights.value_bins is not None:
        amount = weights.value_bins  # [bins, D]
    else:
        assert weights.value_weight is not None
        assert weights.value_bias is not None
        amount = weights.value_weight  # [D]
        bk, bv = F.linear(weights.value_bias, wk, bk), F.linear(weights.value_bias, wv, bv)

    def split(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (weights.heads, -1))

    return _Projected(
        split(F.linear(weights.patches, wq, bq))[None],
        split(F.linear(weights.genes, wk, bk)),
        split(F.linear(weights.genes, wv, bv)),
        split(F.linear(amount, wk)),
        split(F.linear(amount, wv)),
    )


kept = Kept(_project)


class _Entries(NamedTuple):
    offsets: Tensor  # [c + 1]
    genes: Tensor  # [n]
    values: Tensor  # [n]
    bias: Tensor | None  # [n]


def _with_pads(entries: _Entries, pads: Tensor) -> _Entries:
    """The entries, each cell's with one before them that stands for its pads."""
    count, cells = len(entries.genes), len(pads)
    offsets = entries.offsets.long()
    cell = torch.repeat_interleave(  # [n]: the cell each entry belongs to
        torch.arange(cells, device=pads.device), offsets.diff(), output_size=count
    )
    place = torch.arange(count, device=pads.device) + cell + 1
    starts = offsets + torch.arange(cells + 1, device=pads.device)
    genes = torch.zeros(count + cells, dtype=torch.int32, device=pads.device)
    values = entries.values.new_zeros(count + cells)
    bias = torch.zeros(count + cells, device=pads.device)
    if entries.bias is not None:
        bias = bias.index_put((place,), entries.bias.to(bias.dtype))
    return _Entries(
        starts,
        genes.index_put((place,), entries.genes.int()),
        values.index_put((place,), entries.values),
        bias.index_put((starts[:-1],), pads.to(bias.dtype).log()),
    )


def _rows_that_occur(genes: int, entries: _Entries) -> tuple[Tensor | slice, _Entries]:
    """Which of a table's rows a batch needs, ascending, and entries that name them by place."""
    everything = slice(None)
    if not len(entries.genes):
        return everything, entries
    lowest, highest = integer_range(entries.genes)
    if lowest < 0 or highest >= genes:
        return everything, entries  # the operator says what is wrong
    tokens = entries.genes.long()  # [n]
    occurs = torch.zeros(genes, dtype=torch.bool)
    occurs[tokens] = True
    places = occurs.cumsum(0) - 1  # [g]
    return occurs.nonzero().squeeze(1), entries._replace(genes=places[tokens])
