"""Figures: what is drawn where, and that nothing lies upon another."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

from bench.reporting.charts import all_charts, memory, roofline, runtime, scaling, speed_ups
from bench.reporting.curves import spread, styles
from bench.reporting.results import Record, Run

from .runs import CAPPED, GENES, OURS, WHOLE, full_run, measured, point, run, runtime_run


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def lines(axes: Axes) -> dict[str, Line2D]:
    """By label, samples beside names left out."""
    found = {str(line.get_label()): line for line in axes.get_lines()}
    return {label: line for label, line in found.items() if not label.endswith("sample")}


def x_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xdata(), float)


def y_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata(), float)


def texts(figure: Figure) -> str:
    found = [text.get_text() for text in figure.findobj(Annotation) if isinstance(text, Annotation)]
    found += [text.get_text() for axes in figure.axes for text in axes.texts]
    return "\n".join([figure.get_suptitle(), figure.get_supxlabel(), *found])


def test_runtime_has_a_line_per_model_with_what_was_measured() -> None:
    figure = drawn(runtime(runtime_run()))
    strip, axes = figure.axes
    found = lines(axes)
    assert set(found) == {OURS, WHOLE, CAPPED, f"_{CAPPED}, capped"}
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    np.testing.assert_allclose(x_of(found[OURS]), GENES)
    np.testing.assert_allclose(y_of(found[OURS]), [0.6006, 1.1066, 2.0976])
    np.testing.assert_allclose(y_of(found[WHOLE]), [3.0, 9.0, np.nan])
    assert found[OURS].get_linewidth() > 2 * found[WHOLE].get_linewidth()
    assert found[OURS].get_zorder() > found[WHOLE].get_zorder()
    assert [text.get_text() for text in axes.texts if text.get_text()] == [
        *(OURS, WHOLE, "scGPT (≤ 1,009 genes)"),
    ]
    assert list(lines(strip)) == [f"{WHOLE}: out of memory"]
    np.testing.assert_array_equal(lines(strip)[f"{WHOLE}: out of memory"].get_xdata(), [2_000])
    assert "A processor (2 cores) · float32 · 2026-11-23" in texts(figure)


def test_beyond_its_cap_a_model_is_dotted_and_hollow() -> None:
    figure = drawn(runtime(runtime_run()))
    found = lines(figure.axes[-1])
    full, capped = found[CAPPED], found[f"_{CAPPED}, capped"]
    np.testing.assert_allclose(y_of(full), [100, 210, np.nan])
    np.testing.assert_allclose(y_of(capped), [210, 211])  # it goes on from the last full one
    np.testing.assert_allclose(x_of(capped), GENES[1:])
    assert capped.get_markevery() == [1]
    assert (capped.get_markerfacecolor(), full.get_markerfacecolor()) == ("white", full.get_color())
    assert capped.get_linestyle() != full.get_linestyle()
    assert "ignores genes" in texts(figure)


def test_without_caps_and_losses_there_is_no_note_and_no_strip() -> None:
    figure = drawn(runtime(run(point(OURS, 503, 1.0), point(WHOLE, 503, 2.0))))
    (axes,) = figure.axes
    assert set(lines(axes)) == {OURS, WHOLE}
    assert "ignores" not in texts(figure)


def test_signs_differ_by_status() -> None:
    def without(genes: int, status: str) -> Record:
        details = {"model": WHOLE, "genes": genes}
        return Record("runtime", f"runtime/{genes}", status, "why", details=details)

    lost = [without(g, s) for g, s in ((503, "out of memory"), (997, "out of time"))]
    figure = drawn(runtime(run(point(OURS, 503, 1.0), point(OURS, 997, 1.0), *lost)))
    strip, axes = figure.axes
    assert len({line.get_marker() for line in lines(strip).values()}) == 2
    legend = strip.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["out of memory", "out of time"]
    assert np.isnan(y_of(lines(axes)[WHOLE])).all()


def test_memory_is_drawn_also_where_it_is_nothing() -> None:
    found = lines(drawn(memory(runtime_run())).axes[-1])
    np.testing.assert_allclose(y_of(found[OURS]), [1_000] * 3)
    np.testing.assert_allclose(y_of(found[WHOLE]), [503e6, 1009e6, np.nan])


def test_models_differ_by_colour_marker_or_dash() -> None:
    models = {f"peer {i}": {"ours": False} for i in range(12)} | {OURS: {"ours": True}}
    found = styles(run(models=models))
    assert len({(s.color, s.marker, str(s.dash)) for s in found.values()}) == 13
    assert len({(s.color, str(s.dash)) for s in found.values()}) == 13
    assert len({s.marker for name, s in found.items() if name != OURS}) == 12
    assert [name for name, s in found.items() if s.color == found[OURS].color] == [OURS]


def crowd() -> Run:
    """13 models whose lines end at nearly the same place, two of which are lost."""
    names = [f"A peer with a long name {i}" for i in range(12)]
    models = {name: {"ours": False, "cap": 700} for name in names} | {OURS: {"ours": True}}
    records = [
        point(name, genes, None if i < 2 and genes == 997 else 1.0 + 0.01 * i)
        for i, name in enumerate([*names, OURS])
        for genes in (503, 997)
    ]
    return run(*records, models=models)


def test_no_text_lies_upon_another() -> None:
    figure = drawn(runtime(crowd()))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [text for axes in figure.axes for text in axes.texts if text.get_text()]
    shown += [text for axes in figure.axes for text in axes.get_xticklabels()]
    shown += [text for axes in figure.axes for text in axes.get_yticklabels()]
    boxes = [text.get_window_extent().padded(-1) for text in shown if text.get_text()]
    assert len(boxes) > 16
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


@given(st.lists(st.floats(-0.2, 1.2), max_size=15))
def test_labels_are_spread_in_order_and_near(wanted: list[float]) -> None:
    places = spread(wanted, 0.05, 0.0, 1.0)
    order = np.argsort(wanted, kind="stable")
    moved = np.asarray(places)[order]
    assert (np.diff(moved) >= 0.05 - 1e-9).all()
    assert ((moved >= -1e-9) & (moved <= 1 + 1e-9)).all()
    apart = np.diff(np.asarray(wanted)[order])
    if (apart >= 0.05).all() and all(0 <= value <= 1 for value in wanted):
        np.testing.assert_allclose(places, wanted, atol=1e-9)


def bars(axes: Axes) -> dict[str, tuple[float, bool]]:
    """Right end, and whether hatched, by the name beside."""
    names = [text.get_text() for text in axes.get_yticklabels()]
    ticks = axes.get_yticks()
    found = {}
    for patch in axes.patches:
        middle = patch.get_y() + patch.get_height() / 2  # type: ignore[attr-defined]
        end = patch.get_x() + patch.get_width()  # type: ignore[attr-defined]
        found[names[int(np.argmin(abs(ticks - middle)))]] = (end, patch.get_hatch() is not None)
    return found


def test_bars_are_ratios_to_ours() -> None:
    figure = drawn(speed_ups(runtime_run()))
    (axes,) = figure.axes  # 2,000 is also the largest number of genes
    ((name, (end, hatched)),) = bars(axes).items()
    assert (name, hatched) == (CAPPED, True)
    assert end == pytest.approx(211 / 2.0976)
    assert {"101 ×", "out of memory"} <= set(texts(figure).split("\n"))


def test_bars_stand_at_two_thousand_genes_and_at_the_largest_number() -> None:
    made = run(
        *(point(m, g, s) for m, s in ((OURS, 2.0), (WHOLE, 1.0)) for g in (503, 2_000, 4_001))
    )
    figure = drawn(speed_ups(made))
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert [label.split(", ")[1] for label in labels] == [
        *("2,000 genes per cell", "4,001 genes per cell"),
    ]
    assert bars(figure.axes[0]) == {WHOLE: (0.5, False)}  # to the left of 1: it is faster


def test_the_roofline_has_ceilings_and_kernels() -> None:
    made = full_run()
    (axes,) = drawn(roofline(made)).axes
    found = lines(axes)
    assert list(found) == [
        *("copying memory: 20 GB/s", "matrix products: 140 GFLOP/s"),
        *("encoder\n31% of the roofline", "decoder\n31% of the roofline"),
    ]
    roof = np.asarray(found["copying memory: 20 GB/s"].get_xydata(), float)
    np.testing.assert_allclose(roof[1], [7.0, 1.4e11])
    np.testing.assert_allclose(roof[0, 1] / roof[0, 0], 2e10)
    points = found["encoder\n31% of the roofline"].get_xydata()
    np.testing.assert_allclose(np.asarray(points, float), [[59, 3e10], [61, 7e10]])
    assert roofline(full_run(ceilings={})) is None
    cached = full_run(ceilings=made.ceilings | {"L2 copy bytes/s": 5e10})
    assert "copying in L2: 50 GB/s" in lines(drawn(roofline(cached)).axes[0])


def test_scaling_starts_at_zero() -> None:
    speed, peak = drawn(scaling(full_run())).axes
    assert (speed.get_ylim()[0], peak.get_ylim()[0]) == (0, 0)
    np.testing.assert_allclose(y_of(speed.get_lines()[0]), [7_000, 7_000])
    np.testing.assert_allclose(y_of(peak.get_lines()[0]), [53e7, 53e7])
    np.testing.assert_allclose(x_of(peak.get_lines()[0]), [10_000, 100_000])


@pytest.mark.parametrize(
    "records",
    [
        [],
        [point(OURS, 503, None)],
        [Record("runtime", "runtime/x", "skipped", "why")],
        [measured("atlas", "7", 1.0, cells=7)],
        [measured("kernels", "a", 1.0, op="a", case="7", method="ours", ours=True)],
        [measured("startup", "a", 1.0, what="a")],
    ],
)
def test_where_nothing_was_measured_there_is_no_figure(records: list[Record]) -> None:
    made: Any = all_charts(run(*records))
    assert made == {}


def test_every_figure_says_device_and_date() -> None:
    made = all_charts(full_run())
    assert list(made) == ["runtime", "memory", "speed-up", "roofline", "scaling"]
    for _, figure in made.values():
        assert "A processor (2 cores) · float32 · 2026-11-23" in texts(figure)


@pytest.mark.parametrize("draw", [runtime, speed_ups])
def test_ticks_have_numbers_also_where_values_are_alike(
    draw: Callable[[Run], Figure | None],
) -> None:
    figure = drawn(draw(run(point(OURS, 503, 2.1), point(WHOLE, 503, 2.2))))
    axis = figure.axes[0].yaxis if draw is runtime else figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    assert [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
