"""The decoder on its fast path: values of prompted genes from a cell's patch features.

A prompt is a row of the gene embedding, and its query a projection of that row: both come from one
look-up in a table that is projected once per call, [genes, 2 D]. With 60,000 genes that is 0.06
billion multiply-adds, and a step of training has more prompts than the data have genes.

Both attentions are ragged (`entry_attention.py`): nothing is padded, and nothing of the size of
prompts x patches, or prompts x prompts, is kept for the backward.

A cell's predictions are the same in any batch to rounding, not bit for bit: the products of rows
are PyTorch's, and on some processors these round a row by the number of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .entry_attention import ragged_attention, ragged_self_attention
from .reference import finish_block
from .weights import DecoderWeights


def decode(
    weights: DecoderWeights,
    features: Tensor,
    offsets: Tensor,
    genes: Tensor,
    *,
    dropout: float,
    max_length: int | None,
) -> Tensor:
    """As `reference.decode`; at least float32."""
    x, query = _look_up(weights, genes)  # [n, D], [n, h, d]
    key, value = _project_patches(weights, features)  # [c · p, h, d] each
    cells, patches, _ = features.shape
    attended = ragged_attention(
        query, key, value, offsets, torch.arange(cells + 1, device=offsets.device) * patches,
        max_query_length=max_length, max_key_length=patches,
    )  # fmt: skip
    x = finish_block(weights.cross, x, attended.flatten(1))
    for block in weights.self_blocks:
        query, key, value = _split(F.linear(x, block.in_weight, block.in_bias), 3, weights.heads)
        attended = ragged_self_attention(query, key, value, offsets, max_length=max_length)
        x = finish_block(block, x, attended.flatten(1))
    x = F.dropout(x, dropout)
    predicted = F.linear(x, weights.output_weight, weights.output_bias).squeeze(-1)
    return predicted.to(torch.promote_types(predicted.dtype, torch.float32))


def _look_up(weights: DecoderWeights, genes: Tensor) -> tuple[Tensor, Tensor]:
    """Embedded prompts [n, D] and their queries [n, h, d]."""
    in_weight, in_bias = weights.cross.in_weight, weights.cross.in_bias
    dim = in_weight.shape[1]
    projected = F.linear(weights.genes, in_weight[:dim], in_bias[:dim])  # [g, D]
    table = torch.cat([weights.genes, projected.to(weights.genes.dtype)], 1)  # [g, 2 D]
    tokens = genes if genes.dtype in (torch.int32, torch.int64) else genes.long()
    x, query = F.embedding(tokens, table).chunk(2, 1)
    return x, query.unflatten(1, (weights.heads, -1))


def _project_patches(weights: DecoderWeights, features: Tensor) -> list[Tensor]:
    """Keys and values [c · p, h, d] of features [c, p, E]."""
    in_weight, in_bias = weights.cross.in_weight, weights.cross.in_bias
    dim = in_weight.shape[1]
    context = features.flatten(0, 1)  # [c · p, E]
    if weights.expansion_weight is not None:
        context = F.linear(context, weights.expansion_weight, weights.expansion_bias)
    return _split(F.linear(context, in_weight[dim:], in_bias[dim:]), 2, weights.heads)


def _split(projected: Tensor, parts: int, heads: int) -> list[Tensor]:
    """[n, parts · D] as that many [n, h, d]."""
    return list(projected.unflatten(-1, (parts, heads, -1)).unbind(1))
