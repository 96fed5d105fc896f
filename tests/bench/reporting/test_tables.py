"""Findings and tables: every number, mark and verdict follows from the records alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.reporting.findings import (
    TARGET_RATIOS,
    digits,
    linear_fit,
    size,
    speed_up,
    targets,
    times,
)
from bench.reporting.results import STATUSES, Record
from bench.reporting.tables import Table, all_tables, runtime_tables

from .runs import CAPPED, OURS, WHOLE, full_run, kernel, measured, point, run, runtime_run


def cells_of(table: Table, row: str) -> dict[str, str]:
    """The texts of a row by column."""
    (found,) = [line for line in table.rows if line[0] == row]
    return dict(zip(table.header[1:], found[1:], strict=True))


def test_the_runtime_table_says_what_came_of_every_attempt() -> None:
    seconds, memory = runtime_tables(runtime_run())
    assert seconds.markdown() == (
        "**Annotation, seconds per 1,000 cells (median)**\n\n"
        "| model, genes per cell | 503 | 1,009 | 2,000 | × ours at 2,000 |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| CellPatch (ours) | 0.601 | 1.11 | 2.10 | 1 × |\n"
        "| Geneformer V1 | 3.00 | 9.00 | out of memory | – |\n"
        "| scGPT | 100 | 210 | 211† | 101 ×† |\n\n"
        "† the model ignores the genes of a cell beyond its cap (scGPT: 1,009).\n\n"
        "Ours: 97.6 µs per cell + 1,000 ns per gene, R² = 1.0000 over 503 to 2,000 genes."
    )
    assert cells_of(memory, CAPPED) == {"503": "101 MB", "1,009": "202 MB", "2,000": "202 MB†"}
    assert cells_of(memory, WHOLE)["2,000"] == "out of memory"
    assert cells_of(memory, OURS)["503"] == "0 B"


@given(
    cap=st.none() | st.integers(1, 3_000),
    status=st.sampled_from(STATUSES),
    own=st.sampled_from(STATUSES),
    seconds=st.floats(1e-3, 1e3),
)
def test_caps_and_statuses_are_marked(
    cap: int | None, status: str, own: str, seconds: float
) -> None:
    def record(model: str, of_status: str, taken: float) -> Record:
        made = point(model, 2_000, taken if of_status == "measured" else None)
        reason = "" if made.measured else "why"
        return Record("runtime", made.name, of_status, reason, made.seconds, made.per, made.details)

    models = {CAPPED: {"ours": False, "cap": cap}, OURS: {"ours": True, "cap": None}}
    made = run(record(CAPPED, status, seconds), record(OURS, own, 1.0), models=models)
    table = runtime_tables(made)[0]
    mark = "†" if cap is not None and cap < 2_000 else ""
    shown = cells_of(table, CAPPED)
    assert shown["2,000"] == (digits(seconds) + mark if status == "measured" else status)
    ratio = shown.get("× ours at 2,000", "–")
    both = status == own == "measured"
    assert ratio == (times(seconds) + mark if both else "–")
    assert any(note.startswith("†") for note in table.notes) == bool(mark and status == "measured")


def test_what_happens_once_stands_apart() -> None:
    once = {"setup_seconds": 0.5, "first_call_seconds": 3.0, "batch": 4_096}
    made = run(
        point(OURS, 503, 1.0, **once),
        point(OURS, 997, 2.0, **once | {"first_call_seconds": 2.0, "batch": 1_024}),
        point(WHOLE, 503, 2.0, batch=7),
        point(WHOLE, 997, None, batch=1),
    )
    assert runtime_tables(made)[1].rows == [
        [OURS, "0.500", "3.00", "1,024 to 4,096"],
        [WHOLE, "–", "–", "7"],
    ]


def test_a_point_that_was_not_tried_is_a_dash() -> None:
    made = run(point(OURS, 503, 1.0), point(OURS, 997, 2.0), point(WHOLE, 997, 5.0))
    (table,) = runtime_tables(made)
    assert cells_of(table, WHOLE) == {"503": "–", "997": "5.00", "× ours at 997": "2.5 ×"}
    assert table.notes == ()


def test_genes_that_a_record_says_are_ignored_are_marked_without_a_cap() -> None:
    made = run(point(WHOLE, 2_000, 3.0, ignored=800), point(OURS, 2_000, 1.0, ignored=0))
    (table,) = runtime_tables(made)
    assert cells_of(table, WHOLE)["2,000"] == "3.00†"
    assert table.notes == (
        "† the model ignores the genes of a cell beyond its cap (Geneformer V1: some).",
    )


def linear(*points: tuple[int, float]) -> Any:
    return linear_fit(run(*(point(OURS, genes, 1_000 * seconds) for genes, seconds in points)))


def test_the_fit_is_least_squares() -> None:
    exact = linear((503, 0.25 + 503 * 3e-4), (1_009, 0.25 + 1_009 * 3e-4), (20_011, 6.2533))
    assert (exact.fixed, exact.per_gene) == pytest.approx((0.25, 3e-4))
    assert exact.r_squared == pytest.approx(1.0)
    assert exact.genes == (503, 1_009, 20_011)
    bent = linear((1, 1.0), (2, 2.0), (3, 4.0))
    assert (bent.fixed, bent.per_gene) == pytest.approx((-2 / 3, 1.5))
    assert bent.r_squared == pytest.approx(27 / 28)
    flat = linear((1, 2.0), (2, 2.0), (3, 2.0))
    assert (flat.per_gene, flat.r_squared) == (0.0, 1.0)


def test_two_points_are_no_fit() -> None:
    assert linear((1, 1.0), (2, 2.0)) is None
    lost = [point(OURS, 7, 1.0), point(OURS, 11, 2.0), point(OURS, 13, None)]
    assert linear_fit(run(*lost)) is None
    assert (
        linear_fit(run(point(WHOLE, 7, 1.0), point(WHOLE, 9, 1.0), point(WHOLE, 11, 2.0))) is None
    )


def verdicts(made: Any) -> dict[str, tuple[str, str]]:
    return {target.name: (target.found, target.verdict) for target in targets(made)}


def test_targets_are_met_or_missed_by_so_much() -> None:
    original = next(iter(TARGET_RATIOS))
    models = {name: {"ours": name == OURS} for name in (OURS, *TARGET_RATIOS)}
    made = run(
        point(OURS, 2_000, 1.0),
        point(original, 2_000, 20.0),
        point("Geneformer V1", 2_000, 75.0),
        point("scGPT", 2_000, None),
        point("scGPT", 503, 900.0),
        measured("startup", "import", 1.2, what="import", limit=1.5),
        measured("startup", "help", 0.6, what="help", limit=0.5),
        measured("startup", "first", 9.0, what="first", limit=None),
        models=models,
    )
    found = verdicts(made)
    assert found.pop("faster than every peer at each number of genes") == (
        f"least 20 ×: {original}, 2,000 genes (2 of 4 points measured)",
        "met",
    )
    assert found == {
        f"times as fast as {original}, 2,000 genes": ("20 ×", "met"),
        "times as fast as Geneformer V1, 2,000 genes": ("75 ×", "missed by 25%"),
        "times as fast as scGPT, 2,000 genes": ("–", "not measured"),
        "import": ("1.20 s", "met"),
        "help": ("0.600 s", "missed by 20%"),
    }


def test_one_peer_that_is_faster_somewhere_is_a_miss() -> None:
    made = run(
        *(point(OURS, genes, seconds) for genes, seconds in ((503, 1.0), (2_000, 2.0))),
        *(point(CAPPED, genes, seconds) for genes, seconds in ((503, 7.0), (2_000, 1.6))),
    )
    found, verdict = verdicts(made)["faster than every peer at each number of genes"]
    assert found == "least 0.8 ×: scGPT, 2,000 genes (2 of 2 points measured)"
    assert verdict == "missed by 25%"


def test_ratios_of_a_cpu_are_no_target_of_a_gpu() -> None:
    gpu = {"type": "cuda", "name": "A GPU", "slug": "a-gpu"}
    assert list(verdicts(runtime_run(device=gpu))) == [
        "faster than every peer at each number of genes"
    ]
    assert targets(run()) == []


def test_nothing_is_said_where_ours_is_not_measured() -> None:
    made = run(point(WHOLE, 2_000, 3.0), point(OURS, 2_000, None))
    assert speed_up(made, WHOLE, 2_000) is None
    assert {verdict for _, verdict in verdicts(made).values()} == {"not measured"}
    (table,) = runtime_tables(made)
    assert table.header == ["model, genes per cell", "2,000"]


def test_every_group_has_its_tables() -> None:
    tables = all_tables(full_run())
    assert list(tables) == [
        *("Aims", "Runtime", "Models", "Training", "Kernels"),
        *("Loader", "Atlas", "Startup", "Not measured"),
    ]
    (training,) = tables["Training"]
    assert training.caption == "A step of fine-tuning, 64 cells of 997 genes"
    assert training.rows == [
        [OURS, "0.200", "0.180–0.220", "320", "1 ×"],
        [WHOLE, "4.60", "4.14–5.06", "–", "23 ×"],
    ]
    encoder, decoder, kernels = tables["Kernels"]
    assert encoder.header == ["method", "503", "1,009"]
    assert encoder.rows == [["ours", "11.0", "13.0"], ["padded", "0.200", "–"]]
    assert decoder.rows == [["ours", "3.00"]]
    assert kernels.rows[0] == [
        "encoder, 503",
        "1,000",
        "30.0",
        "0.500",
        "31%",
        "2.0e-06",
        "1.0e-05",
    ]
    (loader,) = tables["Loader"]
    assert cells_of(loader, "CellLoader, tokens")["million non-zeros/s"] == "470"
    (atlas,) = tables["Atlas"]
    assert atlas.rows[1] == ["100,000", "1,499", "14.3", "7,000", "530 MB", "819 MB"]
    assert cells_of(tables["Startup"][0], "cellpatch --help")["seconds (median)"] == "0.610"
    assert tables["Not measured"][0].rows == [
        ["runtime/Geneformer V1/2000", "out of memory", "3 GB asked for"],
        ["runtime/scBERT", "skipped", "performer-pytorch is missing"],
    ]


def test_parameters_stand_beside_the_published_ones() -> None:
    numbers, texts = all_tables(full_run())["Models"]
    assert numbers.rows == [
        [OURS, "7", "–", "–", "all"],
        [WHOLE, "103", "100", "+3.0%", "all"],
        [CAPPED, "53", "53", "none", "1,009"],
    ]
    assert texts.header == ["model"]


def test_an_inaccurate_kernel_has_no_speed() -> None:
    wrong = Record(
        "kernels", "kernels/encoder/7/fast", "inaccurate", "error 0.3, allowed 1e-5",
        details={"op": "encoder", "case": "7", "method": "fast", "genes_per_second": 1e12},
    )  # fmt: skip
    tables = all_tables(run(kernel("encoder", "7", "ours", 1e6, ours=True), wrong))
    assert [row[0] for row in tables["Kernels"][0].rows] == ["ours"]
    assert tables["Not measured"][0].rows == [
        ["kernels/encoder/7/fast", "inaccurate", "error 0.3, allowed 1e-5"]
    ]


def test_an_empty_run_has_no_tables() -> None:
    assert all_tables(run(models={})) == {}


@given(st.text())
def test_no_name_breaks_a_table(name: str) -> None:
    models = {name: {"ours": True}}
    (table, *_) = runtime_tables(run(point(name, 503, 1.0), models=models))
    lines = table.markdown().splitlines()
    *_, row = [line for line in lines if line.startswith("|")]
    escaped = re.sub(r"\\.", "", row)
    assert escaped.count("|") == 4
    assert not re.search(r"[<>*`]", escaped)
    assert row.endswith(" | 1.00 | 1 × |")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (1e-5, "1.00e-05"), (0.012345, "0.0123"), (9.999, "10.0"), (99.96, "100")),
        *((123.4, "123"), (12_345.6, "12,346")),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_bytes_have_units() -> None:
    assert [size(n) for n in (0, 999, 999.6, 53e6, 2.37e9, 4.2e15)] == [
        *("0 B", "999 B", "1 kB", "53 MB", "2.37 GB", "4.2e+03 TB"),
    ]
