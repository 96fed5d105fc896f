"""Ragged patch attention: the public operations and the choice of backend.

Needs torch and numba only; knows nothing of files, genes or AnnData.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch
from torch import Tensor

from . import ops, reference
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
        raise ValueError(f"unknown backend {name!r}: choose from {', '.join(get_args(Backend))}")
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
    _check(weights, offsets, genes, values, pads)
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
        return reference.encode(weights, offsets, genes, values, pads=pads, attention=attention)
    tensors, structure = weights.flatten()
    features, *attentions = torch.ops.cellpatch.encode(
        tensors, structure, offsets, genes, values, pads, attention
    )
    if not attention:
        return Encoded(features)
    cross, pad, *blocks = attentions
    return Encoded(features, cross, pad, tuple(blocks))


def _check(
    weights: EncoderWeights, offsets: Tensor, genes: Tensor, values: Tensor, pads: Tensor | None
) -> None:
    """Refuse what would read outside a table. One pass over the entries."""
    if torch.compiler.is_compiling():  # values are not known while tracing
        return
    if weights.value_bins is not None and values.dtype != torch.uint8:
        raise ValueError(f"a table of value bins needs uint8 values, found {values.dtype}")
    if len(genes) != len(values):
        raise ValueError(f"{len(genes)} genes but {len(values)} values")
    if len(offsets) == 0 or int(offsets[0]) != 0 or int(offsets[-1]) != len(genes):
        raise ValueError(f"offsets must run from 0 to the number of entries, {len(genes)}")
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError("offsets must not decrease")
    if pads is not None and (pads.shape != (len(offsets) - 1,) or bool((pads < 0).any())):
        raise ValueError("pads must hold one number, not negative, for each cell")
    if len(genes) == 0:
        return
    lowest, highest = _range(genes)
    if lowest < 0 or highest >= len(weights.genes):
        raise ValueError(
            f"gene tokens run from {lowest} to {highest}, but the model has tokens 0 to "
            f"{len(weights.genes) - 1}"
        )
    if weights.value_bins is not None and (largest := _range(values)[1]) >= len(weights.value_bins):
        raise ValueError(
            f"the largest value is {largest}, but there are {len(weights.value_bins)} value bins"
        )


def _range(integers: Tensor) -> tuple[int, int]:
    """Lowest and highest of at least one integer."""
    if integers.device.type == "cpu":  # NumPy takes a sixth of the time, and knows uint16
        array = integers.numpy()
        return int(array.min()), int(array.max())
    lowest, highest = torch.aminmax(integers.long())
    return int(lowest), int(highest)
