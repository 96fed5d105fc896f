"""Figures of a run, each labelled with device and date; None where nothing was measured.

Made for the width of a README page: 9 inches, 9-point text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cellpatch_fast.plots.figures import new_figure

from .curves import (
    BLUE,
    FAINT,
    FONT,
    PEER_COLORS,
    PEER_MARKERS,
    VERMILLION,
    WIDTH,
    add_note,
    add_title,
    draw_curves,
    log_ticks,
    plain_frame,
)
from .findings import curve, digits, ignored, peers, ratio_genes, size, speed_up, times
from .results import Record, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_BYTES = 1_000  # what is less is drawn there: a logarithmic axis has no zero


def all_charts(run: Run) -> dict[str, tuple[str, Figure]]:
    """Caption and figure by a name for files; only those that there is something to draw of."""
    charts = {
        "runtime": ("Annotation: seconds per 1,000 cells against genes per cell", runtime(run)),
        "memory": ("Annotation: peak memory of a batch against genes per cell", memory(run)),
        "speed-up": ("Speed-up of ours over each peer", speed_ups(run)),
        "roofline": ("Our kernels below the ceilings of the device", roofline(run)),
        "scaling": ("From file to embedding store: speed and memory against cells", scaling(run)),
    }
    return {name: (text, figure) for name, (text, figure) in charts.items() if figure is not None}


def runtime(run: Run) -> Figure | None:
    """Seconds per 1,000 cells against genes per cell, of every model."""
    return draw_curves(
        run,
        "Annotation runtime against genes per cell",
        "seconds per 1,000 cells",
        lambda record: record.seconds.median if record.seconds else None,
        lambda value: f"{value:,g}",
    )


def memory(run: Run) -> Figure | None:
    """Peak memory of a batch per cell, against genes per cell."""

    def of(record: Record) -> float | None:
        peak = record.details.get("peak_bytes_per_cell")
        return None if peak is None else max(LEAST_BYTES, peak)

    label = f"peak memory of a batch, per cell\n(drawn from {size(LEAST_BYTES)} up)"
    return draw_curves(run, "Annotation memory against genes per cell", label, of, size)


def speed_ups(run: Run) -> Figure | None:
    """Bars: how many times as long as ours every peer takes."""
    numbers = ratio_genes(run)
    if not numbers or not peers(run):
        return None
    names = sorted(
        peers(run),
        key=lambda name: [speed_up(run, name, genes) or 0 for genes in numbers],
    )  # the largest ends on top
    ratios = [speed_up(run, name, genes) for genes in numbers for name in names]
    measured = [ratio for ratio in ratios if ratio is not None]
    if not measured:
        return None
    figure = new_figure(WIDTH, 1.5 + 0.28 * len(names))
    panels = figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0]
    for axes, genes in zip(panels, numbers, strict=True):
        _bars(run, axes, names, genes)
        low, high = min(1.0, *measured) / 1.1, max(measured) * 6  # room for numbers beside the bars
        axes.set_xlim(low, high)
        log_ticks(axes.xaxis, low, high, "{:,g}".format)
        axes.set_xlabel(f"times as long as ours, {genes:,} genes per cell", fontsize=FONT)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(-0.6, len(names) - 0.4)
    add_title(figure, run, "Speed-up of ours over each peer")
    drawn = [curve(run, name).get(genes) for name in names for genes in numbers]
    if any(record.measured and ignored(run, record) for record in drawn if record):
        add_note(figure, "Hatched: the peer does less, it ignores genes beyond its cap.")
    return figure


def _bars(run: Run, axes: Axes, names: list[str], genes: int) -> None:
    axes.set_xscale("log")
    plain_frame(axes, "x")
    axes.axvline(1, color="black", linewidth=0.8)
    for row, name in enumerate(names):
        record, ratio = curve(run, name).get(genes), speed_up(run, name, genes)
        beside: dict[str, Any] = {
            "xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": FONT,
        }  # fmt: skip
        if ratio is None:
            status = record.status if record and not record.measured else "not measured"
            axes.annotate(status, (1, row), color=FAINT, fontstyle="italic", **beside)
            continue
        color = BLUE if ratio >= 1 else VERMILLION
        capped = record is not None and ignored(run, record) > 0
        look: dict[str, Any] = (
            {"facecolor": "white", "hatch": "////"} if capped else {"facecolor": color}
        )
        axes.barh(row, ratio - 1, left=1, height=0.72, edgecolor=color, linewidth=1, **look)
        axes.annotate(times(ratio), (max(1, ratio), row), **beside)


def roofline(run: Run) -> Figure | None:
    """Our kernels' FLOP/s against FLOP per byte, below what the device can do."""
    bandwidth, peak = (run.ceilings.get(name) for name in ("copy bytes/s", "matrix FLOP/s"))
    points = [
        record
        for record in run.of("kernels", measured=True)
        if record.details.get("ours")
        and record.details.get("flops")
        and record.details.get("intensity")
    ]
    if not (points and bandwidth and peak):
        return None
    figure = new_figure(WIDTH, 4.6)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    intensities = [record.details["intensity"] for record in points]
    left = min(*intensities, peak / bandwidth) / 4
    right = max(*intensities, peak / bandwidth) * 4
    roofs = {"copying memory": bandwidth, "copying in L2": run.ceilings.get("L2 copy bytes/s")}
    for (name, rate), dash in zip(roofs.items(), ("-", "--"), strict=True):
        if rate:
            ridge = peak / rate
            line = [(left, rate * left), (ridge, peak), (right, peak)]
            label = f"{name}: {size(rate)}/s"
            axes.plot(*zip(*line, strict=True), color="black", linewidth=1.5, ls=dash, label=label)
    axes.plot([], [], " ", label=f"matrix products: {_flops(peak)}")
    ops = list(dict.fromkeys(record.details["op"] for record in points))
    for i, op in enumerate(ops):
        of_op = [record for record in points if record.details["op"] == op]
        axes.plot(
            [record.details["intensity"] for record in of_op],
            [record.details["flops"] for record in of_op],
            linestyle="",
            marker=PEER_MARKERS[i % len(PEER_MARKERS)],
            markersize=8,
            color=PEER_COLORS[i % len(PEER_COLORS)],
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=op + _shares(of_op),
        )
    axes.set_xlabel("FLOP per byte of memory", fontsize=FONT)
    axes.set_ylabel("useful FLOP/s", fontsize=FONT)
    axes.set_xlim(left, right)
    axes.set_ylim(min(record.details["flops"] for record in points) / 4, peak * 2)
    log_ticks(axes.xaxis, left, right, "{:,g}".format)
    log_ticks(axes.yaxis, *axes.get_ylim(), _flops)
    plain_frame(axes, "both")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=FONT)
    add_title(figure, run, "Our kernels below the ceilings of the device")
    return figure


def _shares(records: list[Record]) -> str:
    """The range of a kernel's cases."""
    shares = [record.details.get("roofline_share") for record in records]
    measured = sorted(share for share in shares if share is not None)
    if not measured:
        return ""
    low, high = f"{measured[0]:.0%}", f"{measured[-1]:.0%}"
    return f"\n{low if low == high else f'{low} to {high}'} of the roofline"


def _flops(rate: float) -> str:
    """FLOP/s in units of 1,000."""
    for unit in ("", "k", "M", "G", "T"):
        if rate < 999.5:
            return f"{rate:.3g} {unit}FLOP/s"
        rate /= 1_000
    return f"{rate:.3g} PFLOP/s"


def scaling(run: Run) -> Figure | None:
    """Cells/s and peak memory of embedding files of more and more cells."""
    records = [r for r in run.of("atlas", measured=True) if r.details.get("cells_per_second")]
    if not records:
        return None
    panels = {"cells/s": "cells_per_second", "peak memory": "peak_rss_bytes"}
    drawn = {
        label: key for label, key in panels.items() if any(r.details.get(key) for r in records)
    }
    figure = new_figure(WIDTH, 3.6)
    all_axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    series: dict[Any, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.details["cells"]):
        series.setdefault(record.details.get("genes_per_cell"), []).append(record)
    for axes, (label, key) in zip(all_axes, drawn.items(), strict=True):
        _scaled(axes, series, key)
        axes.set_xlabel("cells", fontsize=FONT)
        axes.set_ylabel(label, fontsize=FONT)
    if len(series) > 1:
        all_axes[0].legend(frameon=False, fontsize=FONT)
    add_title(figure, run, "From file to embedding store, against cells")
    return figure


def _scaled(axes: Axes, series: dict[Any, list[Record]], key: str) -> None:
    """One panel, from zero: what is flat looks flat."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for i, (genes, records) in enumerate(series.items()):
        points = [(r.details["cells"], r.details[key]) for r in records if r.details.get(key)]
        if points:
            color = PEER_COLORS[i % len(PEER_COLORS)]
            label = f"{genes:,.0f} genes per cell" if genes else "all"
            marker = PEER_MARKERS[i % len(PEER_MARKERS)]
            axes.plot(*zip(*points, strict=True), marker=marker, color=color, lw=2, label=label)
    write = size if key.endswith("bytes") else digits
    cells = sorted({record.details["cells"] for records in series.values() for record in records})
    axes.set_xscale("log")
    axes.set_xlim(cells[0] / 2, cells[-1] * 2)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(cells))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value) if value else "0"))
    plain_frame(axes, "y")
