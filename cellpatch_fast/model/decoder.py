"""The decoder of pretraining: which value has a gene in a cell with these patch features?

`MaskedGeneModel` is an encoder with a decoder beside it; the decoder takes the genes to predict
(prompts) by the encoder's own gene embedding. As in `encoder`, modules hold parameters and the
computing is done by `cellpatch_fast.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import kernels
from ..cells import RaggedCells
from ..config import CellPatchConfig
from ..kernels import DecoderWeights
from .encoder import Block, CellPatch, block_weights, draw_weights

if TYPE_CHECKING:
    from ..genes import GeneVocabulary


class Decoder(nn.Module):
    """Parameters of the decoder, but for the gene embedding, which is the encoder's."""

    def __init__(self, config: CellPatchConfig) -> None:
        super().__init__()
        self.expansion: nn.Linear | None = None
        if config.projection_dim is not None:
            self.expansion = nn.Linear(config.projection_dim, config.dim)
        self.cross_block = Block(config)
        self.self_blocks = nn.ModuleList(
            Block(config) for _ in range(config.decoder_self_attention_blocks)
        )
        self.output = nn.Linear(config.dim, 1)


class MaskedGeneModel(CellPatch):
    """A CellPatch encoder and the decoder that it is pretrained with.

    Parameters
    ----------
    config, vocabulary
        As of `CellPatch`.

    Raises
    ------
    InputError
        If the vocabulary has more gene tokens than ``config.max_genes``.
    """

    _own_parts = ("decoder.",)

    def __init__(self, config: CellPatchConfig, vocabulary: GeneVocabulary) -> None:
        super().__init__(config, vocabulary)
        self.decoder = Decoder(config)
        draw_weights(self.decoder)

    def predict(
        self,
        cells: RaggedCells,
        prompts: RaggedCells,
        *,
        max_length: int | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Values of genes, predicted from what is seen of their cells.

        Parameters
        ----------
        cells
            What the encoder sees.
        prompts
            The genes to predict of each of these cells; their values are not looked at.
        max_length
            Prompts of the cell that has most, or more. None finds out, for which a GPU is waited
            for.
        backend
            As of `CellPatch.encode`.

        Returns
        -------
        Tensor
            [entries of prompts], in the units of the model's values.

        Raises
        ------
        InputError
            If cells or prompts do not fit the model.
        ValueError
            If there are not as many prompts as cells, or the backend cannot do the job.
        """
        features = self.encode(cells, backend=backend)
        return self.decode(features, prompts, max_length=max_length, backend=backend)

    def decode(
        self,
        features: Tensor,
        prompts: RaggedCells,
        *,
        max_length: int | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """As `predict`, from patch features [cells, patches, output_dim]."""
        if len(prompts) != len(features):
            raise ValueError(
                f"there are prompts for {len(prompts)} cells, but features of {len(features)}"
            )
        if backend is None and features.dtype == torch.float64:
            backend = "reference"  # fused attention computes in float32
        return kernels.decode(
            self.decoder_weights(),
            features,
            prompts.offsets,
            prompts.genes,
            dropout=self.config.decoder_dropout if self.training else 0.0,
            max_length=max_length,
            backend=backend,
        )

    forward = predict  # type: ignore[assignment]

    def decoder_weights(self) -> DecoderWeights:
        """The decoder's parameters as the kernels take them: the same tensors, no copies."""
        tensor: Callable[[str], Tensor] = lambda name: attrgetter(name)(self)  # noqa: E731
        expanded = self.decoder.expansion is not None
        return DecoderWeights(
            heads=self.config.heads,
            genes=self.gene_embedding.weight,
            expansion_weight=tensor("decoder.expansion.weight") if expanded else None,
            expansion_bias=tensor("decoder.expansion.bias") if expanded else None,
            cross=block_weights(tensor, "decoder.cross_block"),
            self_blocks=tuple(
                block_weights(tensor, f"decoder.self_blocks.{i}")
                for i in range(self.config.decoder_self_attention_blocks)
            ),
            output_weight=self.decoder.output.weight,
            output_bias=self.decoder.output.bias,
        )
