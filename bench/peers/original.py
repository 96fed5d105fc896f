"""The original CellPatch as plain PyTorch over padded batches: baseline and witness.

An independent implementation of what the released code computes: `torch.nn.MultiheadAttention`
over cells padded to the longest of their batch, without a mask, so that padding (gene 0, value 0)
takes part in the attention. The benchmarks measure against it, and the tests use it as the live
object that `cellpatch_fast.accelerate` works on. Parameter and method names (also the spelling
``get_mid_embeding``) are the original's, so its state dicts load; its code was not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PARTS = ("attn", "attn_norm", "mlp", "mlp_norm")  # of a block, in the order they run


class _Encoder(nn.Module):
    """What ``PathFormer`` and ``PathFormer_lp`` share: [B, L] values and genes to patches.

    Parameters
    ----------
    genes
        Rows of the gene embedding; token 0 is padding.
    patches, dim, heads, mlp_dim, self_blocks
        Learned query tokens, width, attention heads, width inside MLPs, self-attention blocks.
    projection
        Width of the features; None to leave them at ``dim``.
    attention_dropout, embedding_dropout
        Dropout on attention weights and on embedded genes while training.
    fused
        The original has PyTorch compute attention weights always, used or not. True leaves them
        out where nobody asks, so that PyTorch takes its fused attention.
    """

    self_extract_blocks_attn: nn.ModuleList

    def __init__(
        self,
        genes: int,
        *,
        patches: int = 64,
        dim: int = 32,
        heads: int = 2,
        mlp_dim: int = 64,
        self_blocks: int = 2,
        projection: int | None = 10,
        attention_dropout: float = 0.1,
        embedding_dropout: float = 0.0,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.sizes = (dim, heads, mlp_dim, attention_dropout)
        self.pathway_token = nn.Parameter(torch.randn(1, patches, dim))
        self.gene2vector = nn.Embedding(genes, dim)
        self.count2vector = nn.Linear(1, dim)
        self.count2vector_norm = nn.LayerNorm(dim)  # in every checkpoint, never used
        self.emb_dropout = nn.Dropout(embedding_dropout)
        self._add_block("cross_extract_blocks")
        self._add_blocks("self_extract_blocks", self_blocks)
        self.encoder_projection = None if projection is None else nn.Linear(dim, projection)

    def _encode(
        self, count_x: Tensor, gene_x: Tensor, output_attentions: bool, project_out: bool
    ) -> Any:
        """Patch features [B, P, E], and attention weights (means over the heads) on request."""
        embedded = self.gene2vector(gene_x) + self.count2vector(count_x.unsqueeze(-1))
        embedded = self.emb_dropout(embedded)  # [B, L, D]
        x = self.pathway_token.expand(len(count_x), -1, -1)  # [B, P, D]
        attention = {}
        x, attention["encoder_cross_extract_blocks"] = self._attend(
            "cross_extract_blocks", None, x, embedded, output_attentions
        )
        for i in range(len(self.self_extract_blocks_attn)):
            x, attention[f"encoder_self_extract_blocks_{i}"] = self._attend(
                "self_extract_blocks", i, x, x, output_attentions
            )
        if self.encoder_projection is not None and project_out:
            x = self.encoder_projection(x)
        return (x, attention) if output_attentions else x

    def _add_block(self, name: str) -> None:
        for part, module in self._parts().items():
            setattr(self, f"{name}_{part}", module)

    def _add_blocks(self, name: str, number: int) -> None:
        blocks = [self._parts() for _ in range(number)]
        for part in PARTS:
            setattr(self, f"{name}_{part}", nn.ModuleList(block[part] for block in blocks))

    def _parts(self) -> dict[str, nn.Module]:
        dim, heads, mlp_dim, dropout = self.sizes
        return {
            "attn": nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True),
            "attn_norm": nn.LayerNorm(dim),
            "mlp": nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim)),
            "mlp_norm": nn.LayerNorm(dim),
        }

    def _attend(
        self, name: str, index: int | None, x: Tensor, context: Tensor, weights: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One post-norm block: queries ``x`` attend to ``context``."""
        attend, attention_norm, mlp, mlp_norm = (
            module if index is None else module[index]
            for module in (getattr(self, f"{name}_{part}") for part in PARTS)
        )
        attended, attention = attend(x, context, context, need_weights=weights or not self.fused)
        x = attention_norm(x + attended)
        return mlp_norm(x + mlp(x)), attention


class PaddedPathFormer(_Encoder):
    """``PathFormer``: the encoder, and the decoder that predicts the values of prompted genes."""

    decoder_selfattn_blocks_attn: nn.ModuleList

    def __init__(self, genes: int, *, decoder_self_blocks: int = 1, **sizes: object) -> None:
        super().__init__(genes, **sizes)  # type: ignore[arg-type]
        dim = self.sizes[0]
        self.decoder_reverse_projection = None
        if self.encoder_projection is not None:
            self.decoder_reverse_projection = nn.Linear(self.encoder_projection.out_features, dim)
        self._add_block("decoder_extract_blocks")
        self._add_blocks("decoder_selfattn_blocks", decoder_self_blocks)
        self.decoder_projection = nn.Linear(dim, 1)

    def get_mid_embeding(
        self, count_x: Tensor, gene_x: Tensor, output_attentions: bool = False
    ) -> Any:
        return self._encode(count_x, gene_x, output_attentions, project_out=True)

    def get_gene_prediction(self, features: Tensor, prompt_genes: Tensor) -> Tensor:
        """Predicted values [B, T, 1] of the genes [B, T], from patch features [B, P, E]."""
        context = features
        if self.decoder_reverse_projection is not None:
            context = self.decoder_reverse_projection(features)
        x, _ = self._attend("decoder_extract_blocks", None, self.gene2vector(prompt_genes), context)
        for i in range(len(self.decoder_selfattn_blocks_attn)):
            x, _ = self._attend("decoder_selfattn_blocks", i, x, x)
        return self.decoder_projection(x)

    def forward(self, count_x: Tensor, gene_x: Tensor, prompt_genes: Tensor) -> Tensor:
        """Encode the cells and predict the prompted genes."""
        return self.get_gene_prediction(self.get_mid_embeding(count_x, gene_x), prompt_genes)


class PaddedPathFormerLp(_Encoder):
    """``PathFormer_lp``: the encoder, and the head that annotates cells with classes."""

    def __init__(self, genes: int, classes: int, **sizes: object) -> None:
        super().__init__(genes, **sizes)  # type: ignore[arg-type]
        dim, patches = self.sizes[0], self.pathway_token.shape[1]
        self.lp_linear_probe_0 = self.lp_norm = self.decoder_reverse_projection = None
        if self.encoder_projection is not None:
            projection = self.encoder_projection.out_features
            self.lp_linear_probe_0 = nn.Linear(projection, dim)
            self.lp_norm = nn.LayerNorm(dim)
            # in its checkpoints, though annotation does not decode
            self.decoder_reverse_projection = nn.Linear(projection, dim)
        self.lp_fc1 = nn.Linear(patches * dim, 512)
        self.lp_fc2 = nn.Linear(512, 100)
        self.lp_fc3 = nn.Linear(100, classes)

    def get_mid_embeding(
        self,
        count_x: Tensor,
        gene_x: Tensor,
        output_attentions: bool = False,
        project_out: bool = True,
    ) -> Any:
        return self._encode(count_x, gene_x, output_attentions, project_out)

    def get_logits(self, features: Tensor) -> Tensor:
        """Class logits [B, classes] from patch features [B, P, E]."""
        x = features
        if self.lp_linear_probe_0 is not None and self.lp_norm is not None:
            x = self.lp_norm(self.lp_linear_probe_0(x))
        x = torch.relu(self.lp_fc1(x.flatten(1)))
        return self.lp_fc3(torch.relu(self.lp_fc2(x)))

    def forward(self, count_x: Tensor, gene_x: Tensor) -> Tensor:
        """Encode the cells and annotate them."""
        return self.get_logits(self.get_mid_embeding(count_x, gene_x))
