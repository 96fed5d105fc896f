"""`cellpatch tune`: what is measured is chosen by the rules, written whole, and used."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

tuning = pytest.importorskip("cellpatch_fast.kernels.gpu.tuning")
configuration = pytest.importorskip("cellpatch_fast.kernels.gpu.configuration")

Configuration = configuration.Configuration
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_tile_and_warps_are_one_for_all_lengths_and_stages_each_length_s_own() -> None:
    """What changes rounding must not depend on a batch; 64 x 4 loses a length and wins overall."""
    times = {
        Configuration(64, 4, 1): [1.0, 9.0, 12.0],
        Configuration(64, 4, 2): [3.0, 4.0, 11.0],
        Configuration(128, 4, 1): [5.0, 8.0, 10.0],
        Configuration(128, 8, 1): [math.inf, 4.0, math.inf],
    }
    assert tuning._choose(times) == {
        "tile": 64,
        "warps": 4,
        "buckets": [
            {"up_to": 256, "stages": 1},
            {"up_to": 2048, "stages": 2},
            {"up_to": None, "stages": 2},
        ],
    }


def test_nothing_that_can_be_launched() -> None:
    with pytest.raises(RuntimeError, match="no candidate could be launched"):
        tuning._choose({Configuration(64, 4, 1): [math.inf, 1.0, 1.0]})


def test_the_file_is_found_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPATCH_CONFIGURATIONS", str(tmp_path))
    monkeypatch.setattr(tuning, "LENGTHS", (2, 3, 5))
    configuration.load.cache_clear()
    lines: list[str] = []
    try:
        path = tuning.tune(
            DEVICE, types=(torch.float16,), tiles=(16,), warps=(4,), stages=(3,), entries=5,
            say=lines.append,
        )  # fmt: skip
        assert list(tmp_path.iterdir()) == [path]  # nothing unfinished is left
        content = json.loads(path.read_text())
        architecture = int(path.stem.removeprefix("sm"))
        found = configuration.configuration_for(architecture, torch.float16, 1000)
        untouched = configuration.configuration_for(architecture, torch.float32, 1000)
    finally:
        configuration.load.cache_clear()
    assert found == Configuration(16, 4, 3)
    assert content["types"]["float32"]["tile"] == untouched.tile
    assert len(lines) == 1
    assert all(f"ms for cells of {length}" in lines[0] for length in (2, 3, 5))
