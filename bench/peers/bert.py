"""Geneformer and LangCell's cell encoder: BERT over a cell's genes, ranked by value.

`transformers.BertModel` with PyTorch's scaled dot-product attention. The class is read from the
first token, without BERT's pooler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.annotators import Annotator, into_vocabulary, keep, pad, require, without_package
from cellpatch_fast import RaggedCells

PADDING = 0


@dataclass(frozen=True)
class Sizes:
    """Of a BERT over genes. ``start`` and ``end`` are the tokens put around a cell's genes."""

    vocabulary: int
    layers: int
    dim: int
    heads: int
    mlp_dim: int
    positions: int
    start: int | None = None
    end: int | None = None

    @property
    def around(self) -> int:
        """Tokens around a cell's genes."""
        return (self.start is not None) + (self.end is not None)

    @property
    def cap(self) -> int:
        return self.positions - self.around

    def tokens(self, genes: int) -> int:
        return min(genes, self.cap) + self.around


GENEFORMER_V1 = Sizes(25_426, layers=6, dim=256, heads=4, mlp_dim=512, positions=2048)
GENEFORMER_V2 = Sizes(
    20_275, layers=12, dim=768, heads=12, mlp_dim=3072, positions=4096, start=2, end=3
)
LANGCELL = Sizes(25_427, layers=12, dim=512, heads=8, mlp_dim=1024, positions=2048, start=25_426)


class Bert(Annotator):
    """A BERT that annotates cells."""

    def __init__(self, sizes: Sizes, classes: int) -> None:
        super().__init__()
        with without_package("kernels"):
            transformers = require("transformers.models.bert.modeling_bert", "transformers")
        self.sizes = sizes
        config = transformers.BertConfig(
            vocab_size=sizes.vocabulary,
            num_hidden_layers=sizes.layers,
            hidden_size=sizes.dim,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.mlp_dim,
            max_position_embeddings=sizes.positions,
            hidden_act="relu",
            pad_token_id=PADDING,
            attn_implementation="sdpa",
        )
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(sizes.dim, classes)

    def prepare(self, cells: RaggedCells) -> tuple[Tensor, ...]:
        sizes = self.sizes
        cells = cells.to(self.device)
        ranked = keep(cells, cells.values.float(), sizes.cap)
        genes, _, *inside = pad(ranked)
        genes = into_vocabulary(genes, sizes.vocabulary - 5, start=4)  # beside special tokens
        if inside:
            genes[~inside[0]] = PADDING
        genes = F.pad(genes, (int(sizes.start is not None), int(sizes.end is not None)))
        if sizes.start is not None:
            genes[:, 0] = sizes.start
        if sizes.end is not None:
            last = ranked.lengths + sizes.around - 1
            genes[torch.arange(len(genes), device=genes.device), last] = sizes.end
        if not inside:
            return (genes,)
        return genes, genes != PADDING

    def forward(self, genes: Tensor, inside: Tensor | None = None) -> Tensor:
        hidden = self.bert(input_ids=genes, attention_mask=inside).last_hidden_state
        logits: Tensor = self.classifier(hidden[:, 0])
        return logits
