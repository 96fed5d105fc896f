"""Plots, in scanpy's shape: each returns a matplotlib Figure, and saves it where it is told to.

All are legible without colour vision: the colours of up to 8 classes are Okabe and Ito's, with
more of them a number stands in each class, and numbers stand in the cells of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError
from .plots.confusion import draw_confusion
from .plots.figures import finish, new_figure
from .plots.scatter import (
    OTHERS,
    Palette,
    column_of,
    draw_numbers,
    umap_of,
)
from .spatial.pictures import spatial_domains, spatial_paga

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    from .inference.evaluation import Evaluation

__all__ = [
    "confusion_matrix",
    "embedding",
    "spatial_domains",
    "spatial_paga",
    "training_curves",
]


def __dir__() -> list[str]:
    return __all__


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
    from .training import curves

    return curves.training_curves(run, ax=ax, save=save, show=show)


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
    from .inference.evaluation import Evaluation

    if isinstance(evaluation, Evaluation):
        table, others = evaluation.confusion, len(evaluation.other_labels)
        title = evaluation.headline if title is None else title
    else:
        table, others = evaluation, 0
    figure = draw_confusion(table, others=others, normalize=normalize, title=title or "", show=show)
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
    from .io.sources.memory import require_anndata  # brings PyTorch, which other plots do without

    require_anndata(adata, "pl.embedding draws an AnnData object")
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
