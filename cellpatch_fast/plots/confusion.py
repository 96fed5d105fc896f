"""The table truth x predicted as a picture: which classes are taken for which."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .figures import FORMATS, new_figure, save_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

POINTS = 72  # per inch
FONT = 9.0  # points
MOST_OTHERS = 40  # labels that are not among a model's classes with a row of their own


def draw_confusion(
    table: pd.DataFrame,
    *,
    others: int = 0,
    normalize: bool = True,
    title: str = "",
    show: bool = False,
) -> Figure:
    """Draw a table of counts; colours are shares of the cells of a true class.

    Parameters
    ----------
    table
        Counts of cells, truth x predicted. A row of no cells is grey.
    others
        So many of the last rows are labels that are not among the model's classes: they stand
        below a line, and beyond the first 40 of them they share a row.
    normalize
        Write percentages of the true class's cells into the matrix; False for counts.
    title
        Above the figure.
    show
        Whether the figure will be shown.

    Raises
    ------
    InputError
        If the table is empty or does not hold counts.
    """
    line = len(table) - others - 0.5 if others else None
    table = _with_further_labels(table, others)
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
    if line is not None:
        axes.axhline(line, color="black", linewidth=1)
    _write_numbers(axes, counts, shares, normalize, size * POINTS)
    height = min(1, 3 / (rows * size))  # of the colour bar: 3 inches, or the matrix's
    place = axes.inset_axes(
        (1 + 0.1 / (columns * size), 1 - height, 0.12 / (columns * size), height)
    )
    figure.colorbar(image, cax=place, ticks=(0, 0.5, 1)).set_label("share of the true class")
    figure.suptitle(title, fontsize=11)
    return figure


def save_confusion(table: pd.DataFrame, path: Path, *, others: int, title: str) -> None:
    """Write ``path.png`` and ``path.svg``, or remove them where there is no cell to draw.

    An earlier table's figure would be taken for this one's.
    """
    for format_ in FORMATS:
        path.with_suffix(f".{format_}").unlink(missing_ok=True)
    if table.to_numpy().sum():
        save_figure(draw_confusion(table, others=others, title=title), path)


def _with_further_labels(table: pd.DataFrame, others: int) -> pd.DataFrame:
    """The table with one row for all of the rarest labels of a great many."""
    last = len(table) - others + MOST_OTHERS
    if len(table) <= last + 1:
        return table
    shown = table.iloc[:last].copy()
    shown.loc[f"{len(table) - last:,} further labels"] = table.iloc[last:].sum()
    return shown


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
