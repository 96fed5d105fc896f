"""The benchmark of quality runs, is complete, and says what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_toy_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from bench.quality_methods import ANNOTATION, BOTH, METHODS, NETWORK

    output = tmp_path / "toy.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "quality.py"), "--toy", "--output", str(output)],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    (summary,) = results["annotation"]["summaries"].values()
    methods = list(METHODS)
    methods.insert(methods.index(BOTH), NETWORK)  # of the same runs
    assert list(summary["methods"]) == methods
    for name, row in summary["methods"].items():
        assert row["splits"] == (2 if name in {NETWORK, *ANNOTATION} else 1)
        assert row["seconds"] > 0
        for measure in ("accuracy", "macro F1"):
            assert 0 <= row[measure]["median"] <= 1
            assert f"{row[measure]['median']:.3f}" in done.stdout
    best = summary["methods"][summary["best linear"]["accuracy"]]
    assert best["accuracy"]["median"] > 0.5  # it learns in no time
    (scores,) = results["pretraining"].values()
    assert scores[0]["reconstruction"]["error of means"] > 0
    assert scores[0]["reconstruction"]["error"] > 0
    for found in scores[0]["neighbours"].values():
        assert set(found) == {"flatten", "mean"}
    for kind in ("pretraining", "fine-tuning"):
        curve = results["curves"][kind]
        assert curve["steps"] == 20
        assert 0 < curve["largest difference"] <= 10 * curve["largest drift"]
    assert output.with_suffix(".md").read_text().strip() == done.stdout.strip()
    for suffix in (".png", ".svg"):
        assert output.with_suffix(suffix).stat().st_size > 0
