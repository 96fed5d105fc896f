"""The encoder's weights as plain tensors: what every backend computes from.

Kernels know nothing of modules or checkpoints. A model (ours, or the original's) hands its
parameters over as an `EncoderWeights`; gradients flow through where a backend supports them.
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
        own = [t for t in self if isinstance(t, Tensor)]
        return own + [t for block in (self.cross, *self.self_blocks) for t in block]
