"""The Performer, attention linear in the number of tokens, from the package performer-pytorch."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from bench.peers.annotators import require

HEAD_DIM = 64


def performer(dim: int, layers: int, heads: int) -> nn.Module:
    """Performer layers of [c, n, D], pre-norm, with an MLP four times as wide; no last norm."""
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
        package = require("performer_pytorch", "performer-pytorch")
    with torch.device("cpu"):  # it draws its random features there
        module: nn.Module = package.Performer(
            dim=dim, depth=layers, heads=heads, dim_head=HEAD_DIM, ff_mult=4, qkv_bias=False
        )
    return module
