"""Cells with any genes, and their masks: what tests of masking share."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from cellpatch_fast.cells import RaggedCells
from cellpatch_fast.preprocessing.masking import Masked, Masking, Measured, mask

VOCABULARY = 1_009
INPUTS = 3
TYPES = [  # of genes and values: all of them, and each size of both
    (torch.uint16, torch.uint8),
    (torch.uint16, torch.float16),
    (torch.uint16, torch.bfloat16),
    (torch.int32, torch.float32),
    (torch.uint32, torch.float32),
    (torch.int64, torch.float64),
]


def draw_measured(seed: int = 0) -> Measured:
    """One input that measured nearly all tokens, one a quarter of them, one none."""
    shares = np.array([[0.97], [0.25], [0.0]])
    return Measured(np.random.default_rng(seed).random((INPUTS, VOCABULARY)) < shares)


def cells_of(rows: list[list[int]], *, genes: torch.dtype, values: torch.dtype) -> RaggedCells:
    """Cells of these tokens; an entry's value is 1 + its position in the cell, modulo 7."""
    lengths = [len(row) for row in rows]
    positions = np.concatenate([np.arange(length) for length in [0, *lengths]])
    return RaggedCells(
        torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64),
        torch.tensor([token for row in rows for token in row], dtype=torch.int64).to(genes),
        torch.from_numpy(1 + positions % 7).to(values),
    )


def draw_rows(lengths: list[int], seed: int = 0, repeated: float = 0.0) -> list[list[int]]:
    """Ordered tokens of cells, of which a share is taken again."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        row = rng.choice(VOCABULARY, length, replace=False)
        again = row[: length // 2][rng.random(length // 2) < repeated]
        rows.append(np.sort(np.concatenate([row[: length - len(again)], again])).tolist())
    return rows


def draw_cells(lengths: list[int], seed: int = 0, repeated: float = 0.0) -> RaggedCells:
    return cells_of(draw_rows(lengths, seed, repeated), genes=torch.uint16, values=torch.uint8)


def pairs_of(cells: RaggedCells) -> list[list[tuple[int, float]]]:
    """(token, value) of each cell's entries."""
    genes, values = cells.genes.long().tolist(), cells.values.double().tolist()
    bounds = cells.offsets.tolist()
    return [list(zip(genes[a:b], values[a:b], strict=True)) for a, b in pairwise(bounds)]


def tokens_of(cells: RaggedCells) -> list[tuple[int, ...]]:
    return [tuple(token for token, _ in cell) for cell in pairs_of(cells)]


def assert_same(one: RaggedCells, other: RaggedCells) -> None:
    for name in ("offsets", "genes", "values"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name


def run(
    cells: RaggedCells,
    identities: np.ndarray | None = None,
    *,
    measured: Measured | None = None,
    inputs: np.ndarray | None = None,
    masking: Masking | None = None,
    seed: int = 5,
    epoch: int = 2,
) -> Masked:
    return mask(
        cells,
        np.arange(len(cells)) if identities is None else identities,
        measured=measured or draw_measured(),
        inputs=inputs,
        masking=masking,
        seed=seed,
        epoch=epoch,
    )
