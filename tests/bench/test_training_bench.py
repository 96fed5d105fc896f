"""The benchmarks of training: they run, are complete, and compare gradients as well as outputs."""

from __future__ import annotations

import importlib
import json
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

ROOT = Path(__file__).parents[2]
NEEDS_GPU = {"varlen_attn", "flash_attn_varlen_func", "xformers, block diagonal"}
RUNS_ANYWHERE = {"nested jagged + SDPA", "padded SDPA"}
FORMS = ("plain", "projected")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules; the root is on the path while these tests run, and not longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        names = (
            "ceilings",
            "batches",
            "measure",
            "training",
            "training_kernels",
            "training_report",
        )
        yield SimpleNamespace(
            **{name: importlib.import_module(f"bench.{name}") for name in names},
            steps=importlib.import_module("bench.peers.steps"),
            original=importlib.import_module("bench.peers.original"),
        )


def run(script: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), "--toy", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_toy_run_on_a_gpu_s_kernels_is_complete(tmp_path: Path) -> None:
    printed = run("training_kernels.py", "--device", "cpu", "--output", str(tmp_path / "toy.json"))
    results = json.loads((tmp_path / "toy.json").read_text())
    rows = results["rows"]
    assert {(row["computes"], row["method"], row["form"]) for row in rows} == {
        ("cross-attention, step", "ours", ""),
        ("cross-attention, step", "ours, deterministic", ""),
        ("encoder, step", "ours", ""),
        ("encoder, step", "padded original", "float32"),
        *(("cross-attention, step", n, form) for n in NEEDS_GPU | RUNS_ANYWHERE for form in FORMS),
        *(
            (f"{queries} queries over given keys{step}", name, "")
            for queries in (16, 32)
            for step in ("", ", step")
            for name in ("ours", "varlen_attn", "flash_attn_varlen_func")
        ),
    }
    for row in rows:
        if row["method"] in NEEDS_GPU:
            assert row["status"] == "failed"
            assert row["reason"] in printed
        else:
            assert row["status"] == "measured", row
            assert row["error"] <= row["bound"] == 1e-5
    assert results["roofline genes/s"] is None
    assert {(target["measured"], target["met"]) for target in results["targets"]} == {(None, None)}
    assert len(results["targets"]) == 8


def test_toy_run_on_a_cpu(tmp_path: Path) -> None:
    printed = run("training_cpu.py", "--output", str(tmp_path / "toy.json"))
    results = json.loads((tmp_path / "toy.json").read_text())
    for part in ("operator", "training step", "self-attention"):
        assert all(value > 0 for value in results[part].values())
        assert f"| {part} |" in printed


def test_toy_run_of_whole_steps(tmp_path: Path) -> None:
    printed = run("training.py", "--output", str(tmp_path / "toy.json"))
    results = json.loads((tmp_path / "toy.json").read_text())
    for part, cells in (("pretraining", 5), ("fine-tuning", 4)):
        measured = results[part]
        assert f"| {part} |" in printed
        assert measured["cells"] == cells
        assert measured["lowest ratio"] <= measured["original / ours"] <= measured["highest ratio"]
        days = measured["days for 10 million cells, 50 epochs"]
        assert days * 86_400 * measured["cells/s"] == pytest.approx(5e8)
    like, long, twice = results["memory"]
    assert long["longest cell"] > 2 * like["longest cell"]
    assert twice["entries"] == 2 * like["entries"]
    assert all(row["peak MB"] > 0 for row in results["memory"])
    assert len(results["vocabulary"]["rows"]) == 2


def test_toy_run_of_one_part(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["--toy", "--parts", "vocabulary", "--output", str(tmp_path / "toy.json")]
    monkeypatch.setattr(sys, "argv", ["training.py", *options])
    bench.training.main()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "toy.json").read_text())
    assert "pretraining" not in results
    found = results["vocabulary"]
    assert found["met"] == (found["most times the smallest"] <= found["target"] == 1.1)
    assert [row["gene tokens"] for row in found["rows"]] == [100, 300]
    assert found["rows"][0]["times the smallest"] == 1
    for name in found["rows"][0]:
        assert all(row[name] > 0 for row in found["rows"])
        assert name in printed


def test_both_sides_pretrain_on_the_same_loss(bench: SimpleNamespace, tmp_path: Path) -> None:
    """From the same weights, where nothing is dropped and no cell needs padding."""
    from cellpatch_fast import GeneVocabulary, RaggedCells
    from cellpatch_fast.model import MaskedGeneModel

    training = bench.training
    length, cells = 41, 3
    genes = torch.arange(1, 1 + cells * length, dtype=torch.int32)
    values = (genes % 5 + 1).to(torch.uint8)
    offsets = torch.arange(0, cells * length + 1, length)
    masked = training.hide(RaggedCells(offsets, genes, values))
    original = bench.original.PaddedPathFormer(training.GENES + 1).eval()
    torch.save(original.state_dict(), tmp_path / "original.pth")
    sizes = {"max_gene_num": training.GENES + 1, "embedding_dim": 32, "n_pathway": 64, "n_head": 2}
    sizes |= {"encoder_self_attn_depth": 2, "encoder_projection_dim": 10}
    ours = MaskedGeneModel.from_original(
        tmp_path / "original.pth", args=sizes, vocabulary=GeneVocabulary.human()
    )
    padded = training.Padded.of(masked, torch.device("cpu"))
    with torch.no_grad():
        expected = training.padded_loss(original, padded, masked.decoder.entries)
        found = training.our_loss(ours.eval(), masked)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("lengths", [[1, 5, 97, 47], [61, 61, 61]], ids=["mixed", "constant"])
def test_steps_of_baselines_agree_with_the_reference(
    bench: SimpleNamespace, lengths: list[int]
) -> None:
    """Outputs and gradients, of the original's step too."""
    torch.manual_seed(0)
    drawing = bench.batches.Drawing(torch.device("cpu"), 1000, genes=97)
    small = drawing.cells(np.array(lengths))
    model = bench.original.PaddedPathFormer(98, attention_dropout=0.0)
    suites = bench.training_kernels.step_suites(model, torch.float32, small)
    suite = suites[False]
    # where scores are wide there are the same methods but the baselines
    assert [m[:3] for m in suites[True].methods] == [m[:3] for m in suite.methods if m.ours]
    agreed = set()
    for method in suite.methods:
        if method.ours:
            continue
        checked = suite.check(method)
        if checked.failure:
            assert method.name in NEEDS_GPU, checked.failure
        else:
            assert checked.error <= 1e-5, method
            agreed.add((method.name, method.form))
    assert agreed == {
        ("padded original", "float32"),
        *((name, form) for name in RUNS_ANYWHERE for form in FORMS),
    }


def test_a_wrong_gradient_is_an_error(bench: SimpleNamespace) -> None:
    output, gradient = torch.rand(2, 5, 7, 3).double()
    right = output, gradient
    assert bench.measure.worst_error((output, gradient), right) == 0
    assert bench.measure.worst_error((output, 2 * gradient), right) == pytest.approx(1)
    one_cell = output.clone()
    one_cell[3] *= 3
    assert bench.measure.worst_error((one_cell, gradient), right) == pytest.approx(2)
    with pytest.raises(ValueError, match="longer than"):
        bench.measure.worst_error(output, right)


def test_work_of_a_step(bench: SimpleNamespace) -> None:
    """At the paper's sizes: 7 products for each of 128 pairs, every exponential twice."""
    work = bench.ceilings.Work.of(64, 2, 16, torch.bfloat16).with_backward(2, 16)
    assert work.flop == 7 * 2 * 128 * 16 == 28_672
    assert work.exponentials == 256
    assert work.memory_bytes == 6
    assert work.l2_bytes == 2 * 128 + 256


def made_up_results(bench: SimpleNamespace) -> dict[str, Any]:
    """What a GPU might give, with round numbers."""

    def row(case: str, computes: str, method: str, rate: float) -> dict[str, Any]:
        return {
            "case": case, "computes": computes, "method": method,
            "form": "float32" if method == "padded original" else "",
            "ours": method.startswith("ours"), "replayed": False, "status": "measured",
            "reason": "", "error": 1e-3, "bound": 2e-3, "cells": 10, "genes": 10_000,
            "seconds": {"p20": 1e-3, "median": 1e-3, "p80": 1e-3, "repeats": 5},
            "cells_per_second": rate / 1000, "genes_per_second": rate,
            "extra_bytes": 50_000, "result_bytes": 4_000,
        }  # fmt: skip

    rows = []
    for case in [case.name for case in bench.batches.CASES if case.main]:
        rows += [
            row(case, "cross-attention, step", "ours", 4e9),
            row(case, "cross-attention, step", "ours, deterministic", 2.5e9),
            row(case, "cross-attention, step", "varlen_attn", 1e9),
            row(case, "encoder, step", "ours", 3e9),
            row(case, "encoder, step", "padded original", 2e7),
            row(case, "64 queries over given keys", "ours", 3e9),
            row(case, "64 queries over given keys", "varlen_attn", 2e9),
        ]
    return {
        "date": "", "toy": False, "tables": "bfloat16",
        "machine": {"device": "a GPU", "compute capability": "9.0", "torch": "", "triton": ""},
        "ceilings": {}, "roofline genes/s": {"roofline": 1e10}, "rows": rows,
    }  # fmt: skip


def test_targets_are_the_worst_of_all_lengths(bench: SimpleNamespace) -> None:
    results = made_up_results(bench)

    def found() -> list[tuple[float | None, bool | None]]:
        targets = bench.training_report.targets(results)
        return [(target["measured"], target["met"]) for target in targets]

    assert found() == [(0.4, True), (4.0, True), (1.6, False), (150.0, True), (1.5, True)]
    results["targets"] = bench.training_report.targets(results)
    printed = bench.training_report.report(results)
    assert "**no**" in printed
    assert "| cross-attention, step, ours | 5 |" in printed  # bytes per gene
    results["rows"][0]["genes_per_second"] = 1.5e9
    results["rows"][5]["genes_per_second"] = 1e9
    assert found() == [(0.15, False), (1.5, False), (1.6, False), (150.0, True), (0.5, False)]
    results["rows"][3]["status"] = "failed"  # then nothing is known of all lengths
    assert found()[3] == (None, None)
