"""The results file: what is written is read again, and what is wrong is refused where it is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.reporting.results import (
    FORMAT,
    FORMAT_VERSION,
    GROUPS,
    STATUSES,
    Record,
    Run,
    Timing,
    newest,
    require_writable,
)
from cellpatch_fast import InputError

from .runs import OURS, measured, point, run, runtime_run, timing

ROOT = Path(__file__).parents[3]
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | finite | st.text(max_size=7),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
things = st.dictionaries(st.text("abcxyz é|<", max_size=7), json_values, max_size=3)


@st.composite
def timings(draw: st.DrawFn) -> Timing:
    p20, median, p80 = sorted(draw(st.tuples(*[st.floats(1e-9, 1e9)] * 3)))
    return Timing(p20, median, p80, draw(st.integers(1, 1_000)))


@st.composite
def records(draw: st.DrawFn, name: str) -> Record:
    group, status = draw(st.sampled_from(list(GROUPS))), draw(st.sampled_from(STATUSES))
    values: dict[type, Any] = {str: OURS, int: draw(st.integers(1, 70_000))}
    needed = {key: values[kind] for key, kind in GROUPS[group].items()}
    details = draw(things) | needed
    if status == "measured":
        return Record(group, name, status, "", draw(timings()), draw(st.text()), details)
    return Record(group, name, status, draw(st.text(min_size=1)), details=details)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    names = draw(st.lists(st.text(max_size=9), unique=True, max_size=4))
    return run(
        *(draw(records(name)) for name in names),
        settings=draw(things),
        versions=draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5))),
        ceilings=draw(st.dictionaries(st.text(max_size=5), finite | st.none())),
    )


@settings(max_examples=40)
@given(runs())
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, made: Run) -> None:
    path = tmp_path_factory.mktemp("results") / "deep" / "run.json"
    made.save(path)
    assert Run.load(path) == made
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_refused_where_they_arise(number: float) -> None:
    with pytest.raises(ValueError, match="a time is"):
        Timing(number, number, number, 3)
    with pytest.raises(ValueError, match="runtime/A/7: details"):
        point("A", 7, 1.0, peak_bytes=[{"deep": number}])
    with pytest.raises(ValueError, match="ceilings"):
        run(ceilings={"copy bytes/s": number})
    with pytest.raises(ValueError, match="models"):
        run(models={OURS: {"ours": True, "parameters": number}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Record("speed", "a", "measured", seconds=timing(1)), "'speed' is none of runtime"),
        (lambda: Record("runtime", "a", "slow", "why"), "status 'slow' is none of"),
        (lambda: replace(point("A", 7, 1.0), seconds=None), "measured, and its seconds are None"),
        (lambda: replace(point("A", 7, None), seconds=timing(1)), "out of memory, and its seconds"),
        (lambda: replace(point("A", 7, None), reason=""), "without a reason"),
        (lambda: point("A", 7.5, 1.0), "'genes' must be a int"),  # type: ignore[arg-type]
        (lambda: point("A", True, 1.0), "'genes' must be a int"),
        (lambda: point("A", 7, 1.0, ignored="some"), "'ignored' must be a number or None"),
        (lambda: measured("kernels", "a", 1.0, op="encode", case="7"), "'method' must be a str"),
        (lambda: run(point("A", 7, 1.0)), "its model is not among the models"),
        (lambda: run(point(OURS, 7, 1), point(OURS, 7, 2)), "called 'runtime/.*/7'"),
        (lambda: run(device={"type": "cpu", "name": "x"}), "'slug' must be a str"),
        (lambda: run(device={"type": "cpu", "name": "x", "slug": "../x"}), "not a folder's name"),
        (lambda: run(models={OURS: {"cap": 3}}), "'ours' must be a bool"),
        (lambda: run(models={OURS: {"ours": True, "cap": "3"}}), "'cap' must be a number"),
        (lambda: run(date="yesterday"), "yesterday"),
        (lambda: Timing(2.0, 1.0, 3.0, 5), "a time is"),
        (lambda: Timing(0.0, 1.0, 3.0, 5), "a time is"),
        (lambda: Timing(1.0, 1.0, 1.0, 0), "of 1 repeat at least"),
    ],
)
def test_what_does_not_fit_together_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    content = json.loads(
        json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(runtime_run())})
    )
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON .*Name a results file"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1, 2]", "holds no results of `pytest bench`"),
        (b'{"format": "another"}', "not marked as 'cellpatch-fast benchmarks'"),
        (edited(lambda c: c.update(format_version=2)), "has format version 2, and .* reads 1"),
        (edited(lambda c: c.pop("format_version")), "has format version None"),
        (edited(lambda c: c.pop("records")), "is damaged.*records"),
        (edited(lambda c: c.update(records=3)), "is damaged"),
        (edited(lambda c: c.update(settings=[])), "is damaged.*settings must be a dict"),
        (edited(lambda c: c.update(more=1)), "is damaged.*more"),
        (edited(lambda c: c["records"][1].update(status="fast")), "is damaged.*'fast'"),
        (edited(lambda c: c["records"][1].update(name=5)), "is damaged.*are texts"),
        (edited(lambda c: c["records"][1]["seconds"].pop("p20")), "is damaged.*p20"),
        (edited(lambda c: c["records"][1]["seconds"].update(p20="1")), "is damaged"),
        (edited(lambda c: c["records"][1]["details"].update(x=math.nan)), "is damaged.*JSON"),
        (edited(lambda c: c["records"].append(c["records"][0])), "is damaged.*several records"),
    ],
)
def test_files_that_are_no_results_are_refused(
    tmp_path: Path, content: bytes | str, message: str
) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message) as caught:
        Run.load(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match=f"{path} cannot be read"):
            Run.load(path)


def test_where_nothing_can_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "run.json").mkdir()
    for path in (tmp_path / "file" / "run.json", tmp_path / "run.json"):
        with pytest.raises(InputError, match=f"{path} cannot be written.*Choose another folder"):
            runtime_run().save(path)
    with pytest.raises(InputError, match="Choose another folder"):
        require_writable(tmp_path / "file" / "results")
    require_writable(tmp_path / "new" / "results")
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == [
        *("file", "new", "results", "run.json"),
    ]


def test_files_are_named_by_device_and_date_and_never_overwritten(tmp_path: Path) -> None:
    made = run(date="2026-11-23T09:31:59+02:00")  # UTC is what counts
    paths = []
    for _ in range(11):
        paths.append(made.path_in(tmp_path))
        made.save(paths[-1])
    assert paths[0] == tmp_path / "a-processor" / "2026-11-23T0731.json"
    assert [path.stem[15:] for path in paths[1:]] == [f"-{i}" for i in range(2, 12)]
    assert newest(tmp_path) == paths[-1]  # 11 is after 2
    later = run(date="2026-11-23T07:32:00", device={"type": "cuda", "name": "G", "slug": "0-g"})
    later.save(later.path_in(tmp_path))
    (tmp_path / "a-processor" / "zz.json").write_text("{}")
    (tmp_path / "2030-01-01T0000.json").write_text("{}")
    assert newest(tmp_path) == tmp_path / "0-g" / "2026-11-23T0732.json"
    with pytest.raises(InputError, match=r"none holds no results .*`pytest bench`"):
        newest(tmp_path / "none")


def test_reading_results_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, bench.reporting.__main__, bench.reporting.write, "
        "bench.reporting.compare; "
        "print(*{'torch', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == ""
