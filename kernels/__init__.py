"""Ragged patch attention: the public operations and the choice of backend.

Needs torch and numba only; knows nothing of files, genes or AnnData.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch
from torch import Tensor

from . import ops, reference
from .checks import check_cells
from .reference import Encoded
from .weights import BlockWeights, EncoderWeights

__all__ = [
    "Backend",
    "BlockWeights",
    "Encoded",
    "EncoderWeights",
    "encode",
    "ops",
    "reference",
    "resolve_backend",
]

Backend = Literal["reference", "numba", "triton"]


def resolve_backend(backend: str | None, device: torch.device) -> Backend:
    """The backend to use: the argument, else CELLPATCH_BACKEND, else the device's fastest.

    Raises
    ------
    ValueError
        If the name is unknown or the backend cannot run on ``device``.
    """
    name = backend or os.environ.get("CELLPATCH_BACKEND") or None
    if name is None:
        return "numba" if device.type == "cpu" else "reference"
    if name not in get_args(Backend):
        where = "" if backend else " in CELLPATCH_BACKEND"
        raise ValueError(
            f"unknown backend {name!r}{where}: choose from {', '.join(get_args(Backend))}"
        )
    if name == "triton":
        raise ValueError("the triton backend is not built yet: use reference or numba")
    if name == "numba" and device.type != "cpu":
        raise ValueError(f"the numba backend runs on the CPU, but the tensors are on {device}")
    return name  # type: ignore[return-value]


def encode(
    weights: EncoderWeights,
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    *,
    pads: Tensor | None = None,
    attention: bool = False,
    backend: str | None = None,
) -> Encoded:
    """Encode ragged cells into patch features.

    Parameters
    ----------
    weights
        The encoder's weights. The reference computes in their dtype, the other backends in
        float32.
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
    backend
        ``"reference"`` or ``"numba"``; None chooses. The choice is the reference wherever
        gradients are needed.

    Returns
    -------
    Encoded
        Features [cells, patches, E] and, if asked for, attention weights.

    Raises
    ------
    ValueError
        If tokens, offsets, values or the backend do not fit.
    """
    inputs = (*weights.tensors(), values)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    chosen = resolve_backend(backend, genes.device)
    if needs_gradient and chosen == "numba":
        if backend == "numba":
            raise ValueError(
                "the numba backend computes no gradients: encode under torch.no_grad(), or use "
                "backend='reference'"
            )
        chosen = "reference"
    if chosen == "reference":
        if not torch.compiler.is_compiling():  # while tracing there is nothing to check
            check_cells(weights, offsets, genes, values, pads)
        with torch.autocast(genes.device.type, enabled=False):  # in the weights' own precision
            return reference.encode(weights, offsets, genes, values, pads=pads, attention=attention)
    tensors, structure = weights.flatten()
    features, *attentions = torch.ops.cellpatch.encode(
        tensors, structure, offsets, genes, values, pads, attention
    )
    if not attention:
        return Encoded(features)
    cross, pad, *blocks = attentions
    return Encoded(features, cross, pad, tuple(blocks))
