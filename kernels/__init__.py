"""Ragged attention: the public operations, and CellPatch's encoder and decoder made of them.

Needs torch, and numba or triton for the fast backends; knows nothing of files, genes or AnnData.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import attention_ops, decoder, differentiable, ops, reference
from .attention import Attended, ragged_cross_attention, ragged_gather_cross_attention
from .backends import Backend, resolve_backend
from .checks import check_cells, check_prompts
from .differentiable import needs_gradient
from .entry_attention import ragged_attention, ragged_self_attention
from .reference import Encoded
from .sparse import SparsePattern, pattern_of, sparse_product
from .weights import BlockWeights, DecoderWeights, EncoderWeights

__all__ = [
    "Attended",
    "Backend",
    "BlockWeights",
    "DecoderWeights",
    "Encoded",
    "EncoderWeights",
    "SparsePattern",
    "attention_ops",
    "decode",
    "encode",
    "needs_gradient",
    "ops",
    "patch_attention",
    "pattern_of",
    "ragged_attention",
    "ragged_cross_attention",
    "ragged_gather_cross_attention",
    "ragged_self_attention",
    "reference",
    "resolve_backend",
    "sparse_product",
    "synchronize",
]


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
    backend: str | None = None,
) -> Encoded:
    """Encode ragged cells into patch features.

    Parameters
    ----------
    weights
        The encoder's weights. The reference computes in their dtype and Numba in float32. Triton
        sums in float32 too; its tables and matrices have the dtype of the weights, or that of
        `torch.autocast` where it is on.
    offsets
        int32 or int64 [cells + 1]; cell ``c`` owns the entries ``offsets[c] : offsets[c + 1]``.
    genes
        Gene tokens [entries], below ``len(weights.genes)``: uint16, uint32, int32 or int64.
    values
        Expression values [entries]: uint8 or floating point. A table of value bins needs uint8.
    pads
        Padding tokens (gene 0, value 0) that each cell attends to besides its entries, [cells].
    attention
        Also return attention weights.
    mean
        Average the features over the patches.
    dropout
        Probability of dropping an attention weight (training).
    backend
        ``"reference"``, ``"numba"`` (CPU) or ``"triton"`` (CUDA); None chooses. Where gradients
        are needed or weights dropped, these compute the cross-attention and PyTorch the rest;
        attention weights and gradients of values come from the reference then.

    Returns
    -------
    Encoded
        Features [cells, patches, E], with ``mean`` [cells, E], float32 but for the reference;
        and, if asked for, attention weights. Where no gradients are needed, a cell's have the same
        bits in any batch by Numba, and by Triton if the encoder fits into its fused kernel (64
        patches, a width of 64, MLPs of 128); but Triton's weights of self-attention are PyTorch's,
        as is all that the reference computes: the same to rounding.

    Raises
    ------
    ValueError
        If tokens, offsets, values or the backend do not fit. On a GPU, contents (gene tokens,
        bins, offsets) are not waited for: what is wrong with them is raised by the next call or
        by `synchronize`, unless CELLPATCH_CHECK=1 is set.
    """
    training = dropout > 0 or needs_gradient(weights, values)
    chosen = _choose(weights, values, backend, differentiable=training, attention=attention)
    _check(chosen, weights, offsets, genes, values, pads)
    if chosen == "reference" or training:
        with _precision(chosen, genes.device.type):
            if chosen == "reference":
                return reference.encode(
                    weights, offsets, genes, values,
                    pads=pads, attention=attention, mean=mean, dropout=dropout,
                )  # fmt: skip
            return differentiable.encode(
                weights, offsets, genes, values,
                pads=pads, mean=mean, dropout=dropout, backend=chosen,
            )  # fmt: skip
    tensors, structure = weights.flatten()
    features, *attentions = torch.ops.cellpatch.encode(
        tensors, structure, offsets, genes, values, pads, attention, mean, chosen,
        _autocast_dtype(genes.device.type),
    )  # fmt: skip
    if not attention:
        return Encoded(features)
    cross, pad, *blocks = attentions
    return Encoded(features, cross, pad, tuple(blocks))


def decode(
    weights: DecoderWeights,
    features: Tensor,
    offsets: Tensor,
    genes: Tensor,
    *,
    dropout: float = 0.0,
    max_length: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Predict the values of prompted genes from a cell's patch features.

    A prompt attends to its cell's patches, then to its cell's prompts; no prompt sees another
    cell's. Differentiable in the weights and the features.

    Parameters
    ----------
    weights
        The decoder's weights, of one floating dtype, which is computed in; under `torch.autocast`
        on CUDA the fast path's products are computed in its dtype.
    features
        Patch features [cells, patches, E], of the same dtype: what `encode` returns.
    offsets
        int32 or int64 [cells + 1]; cell ``c`` owns the prompts ``offsets[c] : offsets[c + 1]``. A
        cell may have none.
    genes
        Gene tokens to predict [entries], below ``len(weights.genes)``: uint16, uint32, int32 or
        int64.
    dropout
        Probability of dropping an element of what the last product takes (training). Weights of
        the decoder's attention are never dropped, other than the encoder's: the fused kernels
        that compute it have no dropout that would be the same on all of them.
    max_length
        Prompts of the cell that has most, or more. None reads it from the offsets, for which a GPU
        is waited for; where torch.compile traces for CUDA, it must be given.
    backend
        ``"reference"``, or ``"numba"`` (CPU) or ``"triton"`` (CUDA) for the fast path of that
        device; None chooses.

    Returns
    -------
    Tensor
        Predicted values [entries], in the order of the prompts; float32, but float64 for weights
        of float64, and the weights' dtype for the reference. A cell's are the same in any batch to
        rounding.

    Raises
    ------
    ValueError
        If shapes, dtypes, devices, offsets, tokens, ``dropout`` or the backend do not fit. On a GPU
        contents of offsets and tokens are looked at only where CELLPATCH_CHECK=1 is set.
    """
    chosen = resolve_backend(backend, features.device)
    check_prompts(weights, features, offsets, genes, dropout, max_length)
    with _precision(chosen, features.device.type):
        if chosen == "reference":
            return reference.decode(weights, features, offsets, genes, dropout)
        return decoder.decode(
            weights, features, offsets, genes, dropout=dropout, max_length=max_length
        )


def patch_attention(
    weights: EncoderWeights,
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    *,
    pads: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The encoder's cross-attention alone: patches attend over each cell's entries.

    Parameters
    ----------
    weights, offsets, genes, values, pads
        As of `encode`.
    bias
        float32 [entries], added to all scores of an entry: 0 leaves it as it is, -1 has it weigh
        1/e of that, and with -inf it counts for nothing.
    backend
        ``"reference"``, ``"numba"`` or ``"triton"``; None chooses.

    Returns
    -------
    attended
        [cells, patches, D]: heads side by side, before the output projection; 0 for an empty cell.
    log_sum_exp
        [cells, heads, patches]: of a cell's scores; -inf for an empty cell.

    Where no gradients are needed, a cell's have the same bits in any batch by Numba and Triton.

    Raises
    ------
    ValueError
        As `encode`.
    """
    training = needs_gradient(weights, values)
    chosen = _choose(weights, values, backend, differentiable=training)
    _check(chosen, weights, offsets, genes, values, pads)
    if chosen == "reference":
        with _precision(chosen, genes.device.type):
            found = reference.patch_cross_attention(
                weights, offsets, genes, values, pads=pads, bias=bias
            )
        return found.attended, found.log_sum_exp
    if chosen == "numba" or training or bias is not None:
        with _precision(chosen, genes.device.type):
            return differentiable.patch_attention(
                weights, offsets, genes, values,
                pads=pads, bias=bias, dropout=0.0, backend=chosen,
            )  # fmt: skip
    tensors, structure = weights.flatten()
    attended, log_sum_exp = torch.ops.cellpatch.patch_attention(
        tensors, structure, offsets, genes, values, pads, _autocast_dtype(genes.device.type)
    )
    return attended, log_sum_exp


def synchronize(device: torch.device | str | int | None = None) -> None:
    """Wait for a GPU and raise what its kernels have found wrong with their input.

    Raises
    ------
    ValueError
        Naming what was wrong with cells that were encoded since the last call.
    """
    from .gpu.faults import raise_faults

    torch.cuda.synchronize(device)
    index = torch.cuda.current_device() if device is None else torch.device(device).index
    raise_faults(torch.device("cuda", index or 0))


def _choose(
    weights: EncoderWeights,
    values: Tensor,
    backend: str | None,
    *,
    differentiable: bool,
    attention: bool = False,
) -> Backend:
    """The backend, which must be the reference for what no other differentiable one can do."""
    chosen = resolve_backend(backend, values.device)
    if chosen == "reference" or not differentiable:
        return chosen
    if attention:
        beyond = "attention weights where gradients are needed"
    elif values.requires_grad and torch.is_grad_enabled():
        beyond = "gradients of values"
    elif weights.patches.dtype == torch.float64:
        beyond = "gradients in float64"
    else:
        return chosen
    if backend is None:
        return "reference"
    raise ValueError(f"the {backend} backend computes no {beyond}: use backend='reference'")


def _precision(backend: Backend, device_type: str) -> AbstractContextManager[object]:
    """Where autocast decides: on a GPU's fast backend; others compute in the weights' dtype."""
    if backend == "triton":
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _check(
    backend: Backend,
    weights: EncoderWeights,
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    pads: Tensor | None,
) -> None:
    """Check the contents, where no operator does it, or CELLPATCH_CHECK asks for it."""
    if torch.compiler.is_compiling():  # while tracing there is nothing to check
        return
    asked = backend == "triton" and os.environ.get("CELLPATCH_CHECK") == "1"
    if backend == "reference" or asked:
        check_cells(weights, offsets, genes, values, pads)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
