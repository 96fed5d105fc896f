"""The comparison of annotation as a figure: every split a dot, every median with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.quality_methods import LINEAR
from bench.quality_report import CONFIDENCE, MEASURES
from bench.reporting.curves import BLUE, FONT, VERMILLION, WIDTH, add_note, plain_frame
from cellpatch_fast.plots.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPREAD = 0.22  # of the dots of a method, up and down
RANGE = 0.2  # below the best linear baseline: what is lower is written at the edge


def draw(annotation: Mapping[str, Any]) -> Figure:
    """A column of panels for each data set, a row for each measure, a line for each method."""
    summaries = annotation["summaries"]
    methods = list(dict.fromkeys(m for summary in summaries.values() for m in summary["methods"]))
    figure = new_figure(WIDTH, 1.3 + 2 * (0.3 + 0.27 * len(methods)))
    panels = figure.subplots(len(MEASURES), len(summaries), sharey=True, squeeze=False)
    for row, measure in zip(panels, MEASURES, strict=True):
        for axes, (name, summary) in zip(row, summaries.items(), strict=True):
            _panel(axes, methods, measure, summary, annotation["scores"][name])
            axes.set_xlabel(measure, fontsize=FONT)
    for axes, name in zip(panels[0], summaries, strict=True):
        axes.set_title(name, fontsize=FONT + 1)
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    figure.suptitle(
        "Annotation of cells that took no part in training",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    add_note(
        figure,
        f"Dots: splits. Bars: median and its {CONFIDENCE:.0%} bootstrap interval. "
        "Dashed: the best linear baseline; arrows: medians far below it.",
    )
    return figure


def _panel(
    axes: Axes,
    methods: list[str],
    measure: str,
    summary: Mapping[str, Any],
    scores: Mapping[str, Mapping[int, Any]],
) -> None:
    best = summary["methods"][summary["best linear"][measure]][measure]["median"]
    lowest = best - RANGE
    axes.axvline(best, color="black", linewidth=0.8, linestyle="--")
    for row, method in enumerate(methods):
        if method not in scores:
            continue
        color = BLUE if method in LINEAR else VERMILLION
        estimated = summary["methods"][method][measure]
        if estimated["median"] < lowest:
            text = f"← {estimated['median']:.2f}"
            place: dict[str, Any] = {
                "transform": axes.get_yaxis_transform(),
                "va": "center_baseline",
            }
            axes.text(0.01, row, text, color=color, fontsize=FONT, **place)
            continue
        values = np.array([score[measure] for score in scores[method].values()])
        heights = row + np.linspace(-SPREAD, SPREAD, len(values)) * (len(values) > 1)
        seen = values >= lowest
        look: dict[str, Any] = {"markersize": 3.5, "alpha": 0.4, "markeredgewidth": 0}
        axes.plot(values[seen], heights[seen], "o", color=color, **look)
        if estimated["low"] is not None:
            interval = [max(estimated["low"], lowest), estimated["high"]]
            axes.plot(interval, [row, row], color=color, linewidth=2.2)
        axes.plot(estimated["median"], row, "|", color=color, markersize=12, markeredgewidth=2.2)
    plain_frame(axes, "x")
