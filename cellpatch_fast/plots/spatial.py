"""Tissues: spots where they lie, domains in the colours of what they match, domains as a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .figures import GREY, new_figure
from .scatter import NO_CLASS, Palette

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = 4.2  # inches of a panel
FILLED = 0.95  # of the distance to the next spot, is a spot's width
SMALLEST, LARGEST = 0.3, 40.0  # points of a spot
GAP = 0.1  # of a slice's longer side, between slices
WEAKEST = 0.05  # connectivity of two domains that a line is drawn for


class Image(NamedTuple):
    """What a tissue looks like.

    ``scale``: its pixels per unit of the coordinates.
    """

    pixels: np.ndarray  # [height, width, 3 or 4]
    scale: float


def match_labels(found: pd.Series[Any], truth: pd.Series[Any]) -> dict[str, str]:
    """For each found label the true one it is drawn as, by the Hungarian method; each once.

    Labels that are left over, where more are found than true, stand for themselves; what has no
    label matches none.
    """
    import pandas as pd
    from scipy.optimize import linear_sum_assignment

    shared = pd.crosstab(found, truth).drop(columns=list(NO_CLASS), errors="ignore")
    rows, columns = linear_sum_assignment(-shared.to_numpy())
    matched = {
        str(shared.index[r]): str(shared.columns[c]) for r, c in zip(rows, columns, strict=True)
    }
    return {str(name): matched.get(str(name), f"domain {name}") for name in sorted(found.unique())}


def side_by_side(places: np.ndarray, slices: np.ndarray) -> np.ndarray:
    """Slices moved such that each stands to the right of the one before, with some space.

    Parameters
    ----------
    places
        [spots, 2].
    slices
        [spots]: names.
    """
    moved, edge = places.copy(), 0.0
    for name in np.unique(slices):
        spots = slices == name
        moved[spots] += [edge, 0] - places[spots].min(axis=0)
        edge = moved[spots, 0].max() + GAP * np.ptp(places[spots], axis=0).max()
    return moved


def draw_tissue(
    places: np.ndarray,
    panels: Mapping[str, pd.Series[Any]],
    *,
    image: Image | None = None,
    show: bool = False,
) -> Figure:
    """Spots where they lie, a panel for each column of labels; one colour per label in all.

    Parameters
    ----------
    places
        [spots, 2]: across, and down as in an image.
    panels
        Labels of the spots by the titles of the panels.
    image
        Drawn below the spots.
    """
    palette = Palette(list(panels.values()))
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    width, height = np.maximum(np.ptp(places, axis=0), 1e-9)
    tall = SIDE * float(np.clip(height / width, 0.4, 1.5))
    columns = -(-len(palette) // int(4.5 * tall * down))
    figure = new_figure(SIDE * across + palette.width * columns, (tall + 0.3) * down, show)
    every = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (title, labels) in zip(every, panels.items(), strict=False):
        axes.set_title(title, fontsize=11)
        _draw_spots(axes, places, labels.map(palette.colors).to_numpy(), image)
    for axes in every:
        axes.set_axis_off()
    palette.add_legend(figure, columns)
    return figure


def _draw_spots(axes: Axes, places: np.ndarray, colors: np.ndarray, image: Image | None) -> None:
    if image is not None:
        height, width = np.asarray(image.pixels.shape[:2]) / image.scale
        axes.imshow(image.pixels, extent=(0, width, height, 0), alpha=0.6)
    low, high = places.min(axis=0), places.max(axis=0)
    margin = 0.03 * max(*(high - low), 1e-9)
    axes.set_xlim(low[0] - margin, high[0] + margin)
    axes.set_ylim(high[1] + margin, low[1] - margin)  # down, as in an image
    axes.set_aspect("equal")
    points_per_unit = SIDE * 72 / (max(*(high - low), 1e-9) + 2 * margin)
    width = np.clip(FILLED * _spacing(places) * points_per_unit, SMALLEST, LARGEST)
    axes.scatter(
        places[:, 0], places[:, 1], s=width**2, c=colors, linewidths=0, rasterized=True,
        alpha=1.0 if image is None else 0.75,
    )  # fmt: skip


def _spacing(places: np.ndarray) -> float:
    """Distance of a spot to the next one; the median of some."""
    from scipy.spatial import KDTree

    if len(places) < 2:
        return 1.0
    some = places[:: max(1, len(places) // 2_000)]
    return float(np.median(KDTree(places).query(some, k=2)[0][:, 1]))


def draw_graph(
    points: np.ndarray,
    labels: pd.Series[Any],
    connectivities: np.ndarray,
    order: list[str],
    *,
    show: bool = False,
) -> Figure:
    """Spots in two dimensions, and beside them groups as a graph: PAGA.

    Parameters
    ----------
    points
        [spots, 2], a UMAP of the embedding.
    labels
        Of the spots.
    connectivities
        [groups, groups], symmetric: how much two groups are connected, 0 to 1.
    order
        Names of the groups, in the order of ``connectivities``.
    """
    palette = Palette([labels])
    columns = -(-len(palette) // int(4.5 * SIDE))
    figure = new_figure(2 * SIDE + palette.width * columns, SIDE + 0.3, show)
    left, right = figure.subplots(1, 2)
    left.set_title("UMAP", fontsize=11)
    palette.draw(left, points, labels)
    right.set_title("PAGA", fontsize=11)
    middles = np.array([np.median(points[(labels == name).to_numpy()], axis=0) for name in order])
    for i in range(len(order)):
        for j in range(i):
            weight = float(connectivities[i, j])
            if weight >= WEAKEST:
                ends = middles[[i, j]]
                right.plot(ends[:, 0], ends[:, 1], color=GREY, lw=1 + 7 * weight, zorder=1)
    sizes = labels.value_counts().reindex(order).to_numpy(np.float64)
    right.scatter(
        middles[:, 0], middles[:, 1], s=80 + 900 * sizes / sizes.max(), zorder=2,
        c=[palette.colors[name] for name in order], edgecolors="white",
    )  # fmt: skip
    for name, (x, y) in zip(order, middles, strict=True):
        paper = {"boxstyle": "round,pad=0.15", "color": "white", "alpha": 0.8, "lw": 0}
        right.annotate(name, (x, y), ha="center", va="center", fontsize=8, bbox=paper, zorder=3)
    right.margins(0.2)
    for axes in (left, right):
        axes.set_axis_off()
    palette.add_legend(figure, columns)
    return figure
