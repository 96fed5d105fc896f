"""The benchmark of codecs: it runs, and what it calls chosen is what the token store does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numcodecs import blosc

from cellpatch_fast.io.stores import token_writer
from cellpatch_fast.io.stores.shards import EntryArray

ROOT = Path(__file__).parents[2]


def test_it_runs_and_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "codecs.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/codecs.py"), "--toy", "--output", str(output)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["chunk"] == token_writer.CHUNK_ENTRIES
    for row in results["generated"]:
        assert 0 < row["bytes per entry"] < 2.01
        assert row["encoded, million/s"] > 0
        assert row["decoded, million/s"] > 0
    assert {row["array"] for row in results["generated"]} == {"genes", "values"}
    for row in results["runs"]:  # a run of 64 cells has two ends, within a chunk each
        least, most = 1, 1 + 2 * row["chunk"] / (60 * 1_000)
        assert least < row["entries decoded per entry wanted"] < most
        assert row["times the time in order"] > 0
    assert done.stdout.count("**") == 4  # the chosen codecs stand out


def test_the_chosen_codecs_are_those_of_the_token_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from bench.codecs import CHOSEN

    monkeypatch.setattr(blosc, "use_threads", False)
    rng = np.random.default_rng(0)
    chunk = 2_003
    genes = np.sort(rng.integers(0, 60_000, chunk)).astype(np.uint16)
    values = rng.integers(0, 6, chunk).astype(np.uint8)
    stored = {
        "genes": EntryArray("genes", genes.dtype, delta=True, shuffle="shuffle").encode(genes),
        "values": EntryArray("values", values.dtype, delta=False, shuffle="bitshuffle").encode(
            values
        ),
    }
    for name, array in (("genes", genes), ("values", values)):  # behind each, its checksum
        assert CHOSEN[name].encode(array) == stored[name][:-4]
