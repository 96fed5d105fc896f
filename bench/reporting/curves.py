"""One line per model against genes per cell, both axes logarithmic, labelled where lines end.

A model that ignores genes beyond its cap has hollow markers and a dotted line there. What has no
result stands in a strip above, at its number of genes, so that a line that ends says why. Models
differ by colour, marker and dash; ours is the thick line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

from cellpatch_fast.plots.figures import OKABE_ITO, new_figure

from .findings import compared, curve, genes_tried, ignored
from .results import Record, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches
FONT = 9.0  # points
INK, FAINT = "#222222", "#666666"
BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, BLACK, _ = OKABE_ITO
PEER_COLORS = (BLUE, GREEN, PURPLE, SKY, ORANGE, BLACK)
PEER_MARKERS = "s^Dv<>Pph*dH"
DASHES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (6, 1.5, 1, 1.5)))
DOTTED = (0, (1, 1.5))
# What has no result, by status: signs that no line has.
SIGNS = {"out of memory": "X", "out of time": "$◷$", "failed": "$!$", "inaccurate": "$≠$"}
SUBTITLE = 110  # letters of a line
LABEL_GAP = 0.043  # of the height of the axes, between labels


@dataclass(frozen=True)
class Style:
    color: str
    marker: str
    dash: Any
    width: float = 1.3
    size: float = 5.5
    above: float = 2.0  # others, in the order of drawing


def styles(run: Run) -> dict[str, Style]:
    """The same for a model in all figures of a run."""
    our_models = [name for name, model in run.models.items() if model["ours"]]
    others = [name for name in run.models if name not in our_models]
    chosen = {
        name: Style(VERMILLION, "o", DASHES[i % len(DASHES)], width=3.2, size=7.5, above=4.0)
        for i, name in enumerate(our_models)
    }
    for i, name in enumerate(others):
        color = PEER_COLORS[i % len(PEER_COLORS)]
        marker = PEER_MARKERS[i % len(PEER_MARKERS)]
        chosen[name] = Style(color, marker, DASHES[i // len(PEER_COLORS) % len(DASHES)])
    return chosen


def draw_curves(
    run: Run,
    title: str,
    label: str,
    value_of: Callable[[Record], float | None],
    written: Callable[[float], str],
) -> Figure | None:
    """The figure; None where no model has a value.

    Parameters
    ----------
    title, label
        Of the figure, and of the vertical axis.
    value_of
        What is drawn of a measured record; None: nothing.
    written
        How the vertical axis writes a number.
    """
    values = {
        name: {
            g: value for g, r in curve(run, name).items() if r.measured and (value := value_of(r))
        }
        for name in compared(run)
    }
    if not any(values.values()):
        return None
    lost = _without_result(run)
    figure = new_figure(WIDTH, 5.2 + (0.45 + 0.17 * len(lost) if lost else 0))
    heights = [0.3 + 0.17 * len(lost), 4.8] if lost else [4.8]
    *strips, axes = figure.subplots(
        len(heights), 1, sharex=True, height_ratios=heights, squeeze=False
    )[:, 0]
    genes = genes_tried(run)
    _prepare(axes, genes, [v for of_model in values.values() for v in of_model.values()], written)
    axes.set_xlabel("genes per cell", fontsize=FONT)
    axes.set_ylabel(label, fontsize=FONT)
    of_model = styles(run)
    for name, points in values.items():
        _draw_line(run, axes, name, [points.get(g, math.nan) for g in genes], of_model[name])
    _label_lines(run, axes, values, of_model)
    for strip in strips:
        _draw_strip(strip, lost, of_model)
    add_title(figure, run, title)
    if any(ignored(run, r) for name in values for r in curve(run, name).values() if r.measured):
        add_note(
            figure, "Hollow, dotted: the model ignores genes beyond the number beside its name."
        )
    return figure


def add_title(figure: Figure, run: Run, title: str) -> None:
    """What is shown, and below it, smaller, on which device and day."""
    from matplotlib.text import Annotation

    facts = (run.device["name"], run.settings.get("dtype"), run.date[:10])
    line = fill(" · ".join(str(part) for part in facts if part), SUBTITLE)
    room = "\n" * (line.count("\n") + 1)
    above = figure.suptitle(title + room, x=0.01, ha="left", fontsize=12, fontweight="bold")
    below = Annotation(
        line, (0, 0.1), xycoords=above, ha="left", va="bottom", fontsize=FONT, color=FAINT
    )
    below.set_in_layout(False)
    figure.add_artist(below)


def log_ticks(axis: Axis, low: float, high: float, written: Callable[[float], str]) -> None:
    """Powers of ten of a logarithmic axis, and 2 and 5 times them where those are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    steps = (1.0,) if high / low > 50 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.set_minor_locator(NullLocator())


def add_note(figure: Figure, note: str) -> None:
    """Below the figure."""
    figure.supxlabel(note, x=0.01, ha="left", fontsize=FONT - 0.5, color=FAINT)


def plain_frame(axes: Axes, grid: str) -> None:
    """Two sides and faint lines of one direction are enough."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#E4E4E4", linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=FONT)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least ``gap`` apart within [low, high], each near where it is wanted.

    Neighbours that are too close form a group about the mean of their wishes.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []

    def bottom(group: list[int]) -> float:
        extent = gap * (len(group) - 1)
        middle = sum(wanted[i] for i in group) / len(group)
        return max(low, min(middle - extent / 2, high - extent))

    for i in order:
        groups.append([i])
        while len(groups) > 1 and bottom(groups[-2]) + gap * len(groups[-2]) > bottom(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    places = [0.0] * len(wanted)
    for group in groups:
        for rank, i in enumerate(group):
            places[i] = bottom(group) + gap * rank
    return places


def _without_result(run: Run) -> dict[str, dict[int, str]]:
    """Status by genes per cell, of the models that have any without a result."""
    lost = {
        name: {g: r.status for g, r in curve(run, name).items() if r.status in SIGNS}
        for name in compared(run)
    }
    return {name: statuses for name, statuses in lost.items() if statuses}


def _prepare(
    axes: Axes, genes: list[int], values: list[float], written: Callable[[float], str]
) -> None:
    """Logarithmic axes with room at the ends; ticks at numbers of genes that were tried."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set(xscale="log", yscale="log")
    axes.set_xlim(genes[0] / 1.2, genes[-1] * 1.2)
    axes.set_ylim(min(values) / 1.7, max(values) * 1.7)
    room = math.log(genes[-1] / genes[0]) / 10
    ticks = genes[:1]
    for number in genes[1:]:
        if math.log(number / ticks[-1]) >= room:
            ticks.append(number)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    log_ticks(axes.yaxis, *axes.get_ylim(), written)
    plain_frame(axes, "both")


def _draw_line(run: Run, axes: Axes, name: str, values: list[float], style: Style) -> None:
    """Solid and filled as far as the model sees all genes, dotted and hollow beyond."""
    genes, points = genes_tried(run), curve(run, name)
    capped = [g in points and ignored(run, points[g]) > 0 for g in genes]
    full = [math.nan if out else value for value, out in zip(values, capped, strict=True)]
    look: dict[str, Any] = {
        "color": style.color,
        "marker": style.marker,
        "markersize": style.size,
        "zorder": style.above,
    }
    axes.plot(genes, full, linestyle=style.dash, linewidth=style.width, label=name, **look)
    if any(capped):
        first = capped.index(True)
        join = max(0, first - 1)  # the line goes on from the last point that sees all
        hollow = list(range(first - join, len(genes) - join))
        axes.plot(
            genes[join:],
            values[join:],
            linestyle=DOTTED,
            linewidth=style.width,
            markerfacecolor="white",
            markevery=hollow,
            label=f"_{name}, capped",
            **look,
        )


def _label_lines(
    run: Run, axes: Axes, values: dict[str, dict[int, float]], of_model: dict[str, Style]
) -> None:
    """Names beside the right ends of lines, with a sample of the line, none upon another."""
    ends = {name: list(points.items())[-1] for name, points in values.items() if points}
    low, high = (math.log(limit) for limit in axes.get_ylim())
    wanted = [(math.log(value) - low) / (high - low) for _, value in ends.values()]
    places = spread(wanted, LABEL_GAP, 0.0, max(1.0, LABEL_GAP * (len(ends) - 1)))
    last = genes_tried(run)[-1]
    for (name, (genes, value)), place in zip(ends.items(), places, strict=True):
        style = of_model[name]
        if genes == last:
            axes.annotate(
                "",
                (genes, value),
                (1.02, place),
                textcoords="axes fraction",
                arrowprops={
                    "arrowstyle": "-",
                    "color": style.color,
                    "linewidth": 0.6,
                    "shrinkA": 0,
                    "shrinkB": 4,
                },
            )
        axes.plot(
            [1.02, 1.045, 1.07],
            [place] * 3,
            transform=axes.transAxes,
            clip_on=False,
            color=style.color,
            linestyle=style.dash,
            linewidth=style.width,
            marker=style.marker,
            markersize=style.size - 0.5,
            markevery=[1],
            label=f"_{name}, sample",
        )
        is_ours = run.models[name]["ours"]
        axes.text(
            1.08,
            place,
            _with_cap(run, name),
            transform=axes.transAxes,
            va="center_baseline",
            fontsize=FONT + 1 if is_ours else FONT,
            fontweight="bold" if is_ours else "normal",
            color=style.color if is_ours else INK,
        )


def _with_cap(run: Run, name: str) -> str:
    cap = run.models[name].get("cap")
    capped = any(ignored(run, record) for record in curve(run, name).values())
    return f"{name} (≤ {cap:,} genes)" if cap is not None and capped else name


def _draw_strip(axes: Axes, lost: dict[str, dict[int, str]], of_model: dict[str, Style]) -> None:
    """A row for every model that has no result somewhere, with signs that the legend explains."""
    from matplotlib.lines import Line2D

    for row, (name, statuses) in enumerate(lost.items()):
        color = of_model[name].color
        for status, sign in SIGNS.items():
            genes = [number for number, reached in statuses.items() if reached == status]
            if genes:
                axes.plot(
                    genes, [row] * len(genes), marker=sign, linestyle="", color=color,
                    markersize=7, markeredgewidth=0.4, label=f"{name}: {status}",
                )  # fmt: skip
        axes.text(
            1.08, row, name, transform=axes.get_yaxis_transform(), va="center_baseline",
            fontsize=FONT, color=INK,
        )  # fmt: skip
        axes.plot(
            [1.045], [row], transform=axes.get_yaxis_transform(), clip_on=False, color=color,
            marker=of_model[name].marker, markersize=of_model[name].size - 0.5,
            label=f"_{name}, sample",
        )  # fmt: skip
    axes.set_ylim(len(lost) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_ylabel("no\nresult", rotation=0, ha="right", va="center", fontsize=FONT)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#F5F5F5")
    axes.tick_params(length=0, labelbottom=False)
    reached = {status for statuses in lost.values() for status in statuses.values()}
    handles = [
        Line2D([], [], color=FAINT, marker=sign, linestyle="", markersize=7, label=status)
        for status, sign in SIGNS.items()
        if status in reached
    ]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(1.02, 1), ncols=2,
        frameon=False, fontsize=FONT, handletextpad=0.2, borderaxespad=0.1, columnspacing=1.2,
    )  # fmt: skip
