"""Plots, in scanpy's shape: each returns a matplotlib Figure, and saves it where it is told to.

All are legible without colour vision: the colours of up to 8 classes are Okabe and Ito's, with
more of them a number stands in each class, and numbers stand in the cells of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from .errors import InputError
from .figures import GREY, OKABE_ITO, finish, new_figure
from .scatter import OTHERS, Palette, column_of, draw_numbers, umap_of

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    from .training.evaluation import Evaluation

POINTS = 72  # per inch
FONT = 9.0  # points
MOST_OTHERS = 40  # labels that are not among a model's classes with a row of their own


def training_curves(
    run: str | Path,
    *,
    ax: Axes | None = None,
    save: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """Draw how a training run went: losses, and how good the model was on validation cells.

    Also of a run that is still going on. A dotted line marks the best epoch, the one with the
    lowest validation loss, or of fine-tuning the most accurate one; unless the run keeps the last
    epoch's model, whatever the best one.

    Parameters
    ----------
    run
        The run's folder, with ``steps.csv`` and ``epochs.csv``.
    ax
        Draw the losses here, and nothing else; None for a figure of their own.
    save
        A path that ends in .png or .svg, or one without a suffix, for both.
    show
        Open it in a window, or in the notebook.

    Raises
    ------
    InputError
        If there is no such run, or it has not made a step yet.
    """
    steps = _read_table(Path(run) / "steps.csv", ["step", "loss"])
    epochs = _read_table(Path(run) / "epochs.csv", ["epoch", "step", "training_loss"])
    epochs = epochs.dropna(axis="columns", how="all")  # no validation: no numbers
    if steps.empty:
        raise InputError(f"{run} has no step to draw yet: wait until steps.csv has a row")
    metrics = [name for name in epochs if name.startswith("validation_")]
    metrics = [name for name in metrics if name != "validation_loss"]
    marked = _keeps_best(Path(run))
    if ax is not None:
        _draw_losses(ax, steps, epochs, marked)
        figure = cast("Figure", ax.get_figure(root=True))  # axes have one
        return finish(figure, save, show)
    panels = 2 if metrics else 1
    figure = new_figure(5 * panels + 0.5, 3.6, show)
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    _draw_losses(left, steps, epochs, marked)
    for axes in right:
        for name, color, marker in zip(
            metrics, cycle(OKABE_ITO[2::3]), cycle("s^vP"), strict=False
        ):
            label = name.removeprefix("validation_").replace("_", " ").replace(" f1", " F1")
            axes.plot(epochs["step"], epochs[name], color=color, marker=marker, label=label)
        if marked:
            _mark_best(axes, epochs)
        _label_curves(axes, "on validation cells")
    return finish(figure, save, show)


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
    common ones. A class with no true cells has a grey row. True labels that are not among the
    model's classes stand below a line; beyond the 40 most frequent they share a row. The figure
    grows with the classes.

    Parameters
    ----------
    evaluation
        What `evaluate` returned, or any table of counts, truth x predicted.
    normalize
        Write percentages of the true class's cells into the matrix; False for counts. What rounds
        to 0 is left blank, and so are numbers that do not fit.
    title
        Above the figure; None for accuracy and macro F1 of an `Evaluation`, and which share of the
        cells they are of.
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

    line = None
    if isinstance(evaluation, Evaluation):
        table = _with_further_labels(evaluation)
        if evaluation.other_labels:
            line = len(evaluation.classes) - 0.5
        title = _title(evaluation) if title is None else title
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
    if line is not None:
        axes.axhline(line, color="black", linewidth=1)
    _write_numbers(axes, counts, shares, normalize, size * POINTS)
    height = min(1, 3 / (rows * size))  # of the colour bar: 3 inches, or the matrix's
    place = axes.inset_axes(
        (1 + 0.1 / (columns * size), 1 - height, 0.12 / (columns * size), height)
    )
    figure.colorbar(image, cax=place, ticks=(0, 0.5, 1)).set_label("share of the true class")
    figure.suptitle(title or "", fontsize=11)
    return finish(figure, save, show)


def embedding(
    adata: AnnData,
    *,
    color: str | Sequence[str],
    highlight: ArrayLike | None = None,
    key: str = "X_cellpatch",
    seed: int = 0,
    save: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """Draw the cells in two dimensions (UMAP), coloured by columns of ``obs``, a panel each.

    A class has the same colour in every panel: of truth and prediction, say. Rare classes are
    drawn over common ones, "unknown" and missing labels are grey. Among more than 8 classes
    colours alone do not tell, so numbers do. Numeric columns have a scale of colours.

    Parameters
    ----------
    adata
        With ``obsm[key]``, from `cellpatch_fast.tl.embed`. It is not changed. ``obsm["X_umap"]``
        is taken if it comes from the same embedding (``scanpy.pp.neighbors(use_rep=key)``), and
        computed from 15 neighbours of each cell otherwise.
    color
        One column of ``adata.obs``, or several.
    highlight
        bool [cells]: which cells to colour, of test cells among all others, say. The others are
        grey, below them. None for all.
    key
        The embedding.
    seed
        Of UMAP.
    save
        A path that ends in .png or .svg, or one without a suffix, for both.
    show
        Open it in a window, or in the notebook.

    Raises
    ------
    InputError
        If the embedding or a column is missing, there are too few cells, the embedding holds
        numbers that are not finite, or ``highlight`` is not of these cells.
    """
    names = [color] if isinstance(color, str) else list(dict.fromkeys(color))
    if not names:
        raise InputError("color is empty: name a column of adata.obs")
    if missing := [name for name in names if name not in adata.obs]:
        raise InputError(
            f"color: adata.obs lacks {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, adata.obs)) or 'no column'}"
        )
    points = umap_of(adata, key, seed)  # [c, 2]
    columns = {name: column_of(adata.obs[name]) for name in names}
    if highlight is not None:
        shown = _mask(highlight, adata.n_obs)
        columns = {
            name: column.where(shown, OTHERS if column.dtype == object else np.nan)
            for name, column in columns.items()
        }
    palette = Palette([column for column in columns.values() if column.dtype == object])
    across = min(len(names), 3)
    down = -(-len(names) // across)
    side = 4.0 if len(palette) <= 20 else 6.0  # inches
    legend_columns = -(-len(palette) // int(4.5 * side * down))
    figure = new_figure(side * across + palette.width * legend_columns, side * down, show)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (name, column) in zip(panels, columns.items(), strict=False):
        axes.set_title(name, fontsize=11)
        if column.dtype == object:
            palette.draw(axes, points, column)
        else:
            draw_numbers(axes, points, column)
    for axes in panels:
        axes.set_axis_off()
    if len(palette):
        palette.add_legend(figure, legend_columns)
    return finish(figure, save, show)


def _mask(highlight: ArrayLike, cells: int) -> np.ndarray:
    mask = np.asarray(highlight)
    if mask.dtype != bool or mask.shape != (cells,):
        raise InputError(f"highlight is {mask.dtype} {list(mask.shape)}, expected bool [{cells}]")
    return mask


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """The complete rows of a run's table."""
    import pandas as pd

    try:
        table = pd.read_csv(path)
        numbers = table.astype(float)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no table of a training run: {error}") from error
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"{path} is no table of a training run: it lacks {', '.join(missing)}")
    return numbers.dropna(subset=columns)


def _keeps_best(run: Path) -> bool:
    """Whether the run keeps its best epoch's model; one that does not say so does."""
    from .training.folder import read_settings

    try:
        return bool(read_settings(run)["settings"].get("keep_best", True))
    except InputError:
        return True


def _draw_losses(axes: Axes, steps: pd.DataFrame, epochs: pd.DataFrame, marked: bool) -> None:
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
    if marked:
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


def _title(evaluation: Evaluation) -> str:
    if not evaluation.other_labels:
        return evaluation.scores
    return (
        f"{evaluation.scores}\noverall accuracy {evaluation.overall_accuracy:.3f}; below the line: "
        "labels that are not among the model's classes"
    )


def _with_further_labels(evaluation: Evaluation) -> pd.DataFrame:
    """The table truth x predicted, with one row for all of the rarest labels of a great many."""
    table, last = evaluation.confusion, len(evaluation.classes) + MOST_OTHERS
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
