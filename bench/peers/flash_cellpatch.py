"""CellPatch with flash attention: what one gets from exchanging the attention, and no more.

The model is ours, weights and all. Keys and values of every gene are computed, then attended to:

- on a GPU in half precision by the FlashAttention inside PyTorch, over ragged keys;
- elsewhere by PyTorch's scaled dot-product attention over cells padded to the longest, with a mask
  if lengths differ. On a CPU that is its flash attention too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.annotators import Annotator, attend, pad
from bench.peers.ours import CONFIG, CellPatch
from cellpatch_fast import CellPatchConfig, RaggedCells
from cellpatch_fast.model.encoder import Block


class FlashCellPatch(Annotator):
    """Attends over ragged keys where it can, else over padded ones."""

    def __init__(self, classes: int, config: CellPatchConfig = CONFIG) -> None:
        super().__init__()
        self.model = CellPatch(classes, config).model

    def prepare(self, cells: RaggedCells) -> tuple[Tensor, ...]:
        cells = cells.to(self.device)
        if self.device.type == "cuda" and self.dtype != torch.float32:
            longest = cells.lengths.max().cpu()  # on the CPU: nothing waits for it there
            values = cells.values.to(self.dtype)
            return cells.genes.int(), values, cells.offsets.int(), longest
        genes, values, *inside = pad(cells)
        return genes.int(), values.to(self.dtype), *inside

    def forward(self, genes: Tensor, values: Tensor, *lengths: Tensor) -> Tensor:
        model = self.model
        embedded = model.gene_embedding(genes) + model.value_embedding(values.unsqueeze(-1))
        attention = model.cross_block.attention
        dim = attention.embed_dim
        matrix, bias = attention.in_proj_weight, attention.in_proj_bias
        queries = F.linear(model.patches, matrix[:dim], bias[:dim])  # [p, D]
        keys_values = F.linear(embedded, matrix[dim:], bias[dim:])  # [n, 2 · D] or [c, n, 2 · D]
        heads = attention.num_heads
        cross = _attend_ragged if genes.dim() == 1 else _attend_padded
        attended = cross(queries, keys_values.unflatten(-1, (2, heads, -1)), *lengths)
        x = _rest(model.cross_block, model.patches, attended)
        for block in model.self_blocks:
            assert isinstance(block, Block)
            attention = block.attention
            projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
            x = _rest(block, x, attend(projected, heads))
        logits: Tensor = model.head(x if model.projection is None else model.projection(x))
        return logits


def _attend_ragged(
    queries: Tensor, keys_values: Tensor, offsets: Tensor, longest: Tensor
) -> Tensor:
    """Queries [p, D] of every cell over its keys and values [n, 2, h, d], to [c, p, D]."""
    from torch.nn.attention.varlen import varlen_attn

    cells, patches = len(offsets) - 1, len(queries)
    keys, values = keys_values.unbind(1)
    repeated = queries.unflatten(-1, keys.shape[-2:]).repeat(cells, 1, 1)  # [c · p, h, d]
    starts = torch.arange(0, cells * patches + 1, patches, dtype=torch.int32, device=keys.device)
    attended = varlen_attn(repeated, keys, values, starts, offsets, patches, int(longest))
    assert isinstance(attended, Tensor)
    return attended.flatten(1).unflatten(0, (cells, patches))


def _attend_padded(queries: Tensor, keys_values: Tensor, inside: Tensor | None = None) -> Tensor:
    """Queries [p, D] of every cell over its keys and values [c, n, 2, h, d], to [c, p, D]."""
    keys, values = keys_values.permute(2, 0, 3, 1, 4)  # [c, h, n, d] each
    of_heads = queries.unflatten(-1, (keys.shape[1], -1)).transpose(0, 1)  # [h, p, d]
    mask = None if inside is None else inside[:, None, None]
    attended = F.scaled_dot_product_attention(
        of_heads.expand(len(keys), -1, -1, -1), keys, values, attn_mask=mask
    )
    return attended.transpose(1, 2).flatten(2)


def _rest(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    """What follows the attention of a block."""
    out: nn.Linear = block.attention.out_proj
    x = block.attention_norm(x + out(attended))
    normed: Tensor = block.mlp_norm(x + block.mlp(x))
    return normed
