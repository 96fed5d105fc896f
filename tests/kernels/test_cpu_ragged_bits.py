"""Ragged attention of the Numba backend: the same bits whenever they must be.

Forward, a cell's depend on that cell alone (and, where weights are dropped, on its number); in both
directions nothing depends on the number of threads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cellpatch_fast.kernels.cpu import ragged, ragged_general
from cellpatch_fast.kernels.cpu import ragged_tables_backward as tables_backward
from cellpatch_fast.kernels.ragged import RaggedAttention

from .test_cpu_ragged import Found, check, error, make

VARIANTS: dict[str, dict[str, Any]] = {
    "tables": {"amounts": "float"},
    "tables_uint8": {"amounts": "uint8"},
    "tables_bins": {"amounts": "bins"},
    "tables_lost": {"amounts": "uint8", "largest_score": 70.0},
    "tables_dropped": {"amounts": "uint8", "dropout": 0.2},
    "tables_lost_dropped": {"amounts": "uint8", "largest_score": 70.0, "dropout": 0.2},
    "general": {"amounts": "float", "bias": True, "dropout": 0.2},
    "per_entry": {"rows": None, "shared": False, "bias": True},
}
MANY = (5, 0, 33, 1103, 64) + (19,) * 60


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_twice_and_with_any_number_of_threads(variant: str) -> None:
    problem = make(MANY, **VARIANTS[variant])
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(Found(problem).tensors())
    torch.set_num_threads(before)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


def only(problem: RaggedAttention, cell: int) -> RaggedAttention:
    """The problem of a single cell: the first, but where its number matters others are emptied."""
    first, last = problem.offsets[cell : cell + 2].tolist()
    per_entry = ("ids", "amounts", "bias") if problem.ids is not None else ("key", "value", "bias")
    given = {name: getattr(problem, name) for name in per_entry}
    own: dict[str, Any] = {
        name: None if tensor is None else tensor[first:last] for name, tensor in given.items()
    }
    if len(problem.query) > 1:
        own["query"] = problem.query[cell : cell + 1]
    emptied = cell if problem.dropout else 0
    return problem._replace(offsets=torch.tensor([0] * (emptied + 1) + [last - first]), **own)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_of_a_cell_depend_on_that_cell_alone(variant: str) -> None:
    """Forward; where weights are dropped, on its number too."""
    problem = make(MANY, **VARIANTS[variant])
    output, log_sum_exp = ragged.forward(problem)
    for cell in (0, 1, 2, 3, 17, 64):
        alone, alone_log_sum_exp = ragged.forward(only(problem, cell))
        assert torch.equal(alone[-1], output[cell])
        assert torch.equal(alone_log_sum_exp[-1], log_sum_exp[cell])


def test_groups_of_cells_change_no_bits_but_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward in groups of a few entries: what a cell gets alone is the same, sums nearly."""
    problem = make(MANY, amounts="bins", shared=False)
    whole = Found(problem)
    monkeypatch.setattr(ragged_general, "GROUP", 40)
    grouped = Found(problem)
    assert torch.equal(grouped.gradients.query, whole.gradients.query)
    for one, other in zip(grouped.tensors(), whole.tensors(), strict=True):
        assert error(one, other) <= 1e-7


def test_turns_of_cells_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_backward, "MOST_CELLS", 3)
    check(make(MANY, amounts="float", dropout=0.3))
    check(make(MANY, amounts="float", largest_score=70.0))


def test_small_ranges_of_rows_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_backward, "VISIT", 2)
    check(make(MANY, amounts="bins", rows=1009))
