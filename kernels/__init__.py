"""Ragged patch attention: the public operations and the choice of backend.

Needs torch and numba only; knows nothing of files, genes or AnnData.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch
from torch import Tensor

from . import reference
from .reference import Encoded
from .weights import BlockWeights, EncoderWeights

__all__ = ["Backend", "BlockWeights", "Encoded", "EncoderWeights", "encode", "resolve_backend"]

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
    """Placeholder until the fast backend is wired: runs the reference."""
    return reference.encode(weights, offsets, genes, values, pads=pads, attention=attention)
