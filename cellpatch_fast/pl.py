"""Plots, in scanpy's shape: each returns a matplotlib Figure, and saves it where it is told to.

All are legible without colour vision: the colours of up to 8 classes are Okabe and Ito's, with
more of them a number stands in each class, and numbers stand in the cells of a matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError
from .figures import finish, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from .training.evaluation import Evaluation

POINTS = 72  # per inch
FONT = 9.0  # points


def confusion_matrix(
    evaluation: Evaluation | pd.DataFrame,
    *,
    normalize: bool = True,
    title: str | None = None,
    save: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """Draw which classes are taken for which: truth x predicted.

    Colours are shares of the cells of a true class, so that rare classes are seen as well as
    common ones. A class with no true cells has a grey row. The figure grows with the classes.

    Parameters
    ----------
    evaluation
        What `evaluate` returned, or its table ``confusion`` (counts, truth x predicted).
    normalize
        Write percentages of the true class's cells into the matrix; False for counts. What rounds
        to 0 is left blank, and so are numbers that do not fit.
    title
        Above the figure; None for accuracy and macro F1 of an `Evaluation`.
    save
        A path that ends in .png or .svg, or one without a suffix, for both.
    show
        Open it in a window, or in the notebook.

    Raises
    ------
    InputError
        If the table is empty or does not hold counts.
    """
    from .training.evaluation import Evaluation

    if isinstance(evaluation, Evaluation):
        table = evaluation.confusion
        if title is None:
            title = f"accuracy {evaluation.accuracy:.3f}, macro F1 {evaluation.macro_f1:.3f}"
    else:
        table = evaluation
    counts = _checked_counts(table)  # [truth, predicted]
    sums = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, sums, out=np.full(counts.shape, np.nan), where=sums > 0)
    rows, columns = counts.shape
    # A cell of the matrix has room for "100" down to 0.24 inches; beyond 125 classes there is none.
    size = min(max(0.24, min(0.8, 5 / rows)), 30 / rows)
    font = min(FONT, 0.8 * size * POINTS)
    row_names = [f"{name} ({n:,.0f})" for name, n in zip(table.index, sums[:, 0], strict=True)]
    column_names = list(map(str, table.columns))
    figure = new_figure(
        columns * size + _width(row_names, font) + 1.5,
        rows * size + _width(column_names, font) + 1,
        show,
    )
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=_blues(), vmin=0, vmax=1, interpolation="none")
    axes.set_xticks(range(columns), column_names, rotation=90, fontsize=font)
    axes.set_yticks(range(rows), row_names, fontsize=font)
    axes.set_xlabel("predicted (% of the true class)" if normalize else "predicted (cells)")
    axes.set_ylabel("truth (cells)")
    axes.tick_params(length=0)
    axes.spines[:].set_color("#888888")
    _write_numbers(axes, counts, shares, normalize, size * POINTS)
    height = min(1, 3 / (rows * size))  # of the colour bar: 3 inches, or the matrix's
    place = axes.inset_axes(
        (1 + 0.1 / (columns * size), 1 - height, 0.12 / (columns * size), height)
    )
    figure.colorbar(image, cax=place, ticks=(0, 0.5, 1)).set_label("share of the true class")
    figure.suptitle(title or "", fontsize=11)
    return finish(figure, save, show)


def _width(names: list[str], font: float) -> float:
    """About how long the longest name is, in inches."""
    return 0.55 * font / POINTS * max(map(len, names))


def _blues() -> Colormap:
    """Light to dark, from the same hue; grey where there is no number."""
    from matplotlib import colormaps

    return colormaps["Blues"].with_extremes(bad="#E8E8E8")


def _write_numbers(
    axes: Axes, counts: np.ndarray, shares: np.ndarray, normalize: bool, room: float
) -> None:
    """Numbers in the cells of the matrix, where they fit into ``room`` points."""
    for row, column in np.argwhere(counts > 0):
        share = shares[row, column]
        text = f"{100 * share:.0f}" if normalize else f"{counts[row, column]:,.0f}"
        font = min(FONT, 0.9 * room / (0.62 * max(len(text), 2)))  # a digit is 0.62 of it wide
        if font >= 5 and text != "0":
            color = "white" if share > 0.55 else "black"
            number = axes.text(column, row, text, ha="center", va="center", color=color)
            number.set(fontsize=font, in_layout=False)


def _checked_counts(table: pd.DataFrame) -> np.ndarray:
    try:
        counts = table.to_numpy(np.float64)
    except ValueError as error:
        raise InputError(f"a confusion matrix holds counts of cells; {error}") from error
    if not counts.size or not np.isfinite(counts).all() or (counts < 0).any():
        raise InputError(
            f"a confusion matrix holds counts of cells; this table is {counts.shape[0]} x "
            f"{counts.shape[1]} and holds something else"
        )
    return counts
