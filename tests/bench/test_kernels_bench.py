"""The benchmark of the GPU kernels: it runs, is complete, and gives no speed to what is wrong."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cellpatch_fast.kernels import BlockWeights, EncoderWeights, reference
from torch import Tensor

from cellpatch_fast import RaggedCells

ROOT = Path(__file__).parents[2]
NEEDS_GPU = {"varlen_attn", "flash_attn_varlen_func", "xformers, block diagonal"}
RUNS_ANYWHERE = {"nested jagged + SDPA", "FlexAttention, document mask", "padded SDPA"}


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules; the root is on the path while these tests run, and not longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        names = ("batches", "measure", "report", "peers.attention")
        yield SimpleNamespace(
            **{name.split(".")[-1]: importlib.import_module(f"bench.{name}") for name in names}
        )


@pytest.fixture(scope="module")
def weights() -> EncoderWeights:
    """Random weights: 23 genes, affine values, 3 heads, 16 patches (FlexAttention needs that)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    heads, dim, mlp = 3, 48, 29
    shapes: list[tuple[int, ...]] = [
        *((3 * dim, dim), (3 * dim,), (dim, dim), (dim,), (dim,), (dim,)),
        *((mlp, dim), (mlp,), (dim, mlp), (dim,), (dim,), (dim,)),
    ]
    block = BlockWeights(*(normal(*shape) for shape in shapes))
    return EncoderWeights(
        heads, 7 * normal(23, dim), 7 * normal(16, dim), block, (), normal(dim), normal(dim)
    )


def cells_of(lengths: list[int], seed: int = 0) -> RaggedCells:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    genes = torch.randint(0, 23, (int(offsets[-1]),), generator=generator)
    values = torch.randint(0, 6, genes.shape, generator=generator)
    return RaggedCells(offsets, genes.to(torch.uint16), values.to(torch.uint8))


def run_toy(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, str(ROOT / "bench/kernels.py"), "--device", "cpu", "--toy"),
            *("--output", str(output), *options),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )


def every_method() -> set[tuple[str, str, str]]:
    """What is computed, how, and in which form, for every case that is not about ours alone."""
    return {
        ("cross-attention", "ours", ""),
        ("cross-attention", "ours, split", ""),
        ("cross-attention", "ours, not split", ""),
        ("encoder", "ours", ""),
        ("encoder", "padded original", "float32"),
        ("encoder", "padded original", "float32, fused attention"),
        *(
            ("cross-attention", name, form)
            for name in NEEDS_GPU | RUNS_ANYWHERE
            for form in ("plain", "projected")
        ),
    }


def test_toy_run_is_complete(tmp_path: Path) -> None:
    done = run_toy(tmp_path / "toy.json", "--only", "1 cell")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "toy.json").read_text())
    for ceiling in ("copy bytes/s", "matrix FLOP/s", "exponentials/s"):
        assert results["ceilings"][ceiling] > 0
    name = ("case", "computes", "method", "form", "replayed")
    rows = {tuple(row[key] for key in name): row for row in results["rows"]}
    assert len(rows) == len(results["rows"])

    assert {key[1:4] for key in rows if not key[4]} == every_method()
    assert {key[1:3] for key in rows if key[4]} == {  # from a CUDA graph
        ("cross-attention", "ours"),
        ("encoder", "ours"),
        ("cross-attention", "varlen_attn"),
        ("cross-attention", "flash_attn_varlen_func"),
    }
    for (_, _, method, _, replayed), row in rows.items():
        if replayed or method in NEEDS_GPU:
            assert row["status"] == "failed"
            assert row["reason"]
            assert row["seconds"] is None
            assert row["genes_per_second"] is None
        else:
            assert row["status"] == "measured", row
            assert row["error"] <= row["bound"] == 1e-5
            assert row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
            assert row["genes_per_second"] == row["genes"] / row["seconds"]["median"]
        if row["reason"]:
            assert row["reason"] in done.stdout
    # nothing that a GPU would have to show is said to be measured
    assert results["roofline genes/s"] is None
    assert {(target["measured"], target["met"]) for target in results["targets"]} == {(None, None)}


def test_after_the_time_is_up_rows_say_so(tmp_path: Path) -> None:
    done = run_toy(tmp_path / "toy.json", "--only", "^4,000|uniform", "--minutes", "0")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    name = ("computes", "method", "form")
    assert {tuple(row[key] for key in name) for row in rows if row["case"] == "4,000"} == (
        every_method()
    )
    assert {row["method"] for row in rows if row["case"] == "1,000, uniform genes"} == {
        "ours",
        "ours, split",
        "ours, not split",
    }
    assert {(row["status"], row["reason"], row["genes_per_second"]) for row in rows} == {
        ("not run", "the time was up", None)
    }


@pytest.mark.parametrize("lengths", [[1, 5, 300, 47], [131, 131, 131]], ids=["mixed", "constant"])
def test_baselines_agree_with_the_reference(
    bench: SimpleNamespace, weights: EncoderWeights, lengths: list[int]
) -> None:
    cells = cells_of(lengths)
    tensors, structure = weights.flatten()
    exact = EncoderWeights.unflatten([tensor.double() for tensor in tensors], structure)
    expected = reference.patch_cross_attention(exact, cells.offsets, cells.genes, cells.values)
    agreed = set()
    for method in bench.attention.methods(weights, torch.float32):
        checked = bench.measure.check(method, cells, expected.attended, 1e-5)
        if checked.failure:
            assert method.name in NEEDS_GPU, checked.failure
        else:
            assert checked.error <= 1e-5, method
            agreed.add((method.name, method.form))
    assert agreed == {(name, form) for name in RUNS_ANYWHERE for form in ("plain", "projected")}


@pytest.mark.parametrize(
    "lengths",
    [[1], [128], [127, 1, 128, 256], [5, 600, 3, 130, 385], [128, 128], [300, 1, 1, 1, 900]],
    ids=str,
)
def test_document_mask_has_the_blocks_of_the_dense_mask(
    bench: SimpleNamespace, lengths: list[int]
) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    cells, patches = cells_of(lengths), 16
    found = bench.attention.document_mask(cells, patches)
    dense = create_block_mask(
        found.mask_mod, None, None, len(cells) * patches, cells.entries, "cpu", (patches, 128)
    )
    for kind in ("kv", "full_kv"):
        numbers, expected_numbers = (
            getattr(mask, f"{kind}_num_blocks")[0, 0] for mask in (found, dense)
        )
        blocks, expected_blocks = (
            getattr(mask, f"{kind}_indices")[0, 0] for mask in (found, dense)
        )
        for cell in range(len(cells)):
            number = int(expected_numbers[cell])
            assert int(numbers[cell]) == number
            assert (
                blocks[cell, :number].sort().values.tolist()
                == expected_blocks[cell, :number].sort().values.tolist()
            )


def method_of(bench: SimpleNamespace, prepare: Any) -> Any:
    return bench.measure.Method("cross-attention", "other", "plain", prepare)


def absent(cells: RaggedCells) -> Any:
    raise ModuleNotFoundError("No module named 'other'")


def too_large(cells: RaggedCells) -> Any:
    if cells.entries > 10:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate everything")
    return lambda: torch.ones(len(cells), 1, 1)


def wrong(cells: RaggedCells) -> Any:
    return lambda: torch.full((len(cells), 1, 1), math.nan)


@pytest.mark.parametrize(
    ("prepare", "status", "reason"),
    [
        (absent, "failed", "ModuleNotFoundError: No module named 'other'"),
        (too_large, "failed", "OutOfMemoryError: CUDA out of memory."),
        (wrong, "inaccurate", "relative error nan, allowed are 1.0e-05"),
    ],
)
def test_what_fails_keeps_its_row(
    bench: SimpleNamespace, prepare: Any, status: str, reason: str
) -> None:
    method = method_of(bench, prepare)
    small = cells_of([2, 3])
    checked = bench.measure.check(method, small, torch.ones(2, 1, 1).double(), 1e-5)
    row = bench.measure.measure("case", method, [cells_of([20])], checked, bench.measure.Effort())
    assert (row.status, row.reason, row.method) == (status, reason, "other")
    assert row.seconds is None
    assert row.genes_per_second is None


def test_drawn_cells_have_the_lengths_and_the_frequencies(bench: SimpleNamespace) -> None:
    drawing = bench.batches.Drawing(torch.device("cpu"), 50_000, genes=997)
    lengths = np.array([1, 13, 997] + 400 * [83])
    cells = drawing.cells(lengths)
    cells.validate(998)
    assert (cells.genes.dtype, cells.values.dtype) == (torch.uint16, torch.uint8)
    assert cells.lengths.tolist() == lengths.tolist()
    genes = cells.genes.int()
    for cell in range(len(cells)):
        tokens = genes[cells.offsets[cell] : cells.offsets[cell + 1]]
        assert int(tokens[0]) >= 1  # 0 is padding
        assert bool((tokens.diff() > 0).all())
    counts = torch.bincount(genes, minlength=998)[drawing.tokens]  # the most common first
    assert counts[:20].float().mean() > 5 * counts[500:].float().mean()
    genes = drawing.cells(lengths, uniform=True).genes.int()
    counts = torch.bincount(genes, minlength=998)[drawing.tokens]
    assert counts[:20].float().mean() < 1.5 * counts[500:].float().mean()

    case = bench.batches.Case("some", bench.batches.one_long, cells=1500)
    batch = drawing.batch(case)
    assert len(batch) == 1500
    assert int((batch.lengths == 997).sum()) >= 1


def made_up_results(bench: SimpleNamespace) -> dict[str, Any]:
    """What a GPU might give, with round numbers."""

    def row(case: str, computes: str, method: str, form: str, rate: float) -> dict[str, Any]:
        return {
            "case": case, "computes": computes, "method": method, "form": form,
            "ours": method == "ours", "replayed": False, "status": "measured", "reason": "",
            "error": 1e-3, "bound": 2e-3, "cells": 10, "genes": 10_000,
            "seconds": {"p20": 1e-3, "median": 1e-3, "p80": 1e-3, "repeats": 5},
            "cells_per_second": rate / 1000, "genes_per_second": rate,
            "extra_bytes": 4_400, "result_bytes": 4_000,
        }  # fmt: skip

    rows = []
    for case in bench.report.MAIN_CASES:
        rows += [
            row(case, "cross-attention", "ours", "", 8e9),
            row(case, "cross-attention", "varlen_attn", "plain", 1e9),
            row(case, "cross-attention", "varlen_attn", "projected", 2e9),
            row(case, "encoder", "ours", "", 4e9),
            row(case, "encoder", "padded original", "float32", 1e7),
            row(case, "encoder", "padded original", "bfloat16, fused attention", 1e8),
        ]
    return {
        "date": "", "toy": False, "tables": "bfloat16", "table bytes": 1_000_000,
        "machine": {"device": "a GPU", "compute capability": "9.0", "torch": "", "triton": ""},
        "ceilings": {}, "roofline genes/s": {"roofline": 1e10}, "rows": rows,
    }  # fmt: skip


def test_targets_are_the_worst_of_all_lengths(bench: SimpleNamespace) -> None:
    results = made_up_results(bench)
    short = {
        entry["name"].split(",")[0]: (entry["measured"], entry["met"])
        for entry in bench.report.targets(results)
    }
    assert short["cross-attention: share of the roofline"] == (0.8, True)
    assert short["encoder: share of the roofline"] == (0.4, False)
    assert short["cross-attention: times the best baseline"] == (4.0, True)
    assert short["encoder: times the padded original"] == (400.0, True)
    assert short["encoder: cells/s at 1"] == (4e6, True)
    ratio, met = short["encoder: memory over inputs + outputs + tables"]
    assert ratio == pytest.approx((1_030_088 + 4_400) / (1_030_088 + 4_000))
    assert met is True
    assert short["encoder: the same with one cell of 60"] == (None, None)  # no such row

    slow = results["rows"][0]
    slow["genes_per_second"] = 3e9
    found = {t["name"]: t for t in bench.report.targets(results)}
    entry = found["cross-attention: times the best baseline, least of all lengths"]
    assert (entry["measured"], entry["met"]) == (1.5, False)
    assert "**no**" in bench.report.report(results | {"targets": list(found.values())})
    slow["status"] = "failed"  # then nothing is known of all lengths
    found = {t["name"]: t for t in bench.report.targets(results)}
    entry = found["cross-attention: times the best baseline, least of all lengths"]
    assert (entry["measured"], entry["met"]) == (None, None)
