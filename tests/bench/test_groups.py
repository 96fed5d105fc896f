"""The groups kernels, training and loader: complete records, and no speed of what is wrong."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CEILINGS = {"matrix FLOP/s": 1e11, "copy bytes/s": 1e10}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """``module(name)``: one of `bench`; the root is on the path during a test only."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def options(tmp_path: Path) -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32, quick=True, folder=tmp_path, time_limit=60
    )


@pytest.fixture
def kernels(module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Of few genes, cells and entries."""
    runs, batches = module("kernel_runs"), module("batches")
    monkeypatch.setattr(runs, "GENES", 401)
    monkeypatch.setattr(runs, "CPU_ENTRIES", {True: 211})
    monkeypatch.setattr(runs, "CHECKED_LENGTHS", (1, 37, 5))
    monkeypatch.setattr(runs, "CPU_CASES", (batches.Case("2,000", batches.constant(53)),))
    monkeypatch.setattr(runs, "Drawing", lambda device, entries: batches.Drawing(
        device, entries, genes=401
    ))  # fmt: skip
    return runs


def test_kernels_are_measured_and_compared_with_float64(
    kernels: ModuleType, options: SimpleNamespace
) -> None:
    records = list(kernels.measure_kernels(options, CEILINGS))
    assert [(r.details["op"], r.details["method"]) for r in records if r.details["ours"]] == [
        ("cross-attention", "ours"),
        ("encoder", "ours"),
    ]
    assert {r.details["method"] for r in records} == {"ours", "padded original", *kernels.ON_A_CPU}
    for record in records:
        assert record.measured, record
        assert record.details["error"] <= record.details["bound"] == 1e-5
        assert record.details["genes_per_second"] > 0
        if record.details["op"] == "cross-attention":
            # two products of 64 queries in 32 dimensions, of one gene; its row and itself
            assert record.details["intensity"] == 2 * 2 * 64 * 32 / (2 * 32 * 4 + 3)
            speed = record.details["genes_per_second"]
            most = 1e11 / 8192  # less than memory allows, 1e10 / 259
            assert record.details["roofline_share"] == pytest.approx(speed / most)


def test_no_speed_is_told_of_what_is_wrong(
    kernels: ModuleType, options: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernels.patch_attention

    def wrong(*arguments: Any, **others: Any) -> Any:
        attended, log_sum_exp = right(*arguments, **others)
        return attended * 1.001, log_sum_exp

    monkeypatch.setattr(kernels, "patch_attention", wrong)
    (record,) = (
        r
        for r in kernels.measure_kernels(options, CEILINGS)
        if r.details["ours"] and r.details["op"] == "cross-attention"
    )
    assert (record.status, record.seconds) == ("inaccurate", None)
    assert "relative error 1.0e-03" in record.reason
    assert record.details["genes_per_second"] is None


def test_both_models_train_both_tasks(
    module: Callable[[str], ModuleType], options: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = module("training_runs")
    monkeypatch.setattr(runs, "QUICK", module("training").TOY)
    records = list(runs.measure_training(options))
    assert [record.name for record in records] == [
        f"training/{task}/{model}"
        for task in ("pretraining", "fine-tuning")
        for model in ("CellPatch (ours)", "CellPatch, original")
    ]
    for record, cells in zip(records, (5, 5, 4, 4), strict=True):
        assert record.details["cells"] == cells
        rate = record.details["cells_per_second"]
        assert rate * record.seconds.median == pytest.approx(cells)
    assert [record.details.get("cells_at_once") in (4, 5) for record in records] == [
        False, True, False, False,
    ]  # fmt: skip


def test_training_that_ends_early_is_recorded(
    module: Callable[[str], ModuleType], options: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = module("training_runs")
    monkeypatch.setattr(runs, "PATIENCE", 1e-6)
    monkeypatch.setattr(runs, "COMPILING", 0)
    records = list(runs.measure_training(options))
    assert len(records) == 4
    assert {record.status for record in records} == {"out of time"}


def test_a_loader_is_measured_in_a_process_of_its_own(
    module: Callable[[str], ModuleType], options: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = module("loader_runs")
    monkeypatch.setattr(runs, "CELLS", {True: (97, 1)})
    monkeypatch.setattr(runs, "CHOSEN", {True: ("CellLoader, shuffled",)})
    monkeypatch.setattr(runs, "GENES", 31)
    (record,) = runs.measure_loaders(options)
    assert record.name == "loader/CellLoader, shuffled/tokens"
    assert record.measured, record
    assert record.details["cells_per_second"] * record.seconds.median == pytest.approx(97)
    assert record.details["nonzeros_per_second"] > 20 * record.details["cells_per_second"]
