"""The model's weights as plain tensors: what every backend computes from.

Kernels know nothing of modules or checkpoints. A model (ours, or the original's) hands its
parameters over as `EncoderWeights` and `DecoderWeights`; gradients flow through where a backend
supports them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockWeights(NamedTuple):
    """One post-norm block: x = LN(x + attention(x)); x = LN(x + MLP(x)).

    ``D`` is the model width, ``M`` the width inside the MLP. Matrices are [out, in], as in
    ``torch.nn.Linear``.
    """

    in_weight: Tensor  # [3 D, D]: queries, keys, values, as in nn.MultiheadAttention
    in_bias: Tensor  # [3 D]
    out_weight: Tensor  # [D, D]
    out_bias: Tensor  # [D]
    attention_norm_weight: Tensor  # [D]
    attention_norm_bias: Tensor  # [D]
    up_weight: Tensor  # [M, D]
    up_bias: Tensor  # [M]
    down_weight: Tensor  # [D, M]
    down_bias: Tensor  # [D]
    mlp_norm_weight: Tensor  # [D]
    mlp_norm_bias: Tensor  # [D]


class EncoderWeights(NamedTuple):
    """Everything the encoder needs.

    Exactly one kind of value embedding is given: ``value_weight`` and ``value_bias`` for the
    affine e(v) = v·w + b, or ``value_bins`` for the table e(v) = E[v].
    """

    heads: int
    genes: Tensor  # [g, D]
    patches: Tensor  # [p, D]
    cross: BlockWeights
    self_blocks: tuple[BlockWeights, ...]
    value_weight: Tensor | None = None  # [D]
    value_bias: Tensor | None = None  # [D]
    value_bins: Tensor | None = None  # [bins, D]
    projection_weight: Tensor | None = None  # [E, D]
    projection_bias: Tensor | None = None  # [E]

    @property
    def output_dim(self) -> int:
        """Width E of a patch feature."""
        last = self.patches if self.projection_weight is None else self.projection_weight.T
        return last.shape[-1]

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        return self.flatten()[0]

    def flatten(self) -> tuple[list[Tensor], list[int]]:
        """Tensors, and the numbers that `unflatten` needs: what an operator can take."""
        optional = {name: getattr(self, name) for name in _OPTIONAL}
        blocks = (self.cross, *self.self_blocks)
        tensors = [self.genes, self.patches]
        tensors += [tensor for tensor in optional.values() if tensor is not None]
        tensors += [tensor for block in blocks for tensor in block]
        present = [int(tensor is not None) for tensor in optional.values()]
        return tensors, [self.heads, len(self.self_blocks), *present]

    @classmethod
    def unflatten(cls, tensors: list[Tensor], structure: list[int]) -> EncoderWeights:
        """The inverse of `flatten`."""
        heads, self_blocks, *present = structure
        rest = iter(tensors)
        genes, patches = next(rest), next(rest)
        optional = {
            name: next(rest) if there else None
            for name, there in zip(_OPTIONAL, present, strict=True)
        }
        cross, *others = (
            BlockWeights(*(next(rest) for _ in BlockWeights._fields))
            for _ in range(1 + self_blocks)
        )
        return cls(heads, genes, patches, cross, tuple(others), **optional)


_OPTIONAL = (
    "value_weight",
    "value_bias",
    "value_bins",
    "projection_weight",
    "projection_bias",
)


class DecoderWeights(NamedTuple):
    """Everything the decoder needs: it predicts values of genes from a cell's patch features.

    ``expansion_weight`` and ``expansion_bias`` undo the encoder's projection to the width E; they
    are None where it does not project.
    """

    heads: int
    genes: Tensor  # [g, D]: the encoder's
    expansion_weight: Tensor | None  # [D, E]
    expansion_bias: Tensor | None  # [D]
    cross: BlockWeights
    self_blocks: tuple[BlockWeights, ...]
    output_weight: Tensor  # [1, D]
    output_bias: Tensor  # [1]

    @property
    def input_dim(self) -> int:
        """Width E of the patch features it takes."""
        expansion = self.expansion_weight
        return self.genes.shape[1] if expansion is None else expansion.shape[1]
