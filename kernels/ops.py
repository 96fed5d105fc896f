"""Registered PyTorch operators: ``torch.ops.cellpatch.encode`` and ``.patch_attention``.

Registered, so that torch.compile and torch.export see one opaque node with known output shapes.
The operators are functional and serve inference: where gradients are needed, `kernels.encode` makes
the encoder of operators that have them, see `differentiable`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_cells, check_kinds
from .cpu import encoder as cpu
from .weights import EncoderWeights

# define and impl rather than custom_op, whose first call imports torch._dynamo: 2 s of CPU time
torch.library.define(
    "cellpatch::encode",
    "(Tensor[] weights, int[] structure, Tensor offsets, Tensor genes, Tensor values, "
    "Tensor? pads, bool attention=False, bool mean=False, str? backend=None, "
    "ScalarType? dtype=None) -> Tensor[]",
)
torch.library.define(
    "cellpatch::patch_attention",
    "(Tensor[] weights, int[] structure, Tensor offsets, Tensor genes, Tensor values, "
    "Tensor? pads, ScalarType? dtype=None) -> (Tensor, Tensor)",
)


@torch.library.impl("cellpatch::encode", ("CPU", "CUDA"))
def _encode(
    weights: list[Tensor],
    structure: list[int],
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    pads: Tensor | None,
    attention: bool = False,
    mean: bool = False,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Encode ragged cells; see `kernels.encode`.

    ``weights`` and ``structure`` are an `EncoderWeights`, flattened; ``backend`` is numba or
    triton, None for the device's; ``dtype`` is that of the Triton backend's tables. Returns the
    features and, with ``attention``, the cross-attention [n, h, p], the attention to pads
    [c, h, p] and one self-attention [c, h, p, p] per block.
    """
    unflat = EncoderWeights.unflatten(weights, structure)
    if (backend or ("numba" if genes.device.type == "cpu" else "triton")) == "triton":
        from .gpu import encoder as gpu

        check_kinds(unflat, offsets, genes, values, pads)
        encoded = gpu.encode(
            unflat, offsets, genes, values, pads=pads, attention=attention, mean=mean, dtype=dtype
        )
    else:
        check_cells(unflat, offsets, genes, values, pads)
        encoded = cpu.encode(
            unflat, offsets, genes, values, pads=pads, attention=attention, mean=mean
        )
    if not attention:
        return [encoded.features]
    assert encoded.cross_attention is not None
    assert encoded.pad_attention is not None
    assert encoded.self_attention is not None
    # an operator's outputs may not share memory
    self_attention = [block.clone() for block in encoded.self_attention]
    return [encoded.features, encoded.cross_attention, encoded.pad_attention, *self_attention]


@torch.library.impl("cellpatch::patch_attention", ("CPU", "CUDA"))
def _patch_attention(
    weights: list[Tensor],
    structure: list[int],
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    pads: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attended values [c, p, D] and log-sum-exp [c, h, p]; see `kernels.patch_attention`."""
    from .gpu import encoder as gpu

    unflat = EncoderWeights.unflatten(weights, structure)
    check_kinds(unflat, offsets, genes, values, pads)
    return gpu.patch_attention(unflat, offsets, genes, values, pads=pads, dtype=dtype)


@torch.library.register_fake("cellpatch::patch_attention")
def _patch_attention_fake(
    weights: list[Tensor],
    structure: list[int],
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    pads: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    unflat = EncoderWeights.unflatten(weights, structure)
    cells = offsets.shape[0] - 1
    patches, dim = unflat.patches.shape
    like = weights[0]
    return (
        like.new_empty((cells, patches, dim), dtype=torch.float32),
        like.new_empty((cells, unflat.heads, patches), dtype=torch.float32),
    )


@torch.library.register_fake("cellpatch::encode")
def _encode_fake(
    weights: list[Tensor],
    structure: list[int],
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    pads: Tensor | None,
    attention: bool = False,
    mean: bool = False,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    unflat = EncoderWeights.unflatten(weights, structure)
    cells, entries = offsets.shape[0] - 1, genes.shape[0]
    heads, patches = unflat.heads, unflat.patches.shape[0]
    like = weights[0]

    def empty(*shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.float32)

    shape = (cells, unflat.output_dim) if mean else (cells, patches, unflat.output_dim)
    features = empty(*shape)
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
        "torch.ops.cellpatch.encode and .patch_attention have no gradient: call kernels.encode or "
        "kernels.patch_attention, which have"
    )


torch.library.register_autograd("cellpatch::encode", _refuse_backward)
torch.library.register_autograd("cellpatch::patch_attention", _refuse_backward)
