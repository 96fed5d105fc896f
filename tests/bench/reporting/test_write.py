"""The report and its command: which files are made, what the page holds, how mistakes end."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench.reporting.__main__ import main
from bench.reporting.page import headline, method, write_results_page
from bench.reporting.results import Run
from bench.reporting.write import write_report
from cellpatch_fast import InputError

from .runs import CAPPED, OURS, WHOLE, full_run, measured, point, run, runtime_run, timing

Capture = pytest.CaptureFixture[str]
NASTY = '<b>&"|*`'


def command(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        code = main([*map(str, arguments)])
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def saved(made: Run, path: Path) -> Path:
    made.save(path)
    return path


def test_the_report_lies_beside_the_results(tmp_path: Path) -> None:
    path = saved(runtime_run(), tmp_path / "run.v2.json")
    made = write_report(path)
    assert sorted(entry.name for entry in made) == [
        "run.v2-memory.png",
        "run.v2-memory.svg",
        "run.v2-runtime.png",
        "run.v2-runtime.svg",
        "run.v2-speed-up.png",
        "run.v2-speed-up.svg",
        "run.v2.html",
        "run.v2.md",
    ]
    assert {*made, path} == set(tmp_path.iterdir())
    text = (tmp_path / "run.v2.md").read_text()
    for name in re.findall(r"\]\((.*?\.png)\)", text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert text.count(".png)") == 3
    page = (tmp_path / "run.v2.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 3
    assert "Runtime against genes per cell" in page


def test_the_page_is_self_contained_complete_and_escaped(tmp_path: Path) -> None:
    made = full_run(
        device={"type": "cpu", "name": f"Device {NASTY}", "slug": "d", "cores": 2},
        versions={"torch": f"2.13 {NASTY}"},
    )
    lost = replace(point(CAPPED, 4_001, None), reason=f"reason {NASTY}")
    made = replace(made, records=[*made.records, lost])
    write_results_page(made, tmp_path / "page.html", {})
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|<script|<link|url\(|@import", page)
    assert "<b>" not in page
    assert page.count("&lt;b&gt;") >= 4
    for title in ("In short", "Kernels", "Loading", "Atlases", "Starting", "How it was measured"):
        assert f"<h2>{title}</h2>" in page
    assert "performer-pytorch is missing" in page
    assert "101 ×†" in page
    assert "Device, versions and settings" in page


def test_the_headline_says_only_what_was_measured() -> None:
    text = headline(runtime_run())
    assert "CellPatch (ours) annotates 1,000 cells of 2,000 genes in 2.10 s." in text
    assert (
        "Times as fast as the others there: 101 × scGPT (which takes 1,009 of the genes)." in text
    )
    assert WHOLE not in text.split("Missed")[0]
    assert "R² = 1.0000" in text
    assert headline(run(point(OURS, 503, None))).count("\n") == 0
    missed = headline(run(measured("startup", "help", 0.75, what="help", limit=0.5)))
    assert missed.endswith("Missed of what was aimed for: help (by 50%).")


def test_the_method_is_that_of_the_groups_that_were_run() -> None:
    assert "training step" in method(full_run())
    assert "training step" not in method(runtime_run())


def test_the_command_reports_on_the_newest_run(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.reporting.__main__.RESULTS", tmp_path / "results")
    code, out, err = command(capsys)
    assert (code, out) == (1, "")
    assert "results holds no results" in err
    assert "`pytest bench`" in err
    small = run(measured("startup", "help", 0.4, what="help", limit=0.5))
    path = saved(small, small.path_in(tmp_path / "results"))
    code, out, err = command(capsys)
    assert (code, err) == (0, "")
    assert out.split() == [str(path.with_suffix(suffix)) for suffix in (".md", ".html")]
    code, out, _ = command(capsys, path, "--output", "elsewhere")
    assert (code, out.split()[0]) == (0, f"elsewhere/{path.stem}.md")
    assert "| help | 0.5 s | 0.400 s | met |" in Path(out.split()[0]).read_text()


def test_the_command_compares(tmp_path: Path, capsys: Capture) -> None:
    old = saved(run(point(OURS, 503, 1.0)), tmp_path / "old.json")
    slow = replace(point(OURS, 503, 1.0), seconds=timing(1.3))
    new = saved(run(slow), tmp_path / "new.json")
    code, out, err = command(capsys, new, "--compare", old)
    assert (code, err) == (0, "")
    assert "| 1.00 | 1.30 | 1.30 | apart |" in out
    assert command(capsys, new, "--compare", old, "--threshold", "1.31")[0] == 0
    code, out, err = command(capsys, new, "--compare", old, "--threshold", 1.2)
    assert code == 1
    assert "| 1.30 |" in out
    assert err == (
        "bench.reporting: 1 of 1 benchmarks are slower than 1.2 × the old run's: "
        "runtime/CellPatch (ours)/503 (1.30 × the old time)\n"
    )
    assert command(capsys, old, "--compare", new, "--threshold", 1.2)[0] == 0
    assert sorted(tmp_path.iterdir()) == [new, old]


def test_mistakes_on_the_command_line_are_answered(tmp_path: Path, capsys: Capture) -> None:
    path = saved(run(), tmp_path / "run.json")
    mistakes = {
        (tmp_path / "none.json",): (1, "none.json cannot be read"),
        (path, "--threshold", 1.2): (1, "add --compare OLD.json"),
        (path, "--compare", path, "--output", tmp_path): (1, "leave --output out"),
        (path, "--compare", path, "--threshold", "0"): (2, "above 0, found 0"),
        (path, "--compare", path, "--threshold", "nan"): (2, "above 0, found nan"),
        (path, "--compare", path, "--threshold", "much"): (2, "much"),
        (path, "--output", path): (1, "Choose another folder"),
    }
    for arguments, (expected, message) in mistakes.items():
        code, out, err = command(capsys, *arguments)
        assert (code, out) == (expected, "")
        assert message in err
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_that_cannot_be_finished_says_so(tmp_path: Path) -> None:
    path = saved(run(point(OURS, 503, 1.0)), tmp_path / "run.json")
    (tmp_path / "run.html").mkdir()
    with pytest.raises(InputError, match="could not be finished"):
        write_report(path)
