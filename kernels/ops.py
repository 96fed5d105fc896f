"""The encoder as a registered PyTorch operator, ``torch.ops.cellpatch.encode``.

Registered, so that torch.compile and torch.export see one opaque node with known output shapes.
The operator is functional and has no gradient yet: where gradients are needed, `kernels.encode`
runs the reference, whose gradients are PyTorch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_cells
from .cpu import encoder as cpu
from .weights import EncoderWeights

# define and impl rather than custom_op, whose first call imports torch._dynamo: 2 s of CPU time
torch.library.define(
    "cellpatch::encode",
    "(Tensor[] weights, int[] structure, Tensor offsets, Tensor genes, Tensor values, "
    "Tensor? pads, bool attention) -> Tensor[]",
)


@torch.library.impl("cellpatch::encode", "CPU")
def _encode_on_cpu(
    weights: list[Tensor],
    structure: list[int],
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    pads: Tensor | None,
    attention: bool,
) -> list[Tensor]:
    """Encode ragged cells; see `kernels.encode`.

    ``weights`` and ``structure`` are an `EncoderWeights`, flattened. Returns the features
    [c, p, E] and, with ``attention``, the cross-attention [n, h, p], the attention to pads
    [c, h, p] and one self-attention [c, h, p, p] per block.
    """
    unflat = EncoderWeights.unflatten(weights, structure)
    check_cells(unflat, offsets, genes, values, pads)
    encoded = cpu.encode(
        unflat,
        offsets,
        genes,
        values,
        pads=pads,
        attention=attention,
    )
    if not attention:
        return [encoded.features]
    assert encoded.cross_attention is not None
    assert encoded.pad_attention is not None
    assert encoded.self_attention is not None
    # an operator's outputs may not share memory
    self_attention = [block.clone() for block in encoded.self_attention]
    return [encoded.features, encoded.cross_attention, encoded.pad_attention, *self_attention]


@torch.library.register_fake("cellpatch::encode")
def _encode_fake(
    weights: list[Tensor],
    structure: list[int],
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    pads: Tensor | None,
    attention: bool,
) -> list[Tensor]:
    unflat = EncoderWeights.unflatten(weights, structure)
    cells, entries = offsets.shape[0] - 1, genes.shape[0]
    heads, patches = unflat.heads, unflat.patches.shape[0]
    like = weights[0]

    def empty(*shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.float32)

    features = empty(cells, patches, unflat.output_dim)
    if not attention:
        return [features]
    return [
        features,
        empty(entries, heads, patches),
        empty(cells, heads, patches),
        *(empty(cells, heads, patches, patches) for _ in unflat.self_blocks),
    ]


def _refuse_backward(context: object, *gradients: object) -> None:
    raise RuntimeError(
        "torch.ops.cellpatch.encode has no gradient; kernels.encode runs the reference where "
        "gradients are needed"
    )


torch.library.register_autograd("cellpatch::encode", _refuse_backward)
