"""Arguments of ragged attention, for the tests of its public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Given = dict[str, Any]  # arguments by name; all but a few are tensors
PARTS = ("key_part", "value_part")
LENGTHS = [5, 0, 19, 1]
CELLS, ENTRIES, ROWS, QUERIES, HEADS, HEAD_DIM = len(LENGTHS), sum(LENGTHS), 11, 7, 3, 13
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(*shape, generator=generator)


def per_entry(shared: bool = True) -> Given:
    return {
        "query": normal(1 if shared else CELLS, QUERIES, HEADS, HEAD_DIM),
        "key": normal(ENTRIES, HEADS, HEAD_DIM),
        "value": normal(ENTRIES, HEADS, HEAD_DIM, seed=1),
        "offsets": OFFSETS,
    }


def gathered() -> Given:
    return {
        "query": normal(1, QUERIES, HEADS, HEAD_DIM),
        "key_table": normal(ROWS, HEADS, HEAD_DIM),
        "value_table": normal(ROWS, HEADS, HEAD_DIM, seed=1),
        "ids": (normal(ENTRIES).abs() * 100).long() % ROWS,
        "offsets": OFFSETS,
        "amounts": normal(ENTRIES, seed=2).abs(),
        "key_part": normal(HEADS, HEAD_DIM),
        "value_part": normal(HEADS, HEAD_DIM, seed=1),
        "bias": normal(ENTRIES, HEADS, seed=3),
    }


def on(device: torch.device, given: Given, *gradients: str) -> Given:
    """The arguments on a device, new leaves for those that shall have gradients."""
    there = {name: tensor.to(device) for name, tensor in given.items()}
    return {
        name: tensor.clone().requires_grad_() if name in gradients else tensor
        for name, tensor in there.items()
    }
