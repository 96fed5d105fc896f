"""Cells as points: where they lie (UMAP), and one colour per class in every panel of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .figures import GREY, OKABE_ITO

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OTHERS = "other cells"  # than those that a figure is about
NO_CLASS = ("unknown", "missing", OTHERS)  # grey
NEIGHBOURS = 15
FEWEST = 4  # cells that UMAP can lay out


def umap_of(adata: AnnData, key: str, seed: int) -> np.ndarray:
    """Positions [c, 2] of the cells by their embedding ``obsm[key]``; ``adata`` is not changed."""
    scanpy = import_scanpy()
    from anndata import AnnData

    if key not in adata.obsm:
        present = ", ".join(adata.obsm) or "nothing"
        raise InputError(f"adata.obsm lacks {key!r}, it has {present}: run cellpatch_fast.tl.embed")
    origin = adata.uns.get("neighbors", {}).get("params", {}).get("use_rep")
    if "X_umap" in adata.obsm and origin == key:
        return np.asarray(adata.obsm["X_umap"])
    rows = np.asarray(adata.obsm[key])
    if len(rows) < FEWEST:
        raise InputError(f"there are {len(rows)} cells: UMAP needs at least {FEWEST}")
    if not np.isfinite(rows).all():
        raise InputError(f"adata.obsm[{key!r}] holds NaN or infinite numbers: embed it again")
    cells = AnnData(obsm={key: rows})
    neighbours = min(NEIGHBOURS, len(rows) - 1)
    scanpy.pp.neighbors(cells, n_neighbors=neighbours, use_rep=key, random_state=seed)
    scanpy.tl.umap(cells, random_state=seed)
    return np.asarray(cells.obsm["X_umap"])


def column_of(column: pd.Series[Any]) -> pd.Series[Any]:
    """A column of obs as float64, or as labels (object, str) in which none is missing."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    if is_numeric_dtype(column) and not is_bool_dtype(column):
        return column.astype(np.float64)
    return labels_of(column)


def labels_of(column: pd.Series[Any]) -> pd.Series[Any]:
    """A column of obs as labels (object, str), also of numbers; none is missing."""
    labels = column.astype(object)
    return labels.where(labels.notna(), "missing").astype(str).astype(object)


class Palette:
    """Colours of all classes that the panels of a figure show; ``len()`` counts legend entries.

    Parameters
    ----------
    columns
        Labels of the cells, one Series [c] per panel.
    """

    def __init__(self, columns: Sequence[pd.Series[Any]]) -> None:
        labels = sorted({label for column in columns for label in column.unique()})
        self.classes = [name for name in labels if name not in NO_CLASS]
        self.colors = dict(zip(self.classes, _colors(len(self.classes)), strict=True))
        self.colors |= {name: GREY for name in NO_CLASS if name in labels}
        numbered = len(self.classes) > len(OKABE_ITO)
        self.numbers = {name: i for i, name in enumerate(self.classes, 1)} if numbered else {}

    def __len__(self) -> int:
        return len(self.colors)

    @property
    def width(self) -> float:
        """Of a column of the legend, in inches."""
        return 0.5 + 0.07 * max(map(len, self.colors), default=0)

    def draw(self, axes: Axes, points: np.ndarray, labels: pd.Series[Any]) -> None:
        """Cells as points, the rare classes on top, and numbers in the classes."""
        common = labels.map(labels.value_counts()).to_numpy()
        common[labels.isin(NO_CLASS)] = len(labels) + 1  # at the bottom
        order = np.argsort(-common, kind="stable")
        colors = labels.map(self.colors).to_numpy()
        _scatter(axes, points[order], color=colors[order])
        for name, number in self.numbers.items():
            members = points[(labels == name).to_numpy()]
            if len(members):  # beside a cell of the class, which a median of two islands is not
                middle = members[np.abs(members - np.median(members, axis=0)).sum(axis=1).argmin()]
                paper = {"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.75, "lw": 0}
                at, above = (middle[0], middle[1]), (0, 7)  # so that the cell itself is seen
                text = axes.annotate(str(number), at, above, textcoords="offset points")
                text.set(ha="center", fontsize=8, bbox=paper)

    def add_legend(self, figure: Figure, columns: int) -> None:
        """Beside the panels."""
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], linestyle="", marker="o", color=color, label=self._entry(name))
            for name, color in self.colors.items()
        ]
        figure.legend(
            handles=handles,
            loc="outside right upper",
            ncols=columns,
            frameon=False,
            fontsize=9,
            handletextpad=0.2,
            columnspacing=1.0,
        )

    def _entry(self, name: str) -> str:
        return f"{self.numbers[name]}  {name}" if name in self.numbers else name


def draw_numbers(axes: Axes, points: np.ndarray, values: pd.Series[Any]) -> None:
    """Cells coloured by a number; grey where there is none."""
    present = values.notna().to_numpy()
    _scatter(axes, points[~present], color=GREY)
    shown = _scatter(axes, points[present], c=values[present].to_numpy(), cmap="viridis")
    axes.figure.colorbar(shown, ax=axes, shrink=0.6, aspect=20)


def _scatter(axes: Axes, points: np.ndarray, **colors: Any) -> Any:
    """Points as one image in an SVG, which is small and opens for any number of cells."""
    size = np.clip(30_000 / max(len(points), 1), 1, 30)
    return axes.scatter(points[:, 0], points[:, 1], s=size, linewidths=0, rasterized=True, **colors)


def _colors(n: int) -> Sequence[str]:
    """Okabe and Ito's for up to 8 classes, beyond that scanpy's, over again after 102."""
    if n <= len(OKABE_ITO):
        return OKABE_ITO[:n]
    palettes = import_scanpy().pl.palettes
    for palette in (palettes.default_20, palettes.default_28, palettes.default_102):
        if n <= len(palette):
            return list(palette[:n])
    return [palettes.default_102[i % 102] for i in range(n)]


def import_scanpy() -> Any:
    try:
        import scanpy
    except ImportError as error:
        raise InputError(
            "this plot needs scanpy: pip install 'cellpatch-fast[analysis]'"
        ) from error
    return scanpy
