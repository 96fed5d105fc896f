"""The benchmark of quality runs, is complete, and says what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_toy_run(tmp_path: Path) -> None:
    output = tmp_path / "toy.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "quality.py"), "--toy", "--output", str(output)],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    (found,) = (data["median"] for data in results["data"].values())
    for method in ("logistic regression", "from scratch", "pretrained"):
        for share in found[method].values():
            assert 0 <= share <= 1
            assert f"{share:.3f}" in done.stdout
    assert found["logistic regression"]["accuracy"] > 0.5  # it learns in no time
    assert found["reconstruction"]["error of means"] > 0
    assert found["reconstruction"]["error"] > 0
    for when in ("neighbours before", "neighbours after"):
        assert set(found[when]) == {"flatten", "mean"}
    for kind in ("pretraining", "fine-tuning"):
        curve = results["curves"][kind]
        assert curve["steps"] == 20
        assert 0 < curve["largest difference"] <= 10 * curve["largest drift"]
