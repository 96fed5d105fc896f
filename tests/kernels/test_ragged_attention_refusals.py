"""What the public functions of ragged attention refuse: every message says what was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import ragged_cross_attention, ragged_gather_cross_attention

from .ragged import (
    ENTRIES,
    HEAD_DIM,
    HEADS,
    OFFSETS,
    PARTS,
    QUERIES,
    ROWS,
    gathered,
    normal,
    on,
    per_entry,
)

WRONG: list[Any] = [
    pytest.param({"query": normal(QUERIES, HEADS, HEAD_DIM)}, r"query must be \[1 or", id="query"),
    pytest.param(
        {"query": normal(3, QUERIES, HEADS, HEAD_DIM)}, "3 sets of queries, but.* 4 cells",
        id="number_of_queries",
    ),
    pytest.param(
        {"key_table": normal(ROWS, HEADS, 12)}, r"key_table must be.*\[3, 13\].*12", id="head_dim"
    ),
    pytest.param(
        {"value_table": normal(10, HEADS, HEAD_DIM)}, r"value_table must be.*as many rows",
        id="rows",
    ),
    pytest.param({"ids": normal(ENTRIES)}, "ids must be.*float32", id="ids"),
    pytest.param({"ids": torch.full((ENTRIES,), ROWS)}, "ids run from 11 to 11, .*10", id="id"),
    pytest.param({"ids": torch.full((ENTRIES,), -1)}, "ids run from -1", id="negative_id"),
    pytest.param({"offsets": OFFSETS.float()}, "offsets must be int32 or int64", id="offsets"),
    pytest.param({"offsets": OFFSETS + 1}, "from 0 to the number of entries, 25", id="beyond"),
    pytest.param(
        {"offsets": torch.tensor([0, 6, 5, 24, 25])}, "offsets must not decrease", id="decreasing"
    ),
    pytest.param({"amounts": normal(3)}, r"amounts must be \[entries\], here \[25\]", id="amounts"),
    pytest.param({"value_part": None}, "belong together", id="half_of_the_parts"),
    pytest.param({"key_part": normal(HEADS, 5)}, "key_part and value_part must both", id="part"),
    pytest.param(
        {name: normal(5, HEADS, HEAD_DIM) for name in PARTS}, "bin need uint8 amounts",
        id="bins_of_floats",
    ),
    pytest.param(
        {
            **{name: normal(5, HEADS, HEAD_DIM) for name in PARTS},
            "amounts": torch.full((ENTRIES,), 5, dtype=torch.uint8),
        },
        "largest amount is 5, but there are 5 bins", id="bin",
    ),
    pytest.param({"bias": normal(ENTRIES, 2)}, r"bias must be.*\[25, 3\]; found.*2", id="bias"),
    pytest.param({"key_table": normal(ROWS, HEADS, HEAD_DIM).half()}, "one dtype", id="dtypes"),
    pytest.param({"dropout": 1.0}, "dropout must be at least 0 and below 1", id="dropout"),
    pytest.param({"backend": "cuda"}, "unknown backend 'cuda'", id="unknown_backend"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    for backend in ("reference", "numba"):
        with pytest.raises(ValueError, match=message):
            ragged_gather_cross_attention(**{**gathered(), "backend": backend, **change})


def test_integers_are_no_queries() -> None:
    with pytest.raises(ValueError, match=r"query must be float16.*found torch.int64"):
        ragged_cross_attention(**{name: tensor.long() for name, tensor in per_entry().items()})


def test_wide_heads_need_the_reference(backend: str, device: torch.device) -> None:
    given = on(device, {"query": normal(1, 2, 1, 129), "key": normal(3, 1, 129)})
    given |= {"value": given["key"], "offsets": torch.tensor([0, 3], device=device)}
    with pytest.raises(ValueError, match=r"head_dim of 1 to 128, found 129: use.*reference"):
        ragged_cross_attention(**given, backend=backend)
    assert ragged_cross_attention(**given, backend="reference").output.shape == (1, 2, 1, 129)


def test_float64_is_the_reference_s(backend: str, device: torch.device) -> None:
    given = {name: t.double() if t.is_floating_point() else t for name, t in per_entry().items()}
    given = on(device, given)
    assert ragged_cross_attention(**given).output.dtype == torch.float64
    with pytest.raises(ValueError, match=f"{backend} backend computes in float32"):
        ragged_cross_attention(**given, backend=backend)


def test_amounts_have_gradients_only_from_the_reference() -> None:
    given = on(torch.device("cpu"), gathered(), "amounts")
    with pytest.raises(ValueError, match="amounts receive no gradient: use backend='reference'"):
        ragged_gather_cross_attention(**given, backend="numba")
    ragged_gather_cross_attention(**given, backend="reference").output.sum().backward()
    assert given["amounts"].grad is not None
    assert given["amounts"].grad.any()
