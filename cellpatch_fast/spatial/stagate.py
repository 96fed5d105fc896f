"""STAGATE: an autoencoder of a spot and its neighbours, whose loss never forms what it predicts.

The network [d, 512, 30, 512, d] (Dong & Zhang, 2022) has one head of attention and no bias:

    w_ij = softmax over neighbours j of i, and i itself, of sigmoid(a_source·h_j + a_target·h_i)
    h = x W1;  h1_i = ELU(Σ_j w_ij h_j);  z = h1 W2
    h3_i = ELU(Σ_j w_ij (z W2ᵀ)_j);  x̂ = h3 W1ᵀ

Layer 3 reuses the weights w of layer 1, and the decoder the encoder's matrices. What makes it fast:

- **x is sparse**, and so is x W1. The mean squared error of x̂, [spots, genes], does not need x̂:
  ‖x - h3 W1ᵀ‖² = ‖x‖² - 2⟨h3, x W1⟩ + ⟨h3ᵀh3, W1ᵀW1⟩, with x W1 from the encoder. This is exact.
- **Layer 3 aggregates before it projects**: 30 columns instead of 512.
- sigmoid is between 0 and 1, so the softmax needs no maximum: weights are exponentials, and what
  they are summed to is divided by their sum.

Aggregation, and products with x, are `kernels.sparse_product`: deterministic, also on a GPU.

Loss of part of a tissue: `Piece` says which spots count (the core, first) and which are there
because the others' neighbours, and theirs, are needed: two layers aggregate, so a halo of two
steps makes a part exact. Losses and gradients of parts add up to those of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..kernels import SparsePattern, sparse_product
from .choices import Tie

GAIN = 1.414  # of the weights that STAGATE's code draws
GRAM_COLUMNS = 128  # computed at a time: fewer would cost more than symmetry saves


class Piece(NamedTuple):
    """Some spots of a tissue: those whose loss is computed, then their surroundings.

    Spots are in the order core, one step away, two steps away.
    """

    core: int  # spots whose loss counts
    expression: SparsePattern  # [spots, genes]
    entries: Tensor  # float32, of `expression`
    features: Tensor | None  # float32 [spots, features]
    graph: SparsePattern  # [core and one step, spots]: neighbours, and each spot itself

    def to(self, device: torch.device | str) -> Piece:
        """The piece on another device."""
        return Piece(
            core=self.core,
            expression=self.expression.to(device),
            entries=self.entries.to(device),
            features=None if self.features is None else self.features.to(device),
            graph=self.graph.to(device),
        )


@dataclass(frozen=True)
class StagateConfig:
    """What a network looks like.

    Parameters
    ----------
    genes, features
        Numbers per spot: expression values, and others beside them (not predicted).
    expression
        Whether the expression is part of the input; else features alone are.
    hidden, output
        Widths of the first and of the second layer; the output is the embedding.
    tie
        ``"true"``: the decoder's matrices are the encoder's. ``"alias"``: as the published PyTorch
        code has it, two parameters in the same memory: the optimiser steps it twice, once with the
        encoder's gradient and once with the decoder's.
    dense
        A linear layer with bias from what the decoder predicts of all inputs to the genes.
    """

    genes: int
    features: int = 0
    expression: bool = True
    hidden: int = 512
    output: int = 30
    tie: Tie = "true"
    dense: bool = False

    def __post_init__(self) -> None:
        if self.genes < 1 or self.hidden < 1 or self.output < 1 or self.features < 0:
            raise InputError(f"a network needs genes and widths of at least 1, found {self}")
        if self.tie not in get_args(Tie):
            raise InputError(f"unknown tie {self.tie!r}: choose {' or '.join(get_args(Tie))}")
        if not self.expression and not (self.features and self.dense):
            raise InputError("features alone as input need features, and a dense layer to genes")

    @property
    def inputs(self) -> int:
        """Numbers per spot that the network takes in."""
        return self.features + (self.genes if self.expression else 0)


class Stagate(nn.Module):
    """The network; see the module.

    Parameters
    ----------
    config
        Its shape.
    backend
        Of sparse products; see `kernels.sparse_product`.
    """

    def __init__(self, config: StagateConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.hidden_weight = _drawn(config.inputs, config.hidden)  # features' rows after genes'
        self.output_weight = _drawn(config.hidden, config.output)
        spread = GAIN * math.sqrt(1 / config.hidden)
        self.source_attention = nn.Parameter(torch.randn(config.hidden) * spread)
        self.target_attention = nn.Parameter(torch.randn(config.hidden) * spread)
        if config.tie == "alias":
            self.decoder_hidden_weight = nn.Parameter(self.hidden_weight.detach())
            self.decoder_output_weight = nn.Parameter(self.output_weight.detach())
        self.dense = nn.Linear(config.inputs, config.genes) if config.dense else None

    def _apply(self, function: Any, recurse: bool = True) -> Stagate:
        """As of any module, but what lies in the same memory stays there."""
        super()._apply(function, recurse)
        if self.config.tie == "alias":
            self.decoder_hidden_weight.data = self.hidden_weight.data
            self.decoder_output_weight.data = self.output_weight.data
        return self

    def embed(self, piece: Piece) -> Tensor:
        """Embedding of the core's spots and of those one step away, [spots, output]."""
        return self._encode(piece)[0]

    forward = embed

    def squared_error(self, piece: Piece) -> Tensor:
        """Sum over the core's spots and all genes, a float64 scalar."""
        z, weights, totals, projected = self._encode(piece)
        hidden, output = self._decoder()
        decoding = _first_rows(piece.graph, piece.core, len(z))
        mixed = sparse_product(decoding, weights[: len(decoding.columns)], z, backend=self.backend)
        h = F.elu((mixed / totals[: piece.core]) @ output.T)  # [core, hidden]
        core = _first_rows(piece.expression, piece.core, piece.expression.shape[1])
        entries = piece.entries[: len(core.columns)]
        genes = self.config.genes
        back, bias = (hidden[:genes], None) if self.dense is None else self._dense(hidden)
        image = (
            projected[: piece.core]  # the encoder has it
            if self.dense is None and self.config.tie == "true"
            else sparse_product(core, entries, back, backend=self.backend)
        )
        squares = torch.linalg.vector_norm(entries, dtype=torch.float64) ** 2
        error = squares + quadratic_form(h, back, image)
        if bias is None:
            return error
        sums = torch.zeros(genes, dtype=torch.float64, device=h.device)
        sums = sums.index_add(0, core.columns, entries.double())
        bias = bias.double()
        error = error - 2 * bias @ sums + piece.core * bias @ bias
        return error + 2 * h.sum(0, dtype=torch.float64) @ (back.T.double() @ bias)

    def _encode(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embedding, weights of the graph's edges, their sums [targets, 1], and x W1."""
        genes = self.config.genes if self.config.expression else 0
        parts = []
        if genes:
            weight = self.hidden_weight[:genes]
            parts.append(
                sparse_product(piece.expression, piece.entries, weight, backend=self.backend)
            )
        if self.config.features:
            assert piece.features is not None
            parts.append(piece.features @ self.hidden_weight[genes:])
        h = parts[0] if len(parts) == 1 else parts[0] + parts[1]  # [spots, hidden]
        weights = self._edge_weights(piece.graph, h)
        ones = weights.new_ones((piece.graph.shape[1], 1))
        totals = sparse_product(piece.graph, weights, ones, backend=self.backend)
        mixed = sparse_product(piece.graph, weights, h, backend=self.backend) / totals
        return F.elu(mixed) @ self.output_weight, weights, totals, parts[0]

    def _edge_weights(self, graph: SparsePattern, h: Tensor) -> Tensor:
        """exp(sigmoid(score)) of each edge, [n]: at most e, so that sums need no maximum."""
        target = torch.arange(graph.shape[0], device=h.device)
        target = target.repeat_interleave(graph.offsets.diff(), output_size=len(graph.columns))
        of_source = (h @ self.source_attention)[graph.columns]
        of_target = (h[: graph.shape[0]] @ self.target_attention)[target]
        return torch.sigmoid(of_source + of_target).exp()

    def _decoder(self) -> tuple[Tensor, Tensor]:
        if self.config.tie == "true":
            return self.hidden_weight, self.output_weight
        return self.decoder_hidden_weight, self.decoder_output_weight

    def _dense(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The last two layers in one: a matrix [genes, hidden], and a bias [genes]."""
        assert self.dense is not None
        return self.dense.weight @ hidden, self.dense.bias


def _drawn(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(rows, columns), gain=GAIN))


def _first_rows(pattern: SparsePattern, rows: int, columns: int) -> SparsePattern:
    """The pattern of the first rows of a matrix, whose entries are in the first columns."""
    if (rows, columns) == pattern.shape:
        return pattern
    entries = int(pattern.offsets[rows])
    kept = pattern.order < entries
    counts = F.pad(kept.long().cumsum(0), (1, 0))[pattern.column_offsets[: columns + 1]]
    return SparsePattern(
        pattern.offsets[: rows + 1],
        pattern.columns[:entries],
        counts,
        pattern.rows[kept],
        pattern.order[kept],
    )


def quadratic_form(h: Tensor, back: Tensor, image: Tensor) -> Tensor:
    """‖h backᵀ‖² - 2⟨h, image⟩, a float64 scalar, without anything of size [spots, genes].

    Parameters
    ----------
    h
        [spots, hidden].
    back
        [genes, hidden].
    image
        x · back, [spots, hidden]: an argument of its own, so that whoever has it passes it on.
    """
    form: Tensor = _QuadraticForm.apply(h, back, image)
    return form


def _gram(rows: Tensor) -> Tensor:
    """rowsᵀ rows; of what is symmetric, little more than half is computed."""
    size = rows.shape[1]
    result = rows.new_empty((size, size))
    for start in range(0, size, GRAM_COLUMNS):
        stop = min(size, start + GRAM_COLUMNS)
        result[start:stop, start:] = rows[:, start:stop].T @ rows[:, start:]
        result[stop:, start:stop] = result[start:stop, stop:].T
    return result


class _QuadraticForm(torch.autograd.Function):
    """Autograd would multiply four times in the backward, for want of knowing the symmetry."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, back: Tensor, image: Tensor) -> Tensor:
        of_genes, of_spots = _gram(back), _gram(h)  # [hidden, hidden]
        ctx.save_for_backward(h, back, image, of_genes, of_spots)
        crossed = (h * image).sum(dtype=torch.float64)
        return (of_genes.double() * of_spots.double()).sum() - 2 * crossed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, back, image, of_genes, of_spots = ctx.saved_tensors
        factor = (2 * gradients[0]).to(h.dtype)
        return (
            torch.addmm(image, h, of_genes, beta=-1).mul_(factor),
            (back @ of_spots).mul_(factor),
            h * -factor,
        )
