"""Encoder and decoder in plain PyTorch: the definition, and the oracle of every test.

Nothing here is clever. The cross-attention gathers one row per entry, takes a softmax over
each cell's entries by segment operations, and sums; everything is differentiable, runs on any
device and in any floating-point type. The order of summation over a cell's entries is PyTorch's
(``index_add_``), so results of different batches agree to rounding, not bit for bit: the bit
promise is kept by the fast backends.

The projected tables of the design are used here too, because they are exact: projecting 60,000
table rows and gathering is the same sum as gathering and projecting every entry.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ragged import RaggedAttention
from .weights import BlockWeights, DecoderWeights, EncoderWeights

LAYER_NORM_EPSILON = 1e-5


class Encoded(NamedTuple):
    """What the encoder returns.

    ``cross_attention`` [entries, heads, patches] holds each entry's attention weight, in the
    order of the entries; ``pad_attention`` [cells, heads, patches] that of *all* of a cell's
    pads together; ``self_attention`` one [cells, heads, patches, patches] per block. All are
    None unless asked for.
    """

    features: Tensor  # [c, p, E]
    cross_attention: Tensor | None = None
    pad_attention: Tensor | None = None
    self_attention: tuple[Tensor, ...] | None = None


class CrossAttended(NamedTuple):
    """Result of `patch_cross_attention`."""

    attended: Tensor  # [c, p, D], heads side by side, before the output projection
    log_sum_exp: Tensor  # [c, h, p], of the scores of entries and pads; -inf without any
    weights: Tensor  # [n, h, p]
    pad_weights: Tensor  # [c, h, p]


def encode(
    weights: EncoderWeights,
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    *,
    pads: Tensor | None = None,
    attention: bool = False,
    mean: bool = False,
    dropout: float = 0.0,
) -> Encoded:
    """Encode ragged cells into patch features.

    Parameters
    ----------
    weights
        The encoder's weights, all of one floating dtype, which is the dtype computed in.
    offsets, genes, values
        Ragged cells: [cells + 1], [entries], [entries].
    pads
        Padding tokens (gene 0, value 0) that each cell attends to besides its entries, [cells];
        None for none.
    attention
        Also return attention weights.
    mean
        Average the features over the patches.
    dropout
        Probability of dropping an attention weight (training).

    Returns
    -------
    Encoded
        Features [cells, patches, E], with ``mean`` [cells, E].
    """
    crossed = patch_cross_attention(weights, offsets, genes, values, pads=pads, dropout=dropout)
    finished = finish(weights, crossed.attended, dropout=dropout)
    if mean:
        finished = finished._replace(features=mean_over_patches(finished.features))
    if not attention:
        return Encoded(finished.features)
    return finished._replace(cross_attention=crossed.weights, pad_attention=crossed.pad_weights)


def finish(weights: EncoderWeights, attended: Tensor, *, dropout: float = 0.0) -> Encoded:
    """All that follows the cross-attention: features and self-attention weights.

    ``attended`` [cells, patches, D] is what `patch_cross_attention` returns.
    """
    x = finish_block(weights.cross, weights.patches, attended)  # [c, p, D]
    self_attention = []
    for block in weights.self_blocks:
        attended, attention_weights = _self_attention(block, x, weights.heads, dropout)
        x = finish_block(block, x, attended)
        self_attention.append(attention_weights)
    if weights.projection_weight is not None:
        x = F.linear(x, weights.projection_weight, weights.projection_bias)
    return Encoded(x, self_attention=tuple(self_attention))


def decode(
    weights: DecoderWeights, features: Tensor, offsets: Tensor, genes: Tensor, dropout: float = 0.0
) -> Tensor:
    """Predicted values [entries] of ragged prompts, from patch features [cells, patches, E].

    Everything floating is of one dtype, which is computed in. ``dropout`` is the probability of
    dropping an element of what the last product takes.
    """
    x = F.embedding(genes.long(), weights.genes)  # [n, D]
    context = features.flatten(0, 1)  # [c · p, E]: what the prompts attend to first
    spans = torch.arange(len(offsets), device=offsets.device) * features.shape[1]  # [c + 1]
    if weights.expansion_weight is not None:
        context = F.linear(context, weights.expansion_weight, weights.expansion_bias)
    for block in (weights.cross, *weights.self_blocks):
        query, key, value = (
            F.linear(rows, weight, bias).unflatten(-1, (weights.heads, -1))
            for rows, weight, bias in zip(
                (x, context, context), block.in_weight.chunk(3), block.in_bias.chunk(3), strict=True
            )
        )
        attended = entry_attention(query, key, value, offsets, spans, query.shape[-1] ** -0.5)
        x = finish_block(block, x, attended.flatten(1))
        context, spans = x, offsets  # then they attend to each other
    x = F.dropout(x, dropout)
    return F.linear(x, weights.output_weight, weights.output_bias).squeeze(-1)


def patch_cross_attention(
    weights: EncoderWeights,
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    *,
    pads: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> CrossAttended:
    """Patches attend over each cell's entries. An empty cell attends to nothing: zeros."""
    cells = len(offsets) - 1
    dtype = weights.patches.dtype
    cell = torch.repeat_interleave(  # [n]: the cell each entry belongs to
        torch.arange(cells, device=genes.device), offsets.long().diff()
    )
    queries, keys_table, values_table = project_tables(weights)  # [p, h, d], [g, h, d] twice
    value_keys, value_values = project_values(weights, values)  # [n, h, d] twice
    tokens = genes.long()
    keys = keys_table[tokens] + value_keys
    rows = values_table[tokens] + value_values
    scores = torch.einsum("phd,nhd->nhp", queries, keys)
    scores = scores if bias is None else scores + bias.to(dtype)[:, None, None]

    # The pads of a cell are one more key, weighted by their number.
    zero = torch.zeros(1, dtype=values.dtype, device=values.device)
    pad_key, pad_row = (
        table[:1] + part
        for table, part in zip(
            (keys_table, values_table), project_values(weights, zero), strict=True
        )
    )
    number = torch.zeros(cells, device=genes.device) if pads is None else pads.to(genes.device)
    pad_scores = (
        torch.einsum("phd,chd->chp", queries, pad_key) + number.to(dtype).log()[:, None, None]
    )  # [c, h, p]; -inf without pads

    highest = pad_scores.detach().clone()
    highest.scatter_reduce_(0, _expand(cell, scores), scores.detach(), "amax")
    # the highest score of a cell that attends to nothing is -inf: any finite number does
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    exps = torch.exp(scores - highest[cell])
    pad_exps = torch.exp(pad_scores - highest)
    total = pad_exps.index_add(0, cell, exps)  # [c, h, p]
    log_sum_exp = total.log() + highest
    total = torch.where(total == 0, torch.ones_like(total), total)
    attention = exps / total[cell]
    pad_attention = pad_exps / total
    kept = F.dropout(attention, dropout)
    attended = torch.einsum("chp,ahd->cphd", F.dropout(pad_attention, dropout), pad_row)
    attended = attended.index_add(0, cell, torch.einsum("nhp,nhd->nphd", kept, rows))
    return CrossAttended(attended.flatten(2), log_sum_exp, attention, pad_attention)


def ragged_attention(problem: RaggedAttention) -> tuple[Tensor, Tensor]:
    """Queries of each cell attend over the cell's entries.

    Returns
    -------
    output
        [cells, queries, heads, head_dim]; 0 for a cell that attends to nothing.
    log_sum_exp
        [cells, heads, queries], of the scaled and biased scores; -inf where there are none.
    """
    query, offsets = problem.query, problem.offsets
    cells = problem.cells
    lengths = offsets.diff()
    cell = torch.repeat_interleave(torch.arange(cells, device=query.device), lengths)  # [n]
    keys, values = problem.key, problem.value  # [n, h, d]
    if problem.ids is not None:
        rows = problem.ids.long()
        keys, values = keys[rows], values[rows]
    if problem.amounts is not None:
        assert problem.key_part is not None
        assert problem.value_part is not None
        keys = keys + _of_amounts(problem.amounts, problem.key_part)
        values = values + _of_amounts(problem.amounts, problem.value_part)
    if len(query) == 1:
        scores = torch.einsum("qhd,nhd->nhq", query[0], keys)
    else:
        scores = torch.einsum("nqhd,nhd->nhq", query[cell], keys)
    scores = scores * problem.scale
    if problem.bias is not None:
        scores = scores + problem.bias[:, :, None]

    highest = scores.new_full((cells, *scores.shape[1:]), -math.inf)
    highest.scatter_reduce_(0, _expand(cell, scores), scores.detach(), "amax")
    # the highest score of a cell that attends to nothing is -inf: any finite number does
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    exps = torch.exp(scores - highest[cell])
    total = torch.zeros_like(highest).index_add(0, cell, exps)  # [c, h, q]
    empty = total == 0
    total = total.masked_fill(empty, 1.0)  # before the logarithm, whose gradient would be infinite
    log_sum_exp = (total.log() + highest).masked_fill(empty, -math.inf)
    weights = exps / total[cell]
    if problem.seed is not None:
        local = torch.arange(len(cell), device=query.device) - offsets[cell]
        weights = weights * kept(problem, cell, local) / (1 - problem.dropout)
    output = query.new_zeros((cells, problem.queries, problem.heads, problem.head_dim))
    output = output.index_add(0, cell, torch.einsum("nhq,nhd->nqhd", weights, values))
    return output, log_sum_exp


def _of_amounts(amounts: Tensor, part: Tensor) -> Tensor:
    """What amounts [n] have of a part: [n, h, d]."""
    if part.ndim == 3:
        return part[amounts.long()]
    return amounts.to(part.dtype)[:, None, None] * part


def kept(problem: RaggedAttention, cell: Tensor, local: Tensor) -> Tensor:
    """Which attention weights are not dropped: bool [n, h, q].

    Entry ``local`` [n] of cell ``cell`` [n] keeps its weight where a random word is at least
    ``dropout`` times 2^32. Words are those of Philox-4x32-7 (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3"; 7 rounds are the fewest that pass all of their tests), so that
    every backend drops the same weights, forward and backward, without keeping a mask: key (low,
    high word of the seed), counter (local, cell, head * ceil(queries / 4) + query // 4, 0), word
    query % 4.
    """
    assert problem.seed is not None
    quarters = -(-problem.queries // 4)
    column = torch.arange(problem.heads * quarters, device=cell.device)
    counter = torch.broadcast_tensors(local[:, None], cell[:, None], column)  # [n, h · q / 4]
    words = torch.stack(_philox([*counter, torch.zeros_like(counter[0])], int(problem.seed)), -1)
    words = words.unflatten(1, (problem.heads, quarters)).flatten(2)  # [n, h, 4 · quarters]
    return words[..., : problem.queries] >= round(problem.dropout * 2**32)


def _philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Philox-4x32-7: four words below 2^32 (in int64) from a counter of four."""
    mask = 2**32 - 1
    key = [seed & mask, (seed >> 32) & mask]

    def multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
        """High and low word of a product, whose 64 bits int64 cannot hold."""
        low, high = words * (factor & 0xFFFF), words * (factor >> 16)
        return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & mask

    for _ in range(7):
        first_high, first_low = multiply(counter[0], 0xD2511F53)
        second_high, second_low = multiply(counter[2], 0xCD9E8D57)
        counter = [
            second_high ^ counter[1] ^ key[0], second_low,
            first_high ^ counter[3] ^ key[1], first_low,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


def entry_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    scale: float,
) -> Tensor:
    """Queries attend to the keys of their own cell: [queries, heads, head_dim], 0 without keys."""
    attended = [query[:0] + (key + value)[:0]]  # of no cells: still differentiable
    spans = (itertools.pairwise(offsets.tolist()) for offsets in (query_offsets, key_offsets))
    for (start, stop), (first, last) in zip(*spans, strict=True):
        queries = query[start:stop].transpose(0, 1)  # [h, n, d]
        keys, values = (x[first:last].transpose(0, 1) for x in (key, value))
        weights = torch.softmax(scale * queries @ keys.mT, -1)  # [h, n, keys]
        attended.append((weights @ values).transpose(0, 1))
    return torch.cat(attended)


def mean_over_patches(features: Tensor) -> Tensor:
    """[cells, patches, E] to [cells, E], in a fixed order.

    A library's reduction may choose its order by the shape of the batch; here one patch is added
    after the other, so that a cell's bits do not depend on the number of cells.
    """
    return sum(features.unbind(1), torch.zeros_like(features[:, 0])) / features.shape[1]


def project_tables(weights: EncoderWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [p, h, d], scaled by 1/sqrt(d), and the gene part of keys and values [g, h, d].

    All constant terms of keys and values (attention biases) are in the value part, see
    `project_values`.
    """
    heads = weights.heads
    wq, wk, wv = weights.cross.in_weight.chunk(3)
    bq, _, _ = weights.cross.in_bias.chunk(3)
    head_dim = len(wq) // heads
    queries = F.linear(weights.patches, wq, bq) / math.sqrt(head_dim)
    return (
        queries.unflatten(-1, (heads, head_dim)),
        F.linear(weights.genes, wk).unflatten(-1, (heads, head_dim)),
        F.linear(weights.genes, wv).unflatten(-1, (heads, head_dim)),
    )


def constant_scores(weights: EncoderWeights) -> Tensor:
    """The part [h, p] of scores that all entries share, and that cancels in the softmax.

    It is there for who compares log-sum-exps: fast backends leave it out while they compute.
    """
    queries, _, _ = project_tables(weights._replace(genes=weights.genes[:0]))
    _, key_weight, _ = weights.cross.in_weight.chunk(3)
    _, constant, _ = weights.cross.in_bias.chunk(3)
    if weights.value_bias is not None:
        constant = constant + key_weight @ weights.value_bias
    return torch.einsum("phd,hd->hp", queries, constant.unflatten(0, (weights.heads, -1)))


def project_values(weights: EncoderWeights, values: Tensor) -> tuple[Tensor, Tensor]:
    """The value part of keys and values, [n, h, d] each, for values [n]."""
    if weights.value_bins is not None:
        embedded = weights.value_bins[values.long()]  # [n, D]
    else:
        assert weights.value_weight is not None
        assert weights.value_bias is not None
        embedded = torch.outer(values.to(weights.value_weight.dtype), weights.value_weight)
        embedded = embedded + weights.value_bias
    _, wk, wv = weights.cross.in_weight.chunk(3)
    _, bk, bv = weights.cross.in_bias.chunk(3)
    heads = weights.heads
    return (
        F.linear(embedded, wk, bk).unflatten(-1, (heads, -1)),
        F.linear(embedded, wv, bv).unflatten(-1, (heads, -1)),
    )


def _self_attention(
    block: BlockWeights, x: Tensor, heads: int, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention among the patches of each cell: [c, p, D] and its weights [c, h, p, p]."""
    projected = F.linear(x, block.in_weight, block.in_bias).unflatten(-1, (3, heads, -1))
    queries, keys, values = projected.permute(2, 0, 3, 1, 4)  # [c, h, p, d] each
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    attention = torch.softmax(scores, -1)
    attended = F.dropout(attention, dropout) @ values
    return attended.transpose(1, 2).flatten(2), attention


def finish_block(block: BlockWeights, x: Tensor, attended: Tensor) -> Tensor:
    """Output projection, residual, norm, MLP, residual, norm."""
    width = (x.shape[-1],)
    attended = F.linear(attended, block.out_weight, block.out_bias)
    x = F.layer_norm(
        x + attended,
        width,
        block.attention_norm_weight,
        block.attention_norm_bias,
        LAYER_NORM_EPSILON,
    )
    inner = F.gelu(F.linear(x, block.up_weight, block.up_bias))
    return F.layer_norm(
        x + F.linear(inner, block.down_weight, block.down_bias),
        width,
        block.mlp_norm_weight,
        block.mlp_norm_bias,
        LAYER_NORM_EPSILON,
    )


def _expand(cell: Tensor, like: Tensor) -> Tensor:
    return cell[:, None, None].expand_as(like)
