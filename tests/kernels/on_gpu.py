"""The paper's sizes on a GPU, for the tests that only a GPU can run."""

from __future__ import annotations

from typing import Any

import torch
from cellpatch_fast.kernels import EncoderWeights, encode
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

CUDA = torch.device("cuda")
PAPER = {"head_dim": 16, "patches": 64, "mlp_dim": 64, "projection": 10, "self_blocks": 2}


def batch_of(cells: RaggedCells) -> tuple[Tensor, Tensor, Tensor]:
    there = cells.to(CUDA)
    return there.offsets, there.genes, there.values


def features_of(weights: EncoderWeights, *batch: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return encode(weights, *batch, backend="triton", **options).features
