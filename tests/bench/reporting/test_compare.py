"""Two runs side by side: what counts as slower, and what is only said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.reporting.compare import compare, require_within, slower_than
from bench.reporting.results import Record, Timing
from cellpatch_fast import InputError

from .runs import OURS, WHOLE, measured, point, run, runtime_run


def test_ratios_are_of_medians_and_the_slowest_comes_first() -> None:
    old = run(point(OURS, 503, 1.0), point(OURS, 997, 2.0), point(WHOLE, 503, 4.0))
    new = run(point(OURS, 503, 1.15), point(OURS, 997, 3.0), point(WHOLE, 503, 2.0))
    found = compare(old, new)
    assert [(row.name, row.old, row.new, row.ratio, row.overlap) for row in found.rows] == [
        (f"runtime/{OURS}/997", 2.0, 3.0, 1.5, False),
        (f"runtime/{OURS}/503", 1.0, 1.15, 1.15, True),
        (f"runtime/{WHOLE}/503", 4.0, 2.0, 0.5, False),
    ]
    assert (found.only_old, found.only_new, found.warnings) == ([], [], [])
    assert "| runtime/CellPatch (ours)/997 | 2.00 | 3.00 | 1.50 | apart |" in found.markdown()


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_slower_is_beyond_the_threshold(ratio: float, threshold: float) -> None:
    found = compare(run(point(OURS, 7, 1.0)), run(point(OURS, 7, ratio)))
    assert bool(slower_than(found, threshold)) == (ratio > threshold)


@pytest.mark.parametrize("touching", [True, False])
def test_ranges_that_touch_overlap(touching: bool) -> None:
    old = replace(point(OURS, 7, 1.0), seconds=Timing(0.9, 1.0, 1.2, 5))
    low = 1.2 if touching else 1.201
    new = replace(old, seconds=Timing(low, 1.3, 1.4, 5))
    assert [row.overlap for row in compare(run(old), run(new)).rows] == [touching]
    assert [row.overlap for row in compare(run(new), run(old)).rows] == [touching]


def test_a_time_that_was_lost_is_slower_and_one_that_was_skipped_is_not() -> None:
    names = [measured("startup", name, 1.0, what=name) for name in "abc"]
    lost = Record("startup", "startup/a", "out of time", "600 s")
    skipped = Record("startup", "startup/b", "skipped", "not installed")
    found = compare(run(*names), run(lost, skipped, names[2]))
    assert [row.name for row in slower_than(found, 9.0)] == ["startup/a"]
    assert "| startup/a | 1.00 | out of time | – | – |" in found.markdown()
    with pytest.raises(InputError, match=r"1 of 3 benchmarks .* 9 × .*startup/a \(out of time\)"):
        require_within(found, 9.0)
    gained = compare(run(lost), run(names[0]))
    assert slower_than(gained, 0.1) == []
    assert "| startup/a | – | 1.00 | – | – |" in gained.markdown()


def test_what_one_run_alone_has_is_listed_apart() -> None:
    old, new = run(point(OURS, 503, 1.0)), run(point(OURS, 997, 2.0))
    found = compare(old, new)
    assert (found.only_old, found.only_new) == (
        [f"runtime/{OURS}/503"],
        [f"runtime/{OURS}/997"],
    )
    assert slower_than(found, 0.1) == []
    assert found.markdown() == (
        "No benchmark is in both runs.\n\nOnly in the old: runtime/CellPatch (ours)/503.\n\n"
        "Only in the new: runtime/CellPatch (ours)/997."
    )


def test_another_device_or_dtype_is_warned_of() -> None:
    old = runtime_run()
    new = runtime_run(
        device=old.device | {"name": "A GPU"}, settings=old.settings | {"dtype": "bfloat16"}
    )
    found = compare(old, new)
    assert len(found.warnings) == 2
    first, second, *_ = found.markdown().split("\n\n")
    assert first.startswith("Warning: ")
    assert "device, old A processor (2 cores), new A GPU" in first
    assert "dtype, old float32, new bfloat16" in second
    require_within(found, 1.0)
