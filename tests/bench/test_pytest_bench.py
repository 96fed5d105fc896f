"""`pytest bench`: options are refused before any work, and what cannot be measured is recorded."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.reporting.results import Record, Run, Timing

ROOT = Path(__file__).parents[2]


def pytest_bench(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of `pytest bench` with the group "runtime" alone.

    pytest-benchmark measures nothing in a worker of pytest-xdist, as this process may be one.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "bench/test_runtime_vs_genes.py"),
            *("--device", "cpu", "-p", "no:cacheprovider", *map(str, arguments)),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def older_run(path: Path, name: str) -> Path:
    """A results file in which one benchmark took next to no time."""
    seconds = Timing(1e-12, 1e-12, 1e-12, 1)
    run = Run(
        date="2026-01-01T00:00:00",
        device={"type": "cpu", "name": "another", "slug": "another"},
        versions={},
        settings={},
        ceilings={},
        models={},
        records=[Record("startup", name, "measured", seconds=seconds, details={"what": ""})],
    )
    run.save(path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """Exit code, output and folder of a small run of two models, with a faster one to compare."""
    folder = tmp_path_factory.mktemp("results")
    old = older_run(folder / "old.json", "runtime/CellPatch (ours)/53")
    code, output = pytest_bench(
        *("--models", "ours,cellpatch-original", "--genes", "101,53", "--cells", "3"),
        *("--results", folder, "--benchmark-json", folder / "plugin.json"),
        *("--compare", old, "--threshold", "1.5"),
    )
    return code, output, folder


def results_in(folder: Path) -> Path:
    (path,) = folder.glob("*/*.json")
    return path


def test_a_run_leaves_results(finished: tuple[int, str, Path]) -> None:
    _, output, folder = finished
    path = results_in(folder)
    run = Run.load(path)
    names = [
        f"runtime/{model}/{genes}"
        for model in ("CellPatch (ours)", "CellPatch, original")
        for genes in (53, 101)
    ]
    assert [record.name for record in run.records] == names
    assert run.settings["genes"] == [53, 101]
    assert run.settings["quick"]
    assert not run.settings["interrupted"]
    assert run.ceilings["matrix FLOP/s"] > 1e9
    assert {"python", "torch", "numba"} <= set(run.versions)
    for record in run.records:
        assert record.measured
        assert record.per == "1,000 cells"
        assert record.details["batch"] in (1, 2)
        assert record.details["tokens"] == record.details["genes"]
        assert record.details["first_call_seconds"] > 0
        assert record.details["model_bytes"] > 4 * 60_000 * 32  # the table of genes
        assert run.models[record.details["model"]]["parameters"] > 60_000 * 32
    assert f"results: {path}" in output
    assert "4 passed" in output


def test_a_run_leaves_a_report(finished: tuple[int, str, Path]) -> None:
    _, output, folder = finished
    path = results_in(folder)
    for suffix in (".md", ".html", "-runtime.png", "-runtime.svg"):
        assert path.with_name(path.stem + suffix).stat().st_size > 0
    assert f"report: {path.with_suffix('.html')}" in output
    assert "| CellPatch, original |" in output


def test_pytest_benchmark_has_the_same_times(finished: tuple[int, str, Path]) -> None:
    folder = finished[2]
    benchmarks = json.loads((folder / "plugin.json").read_text())["benchmarks"]
    records = Run.load(results_in(folder)).records
    medians = [record.seconds.median for record in records]
    assert [found["stats"]["median"] for found in benchmarks] == pytest.approx(medians)


def test_a_run_that_is_too_slow_fails(finished: tuple[int, str, Path]) -> None:
    code, output, _ = finished
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "Warning: the runs differ in their device" in output
    assert "more than 1.5 × as slow as the older run: runtime/CellPatch (ours)/53" in output


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmarks' modules, found by processes as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        patch.setenv("PYTHONPATH", str(ROOT))
        names = ("options", "runtime", "session")
        yield SimpleNamespace(**{name: importlib.import_module(f"bench.{name}") for name in names})


Read = Callable[..., Any]


@pytest.fixture(scope="module")
def read(bench: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Read:
    """``read(arguments...)``: the options of a command line."""
    folder = tmp_path_factory.mktemp("options")

    def read(*arguments: str | Path) -> Any:
        parser = pytest.Parser(_ispytest=True)
        bench.options.add_options(parser)
        if "--results" not in arguments:
            arguments += ("--results", folder / "results")
        option = parser.parse(["bench", *map(str, arguments)])
        return bench.options.read_options(SimpleNamespace(option=option), folder)

    return read


Found = Callable[[str], dict[int, Record]]


@pytest.fixture(scope="module")
def found(bench: SimpleNamespace, read: Read) -> Iterator[Found]:
    """``found(key)``: the records of one of the fake models, by genes."""
    options = read(
        *("--device", "cpu", "--registry", "tests.bench.fake_models", "--genes", "101,307,401"),
        *("--cells", "2", "--time-limit", "1.5"),
    )
    peers = {peer.key: peer for peer in options.peers}
    runtime = bench.runtime.Runtime(options, {})
    yield lambda key: {genes: runtime.measure(peers[key], genes)[0] for genes in options.genes}
    runtime.close()


def test_a_point_beyond_the_time_limit_is_out_of_time_and_so_are_larger_ones(found: Found) -> None:
    records = found("slow")
    assert records[101].measured
    assert [records[genes].status for genes in (307, 401)] == ["out of time"] * 2
    assert records[307].reason == "limit 1.5 s"
    assert records[401].reason == "limit 1.5 s (already at 307 genes)"


@pytest.mark.parametrize(
    ("key", "reason"),
    [("hungry", "tried to allocate"), ("killed", "the system killed its process")],
)
def test_a_point_beyond_the_memory_is_out_of_memory(found: Found, key: str, reason: str) -> None:
    records = found(key)
    assert {record.status for record in records.values()} == {"out of memory"}
    assert reason in records[101].reason
    assert "already at 101 genes" in records[307].reason


def test_a_batch_beyond_the_memory_leaves_the_smaller_one(found: Found) -> None:
    assert {record.details["batch"] for record in found("one at a time").values()} == {1}


def test_a_missing_package_skips_its_model(found: Found) -> None:
    assert {record.status for record in found("missing").values()} == {"skipped"}
    assert found("missing")[101].reason == "ImportError: pip install something"


def test_equal_sequences_are_measured_once(found: Found) -> None:
    first, *others = found("capped").values()
    assert first.measured
    assert first.details["ignored"] == 101 - 53
    for record in others:
        assert record.seconds == first.seconds
        assert record.details["measured_at"] == 101
        assert record.details["ignored"] == record.details["genes"] - 53


def test_a_mistake_in_a_model_fails_its_points(found: Found) -> None:
    records = found("wrong")
    assert {record.status for record in records.values()} == {"failed"}
    assert records[101].reason == "ValueError: a mistake in the model"


def test_a_run_that_measured_nothing_writes_nothing(bench: SimpleNamespace, read: Read) -> None:
    session = bench.session.Session(read("--device", "cpu"))
    session.add(Record("runtime", "runtime/ours/53", "out of time", "limit 1 s"))
    assert session.finish(interrupted=False) == 0
    assert session.summary == ["nothing was measured: no results were written"]
    assert not list(session.options.results.iterdir())


def test_an_interrupted_run_writes_what_it_has(
    bench: SimpleNamespace, read: Read, tmp_path: Path
) -> None:
    session = bench.session.Session(read("--device", "cpu", "--results", tmp_path))
    seconds = Timing(0.3, 0.5, 0.7, 3)
    record = Record("startup", "startup/x", "measured", seconds=seconds, details={"what": "x"})
    session.add(record)
    assert session.finish(interrupted=True) == 0
    run = Run.load(results_in(tmp_path))
    assert run.records == [record]
    assert run.settings["interrupted"]


def refused(read: Read, *arguments: str | Path) -> str:
    with pytest.raises(pytest.UsageError) as error:
        read(*arguments)
    return str(error.value)


def test_a_cpu_has_quick_runs_in_float32_by_default(read: Read) -> None:
    quick, full = read("--device", "cpu"), read("--device", "cpu", "--full")
    assert (quick.quick, full.quick) == (True, False)
    assert quick.dtype == torch.float32
    assert quick.genes == (500, 1000, 2000, 4000, 8000, 16_000)
    assert quick.time_limit < full.time_limit
    assert quick.cells < full.cells
    assert [peer.ours for peer in quick.peers].count(True) == 1


def test_models_are_chosen_by_key(read: Read) -> None:
    assert [peer.key for peer in read("--models", "scgpt, ours").peers] == ["ours", "scgpt"]


def test_an_unknown_model_is_refused_with_the_valid_ones(read: Read) -> None:
    message = refused(read, "--models", "ours,scgtp")
    assert "'scgtp'" in message
    assert "valid are all, ours, cellpatch-flash" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("--genes", "500,x"), "'x'", id="genes"),
        pytest.param(("--genes", "0"), "above 0", id="no genes"),
        pytest.param(("--genes", "70001"), "at most 60,664", id="more genes than there are"),
        pytest.param(("--cells", "-3"), "above 0", id="cells"),
        pytest.param(("--device", "gpu"), "cpu", id="device"),
        pytest.param(("--dtype", "float64"), "bfloat16", id="dtype"),
        pytest.param(("--time-limit", "nan"), "above 0", id="time limit"),
        pytest.param(("--quick", "--full"), "exclude each other", id="quick and full"),
        pytest.param(("--threshold", "1.2"), "add --compare", id="threshold alone"),
        pytest.param(("--registry", "no.such"), "No module named 'no'", id="registry"),
        pytest.param(("--compare", "no-such.json"), "cannot be read", id="no older run"),
    ],
)
def test_wrong_values_are_refused(read: Read, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(read, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_without_a_gpu_is_refused(read: Read) -> None:
    assert "finds no CUDA GPU" in refused(read, "--device", "cuda")


def test_results_that_cannot_be_written_are_refused(read: Read, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refused(read, "--results", tmp_path / "file" / "results")
    assert "Choose another folder for the results" in message


def test_an_older_run_of_another_version_is_refused(read: Read, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"format": "cellpatch-fast benchmarks", "format_version": 907}))
    assert "format version 907" in refused(read, "--compare", old)


def test_a_refused_run_measures_and_writes_nothing(tmp_path: Path) -> None:
    code, output = pytest_bench("--models", "scgtp", "--results", tmp_path)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "valid are all, ours" in output
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())
