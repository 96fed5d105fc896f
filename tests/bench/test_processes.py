"""What the benchmarks measure in processes of their own: records of whatever comes of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.reporting.results import Record, Timing

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def bench() -> Iterator[SimpleNamespace]:
    names = ("atlas_runs", "processes", "startup")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield SimpleNamespace(**{name: importlib.import_module(f"bench.{name}") for name in names})


def test_a_process_ends_with_its_facts_or_with_the_reason_why_not(bench: SimpleNamespace) -> None:
    run = bench.processes.run_python
    done = run("-c", "print('a line'); print('{\"cells\": 7}')")
    assert done.facts == {"cells": 7}
    assert run("-c", "raise KeyError('x')") == ("failed", "KeyError: 'x'")
    assert run("-c", "raise MemoryError") == ("out of memory", "MemoryError")
    assert run("-c", "import os; os.kill(os.getpid(), 9)").status == "out of memory"
    assert run("-c", "import time; time.sleep(60)", limit=0.2) == ("out of time", "more than 0.2 s")


def test_processes_import_the_benchmarks(bench: SimpleNamespace) -> None:
    code = "import bench.processes; print(bench.processes.peak_memory())"
    assert int(bench.processes.run_python("-c", code).output) > 1 << 20


def test_percentiles_are_values_that_were_found(bench: SimpleNamespace) -> None:
    assert bench.processes.timing_of([3.0, 1.0, 2.0, 9.0, 8.0, 7.0]) == Timing(2.0, 5.0, 8.0, 6)
    assert bench.processes.timing_of([4.0]) == Timing(4.0, 4.0, 4.0, 1)


def test_starts_are_recorded_by_name(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = bench.startup.Start
    several = [
        start("one", ("-c", "1"), 0.5),
        start("none", ("-c", "raise OSError('x')")),
        start("long", ("-c", "import time; time.sleep(1.01)")),
    ]
    monkeypatch.setattr(bench.startup, "starts", lambda *_: several)
    one, none, long = bench.startup.measure_startup(tmp_path, CPU, repeats=6, time_limit=60)
    assert (one.name, one.status, one.seconds.repeats) == ("startup/one", "measured", 6)
    assert one.details.keys() == {"what", "limit", "first_call_seconds"}
    assert (none.status, none.reason) == ("failed", "OSError: x")
    assert long.seconds.repeats == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def test_the_first_embedding_is_what_users_write(
    bench: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = bench.startup.starts(folder, CPU)[-1]
    option, code, *arguments = start.arguments
    monkeypatch.setattr("sys.argv", [option, *map(str, arguments)])
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["cells"].obsm["X_cellpatch"].shape == (100, 640)


def test_an_atlas_goes_from_file_to_store(bench: SimpleNamespace, folder: Path) -> None:
    (record,) = bench.atlas_runs.measure_atlases(folder, CPU, [23], repeats=1, time_limit=60)
    assert (record.name, record.status) == ("atlas/23", "measured")
    assert record.details["output_bytes"] > 23 * 640 * 2
    assert record.details["peak_rss_bytes"] > 1 << 26
    assert record.details["cells_per_second"] == 23 / record.seconds.median
    names = {path.name for path in folder.iterdir()}
    assert names == {"atlas-23x820.h5ad", "cells-100x1000.h5ad", "untrained-model"}


def test_what_cannot_be_done_in_time_or_space_is_not_begun(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(folder: Path, device: torch.device, cells: int, *_: object) -> Record:
        details = {"cells": cells, "cells_per_second": 10.0}
        second = Timing(1.0, 1.0, 1.0, 1)
        return Record("atlas", f"atlas/{cells}", "measured", seconds=second, details=details)

    monkeypatch.setattr(bench.atlas_runs, "measure_atlas", measured)
    sizes = [10, 10_000, 10**12]
    few, many, most = bench.atlas_runs.measure_atlases(
        tmp_path, CPU, sizes, repeats=1, time_limit=100.0
    )
    assert few.measured
    assert many.status == "out of time"
    assert many.reason == "1000 s at the speed of fewer cells, 300 s allowed"
    assert most.status == "skipped"
    assert "GB free" in most.reason
    assert not list(tmp_path.iterdir())
