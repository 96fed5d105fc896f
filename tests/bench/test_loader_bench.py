"""The benchmark of loaders: it runs, and compares what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_it_runs(tmp_path: Path) -> None:
    output = tmp_path / "loader.json"
    command = [sys.executable, str(ROOT / "bench/loader.py"), "--folder", str(tmp_path / "atlas")]
    command += ["--cells", "701", "--genes", "307", "--formats", "zarr", "--repeats", "1"]
    command += ["--only", "decompression", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    (row,) = results["rows"]
    assert (row["cells"], row["entries"]) == (701, results["entries"])
    assert row["non-zeros/s"] > 0
    assert "decompression alone" in done.stdout


def test_every_target_compares_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from bench.loader import METHODS, TARGETS, compare

    measured = {(method.name, name) for method in METHODS for name in method.formats}
    measured |= {("annbatch", "zarr"), ("annbatch", "annbatch")}
    for method, name, other, other_name, _ in TARGETS:
        assert {(method, name), (other, other_name)} <= measured
    rates = {("CellLoader", "tokens"): 30.0, ("anndata slices", "zarr"): 4.0}
    rows = [
        {"method": method, "format": name, "non-zeros/s": rate}
        for (method, name), rate in rates.items()
    ]
    (found,) = compare(rows)
    assert found == {
        "target": "CellLoader, tokens / anndata slices, zarr",
        "at least": 5,
        "found": 7.5,
    }
