"""How a training run went: its losses, and how good the model was, step by step."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, cast

from .figures import GREY, OKABE_ITO, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_curves(
    steps: pd.DataFrame,
    epochs: pd.DataFrame,
    *,
    mark_best: bool,
    ax: Axes | None = None,
    show: bool = False,
) -> Figure:
    """Draw the losses of a run and, beside them, its validation metrics.

    Parameters
    ----------
    steps
        Columns step and loss.
    epochs
        Columns epoch, step, training_loss and, where there is validation, validation_*.
    mark_best
        Whether a dotted line marks the best epoch.
    ax
        Draw the losses here, and nothing else.
    show
        Whether the figure will be shown.
    """
    metrics = [name for name in epochs if name.startswith("validation_")]
    metrics = [name for name in metrics if name != "validation_loss"]
    if ax is not None:
        _draw_losses(ax, steps, epochs, mark_best)
        return cast("Figure", ax.get_figure(root=True))  # axes have one
    panels = 2 if metrics else 1
    figure = new_figure(5 * panels + 0.5, 3.6, show)
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    _draw_losses(left, steps, epochs, mark_best)
    for axes in right:
        for name, color, marker in zip(
            metrics, cycle(OKABE_ITO[2::3]), cycle("s^vP"), strict=False
        ):
            label = name.removeprefix("validation_").replace("_", " ").replace(" f1", " F1")
            axes.plot(epochs["step"], epochs[name], color=color, marker=marker, label=label)
        if mark_best:
            _mark_best(axes, epochs)
        _label_curves(axes, "on validation cells")
    return figure


def _draw_losses(axes: Axes, steps: pd.DataFrame, epochs: pd.DataFrame, mark_best: bool) -> None:
    """Every step, smoothed over a fiftieth of the run, and the mean of every epoch."""
    smooth = steps["loss"].rolling(max(1, len(steps) // 50), center=True, min_periods=1).mean()
    axes.plot(steps["step"], steps["loss"], color=GREY, linewidth=0.5, label="step")
    axes.plot(steps["step"], smooth, color="#555555", linewidth=1, label="steps, smoothed")
    for name, color, marker in (
        ("training_loss", OKABE_ITO[0], "o"),
        ("validation_loss", OKABE_ITO[3], "D"),
    ):
        if name in epochs:
            label = name.removesuffix("_loss") + " cells, by epoch"
            axes.plot(epochs["step"], epochs[name], color=color, marker=marker, label=label)
    if mark_best:
        _mark_best(axes, epochs)
    _label_curves(axes, "loss")


def _mark_best(axes: Axes, epochs: pd.DataFrame) -> None:
    if "validation_loss" in epochs:
        score = -epochs["validation_loss"]
        if {"validation_accuracy", "validation_macro_f1"} <= set(epochs):
            score = epochs["validation_accuracy"] + epochs["validation_macro_f1"]
        best = epochs.loc[score.idxmax()]
        label = f"best epoch: {best['epoch']:.0f}"
        axes.axvline(best["step"], color="black", linestyle=":", linewidth=1, label=label)


def _label_curves(axes: Axes, y_label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    for line in axes.lines:
        line.set_markersize(3.5)
    axes.legend(frameon=False, fontsize=8)
