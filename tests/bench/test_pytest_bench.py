"""`pytest bench`: options are refused before any work, and what cannot be measured is recorded."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cellpatch_fast.benchmarks.results import Record, Run, Timing

ROOT = Path(__file__).parents[2]
FAKES = "tests.bench.fake_models"


def pytest_bench(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of `pytest bench` with the group "runtime" alone."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "bench/test_runtime_vs_genes.py"),
            *("--device", "cpu", "-p", "no:cacheprovider", *map(str, arguments)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def results_in(folder: Path) -> Path:
    (path,) = folder.glob("*/*.json")
    return path


def test_a_run_leaves_results_and_their_report(tmp_path: Path) -> None:
    code, output = pytest_bench(
        *("--models", "ours,cellpatch-original", "--genes", "101,53", "--cells", "3"),
        *("--results", tmp_path, "--benchmark-json", tmp_path / "plugin.json"),
    )
    assert code == 0, output
    path = results_in(tmp_path)
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
    for suffix in (".md", ".html", "-runtime.png", "-runtime.svg"):
        assert path.with_name(path.stem + suffix).stat().st_size > 0
    assert str(path) in output
    assert "| CellPatch, original |" in output
    # pytest-benchmark has the same times
    benchmarks = json.loads((tmp_path / "plugin.json").read_text())["benchmarks"]
    medians = [record.seconds.median for record in run.records]
    assert [found["stats"]["median"] for found in benchmarks] == pytest.approx(medians)


@pytest.fixture(scope="module")
def fake_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Run]:
    """A run of models that fail in every way, compared with one in which ours took no time."""
    folder = tmp_path_factory.mktemp("fakes")
    old = Run(
        date="2026-01-01T00:00:00",
        device={"type": "cpu", "name": "another", "slug": "another"},
        versions={},
        settings={},
        ceilings={},
        models={"the quick one": {"ours": True}},
        records=[
            Record(
                *("runtime", "runtime/the quick one/101", "measured"),
                seconds=Timing(1e-12, 1e-12, 1e-12, 1),
                details={"model": "the quick one", "genes": 101},
            )
        ],
    )
    old.save(folder / "old.json")
    code, output = pytest_bench(
        *("--registry", FAKES, "--genes", "101,307,401", "--cells", "2", "--time-limit", "1.5"),
        *("--results", folder, "--compare", folder / "old.json", "--threshold", "1.5"),
        *("--deselect", "bench/test_runtime_vs_genes.py::test_annotation[wrong-307]"),
        *("--deselect", "bench/test_runtime_vs_genes.py::test_annotation[wrong-401]"),
    )
    return code, output, Run.load(results_in(folder))


Found = Callable[[str], dict[int, Record]]


@pytest.fixture(scope="module")
def found(fake_run: tuple[int, str, Run]) -> Found:
    """``found(key)``: a model's records by genes."""
    records = fake_run[2].of("runtime")
    return lambda key: {
        record.details["genes"]: record
        for record in records
        if record.details["model"] == f"the {key} one"
    }


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
    assert first.details["ignored"] == 101 - 53
    for record in others:
        assert record.seconds == first.seconds
        assert record.details["measured_at"] == 101
        assert record.details["ignored"] == record.details["genes"] - 53


def test_a_failed_model_and_a_slower_one_fail_the_run(fake_run: tuple[int, str, Run]) -> None:
    code, output, run = fake_run
    assert code == 1
    assert "failed: ValueError: a mistake in the model" in output
    assert "more than 1.5 × as slow as the older run: runtime/the quick one/101" in output
    assert "Warning: the runs differ in their device" in output
    assert len(run.records) == 3 * 8 - 2


@pytest.fixture(scope="module")
def options() -> Iterator[Any]:
    """The benchmarks' module of options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield importlib.import_module("bench.options")


Read = Callable[..., Any]


@pytest.fixture
def read(options: Any, tmp_path: Path) -> Read:
    """``read(arguments...)``: the options of a command line."""

    def read(*arguments: str | Path) -> Any:
        parser = pytest.Parser(_ispytest=True)
        options.add_options(parser)
        if "--results" not in arguments:
            arguments += ("--results", tmp_path / "results")
        option = parser.parse(["bench", *map(str, arguments)])
        return options.read_options(SimpleNamespace(option=option), tmp_path)

    return read


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
