"""Which spots are neighbours: within a radius, the nearest ones, or those of Visium's grid.

Neighbours are kept as `SpatialGraph`, in CSR form, without the spots themselves; in AnnData they
have the names that squidpy and scanpy use: ``obsp["spatial_connectivities"]``,
``obsp["spatial_distances"]`` and ``uns["spatial_neighbors"]``. Every kind of graph is symmetric,
and no edge leads from one slice to another, however their coordinates overlap.

Where no radius is given, one is chosen that gives a spot about six neighbours, as on Visium's
grid. On a grid distances come in rings: a radius is then between two of them, where small errors of
the coordinates do not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from scipy import sparse

from ..errors import InputError
from .choices import GraphKind

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import ArrayLike

CONNECTIVITIES, DISTANCES = "spatial_connectivities", "spatial_distances"
PARAMETERS = "spatial_neighbors"
GRID_COLUMNS = ("array_row", "array_col")  # of obs, as Space Ranger names them

NEIGHBOURS = 6  # of a spot, about, where nothing else is asked for
LOOKED_AT = 18  # nearest spots that a radius is chosen from: two rings of a hexagonal grid
RING = 1.15  # times as far is the next ring, where there are rings
RING_NEIGHBOURS = (3.5, 9.0)  # of a spot, on average, in the rings that a radius may enclose
UNITS = 20.0  # times as far apart as in another are the spots of a slice in other units


@dataclass(frozen=True, eq=False)
class SpatialGraph:
    """The neighbours of every spot, symmetric, without the spot itself.

    Parameters
    ----------
    distances
        CSR [spots, spots], float64: how far apart neighbours are.
    kind
        How neighbours were found.
    radius
        Largest distance of neighbours, for ``"radius"``.
    slices
        int64 [spots]: the slice a spot is of.
    """

    distances: sparse.csr_matrix
    kind: GraphKind
    radius: float | None
    slices: np.ndarray

    def __len__(self) -> int:
        return int(self.distances.shape[0])

    @property
    def neighbours(self) -> np.ndarray:
        """int64 [spots]: how many each spot has."""
        return np.diff(self.distances.indptr).astype(np.int64)

    @property
    def isolated(self) -> int:
        """Spots without any neighbour."""
        return int((self.neighbours == 0).sum())

    def params(self) -> dict[str, Any]:
        """What ``uns`` says of it."""
        params: dict[str, Any] = {"kind": self.kind, "isolated": self.isolated}
        return params if self.radius is None else params | {"radius": self.radius}

    def __str__(self) -> str:
        within = "" if self.radius is None else f" within {self.radius:.4g}"
        slices = len(np.unique(self.slices))
        return (
            f"{len(self):,} spots in {slices:,} slice{'s' * (slices > 1)}, "
            f"{self.neighbours.mean():.1f} neighbours each{within}, {self.isolated:,} isolated"
        )


def spatial_graph(
    coordinates: ArrayLike,
    *,
    kind: GraphKind = "radius",
    radius: float | None = None,
    neighbours: int = NEIGHBOURS,
    slices: ArrayLike | None = None,
) -> SpatialGraph:
    """Find the neighbours of every spot.

    Parameters
    ----------
    coordinates
        [spots, 2 or 3], in any unit, the same in all slices. For ``"grid"`` rows and columns of the
        array, as Space Ranger counts them: whole numbers, in every second column of a row.
    kind
        ``"radius"``: all spots within ``radius``. ``"nearest"``: the nearest ``neighbours``, and
        those that have the spot among theirs. ``"grid"``: the six around a spot of Visium's grid.
    radius
        None chooses one that gives a spot about ``neighbours`` neighbours.
    neighbours
        See ``radius`` and ``kind``.
    slices
        [spots]: the slice, or sample, of each spot; None for a single one.

    Raises
    ------
    InputError
        If coordinates are missing, not finite, or the same for two spots of a slice; if slices
        have different units; or no spot has a neighbour.
    """
    places = _places(coordinates, kind)
    codes = _codes(slices, len(places))
    if kind not in get_args(GraphKind):
        raise InputError(f"unknown kind of graph {kind!r}: choose {', '.join(get_args(GraphKind))}")
    if neighbours < 1:
        raise InputError(f"a spot needs at least 1 neighbour, found neighbours={neighbours}")
    if radius is not None and not 0 < radius < np.inf:
        raise InputError(f"the radius must be positive and finite, found {radius}")
    if radius is not None and kind != "radius":
        raise InputError(f"a graph of kind {kind!r} takes no radius: leave it out")
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    nearest = [_nearest_distances(places[spots]) for spots in members]
    _require_distinct(places, members, nearest)
    if kind == "grid":
        radius_used: float | None = 1.5  # neighbours are 1 apart, see _places; the next ones 1.73
    elif kind == "radius":
        _require_alike(nearest)
        radius_used = _choose_radius(nearest, neighbours) if radius is None else radius
    else:
        radius_used = None
    edges = [_edges(places[spots], radius_used, neighbours) for spots in members]
    distances = _joined(edges, members, len(places))
    if not distances.nnz:
        _raise_no_edges(nearest, radius)
    return SpatialGraph(distances, kind, radius_used if kind == "radius" else None, codes)


def _places(coordinates: ArrayLike, kind: str) -> np.ndarray:
    """float64 [spots, axes], checked; of a grid such that neighbours are 1 apart."""
    places = np.asarray(coordinates, np.float64)
    if places.ndim != 2 or places.shape[1] not in (2, 3):
        raise InputError(f"coordinates must be [spots, 2 or 3], found shape {list(places.shape)}")
    if len(places) < 2:
        raise InputError(f"{len(places)} spot has no neighbours: at least 2 spots are needed")
    bad = np.flatnonzero(~np.isfinite(places).all(axis=1))
    if len(bad):
        raise InputError(
            f"{len(bad):,} of {len(places):,} spots have coordinates that are not finite, the "
            f"first is spot {bad[0]}: {places[bad[0]].tolist()}. Leave such spots out"
        )
    if kind == "grid":
        if places.shape[1] != 2 or (places != np.round(places)).any():
            raise InputError("a grid needs whole rows and columns, as in obs['array_row']")
        places = places * [np.sqrt(3) / 2, 0.5]
    return places


def _codes(slices: ArrayLike | None, spots: int) -> np.ndarray:
    if slices is None:
        return np.zeros(spots, np.int64)
    names = np.asarray(slices)
    if names.shape != (spots,):
        raise InputError(f"slices must name one of each of {spots:,} spots, found {names.shape}")
    return np.unique(names.astype(str), return_inverse=True)[1].astype(np.int64)


def _nearest_distances(places: np.ndarray) -> np.ndarray:
    """Distances to the `LOOKED_AT` nearest others, ascending: [spots, at most LOOKED_AT]."""
    from sklearn.neighbors import NearestNeighbors

    count = min(LOOKED_AT, len(places) - 1)
    if count < 1:
        return np.zeros((len(places), 0))
    distances, _ = NearestNeighbors(n_neighbors=count).fit(places).kneighbors()
    return np.asarray(distances)


def _require_distinct(
    places: np.ndarray, members: list[np.ndarray], nearest: list[np.ndarray]
) -> None:
    """Refuse two spots of a slice in one place."""
    for spots, distances in zip(members, nearest, strict=True):
        if not distances.size or distances[:, 0].min() > 0:
            continue
        first = int(distances[:, 0].argmin())
        twin = np.flatnonzero((places[spots] == places[spots[first]]).all(axis=1))
        raise InputError(
            f"{int((distances[:, 0] == 0).sum()):,} spots share their position with another one, "
            f"such as spots {spots[twin[0]]} and {spots[twin[1]]}: leave one of each out, or name "
            "the slice of each spot (batch_key) if there are several"
        )


def _require_alike(nearest: list[np.ndarray]) -> None:
    """Refuse slices whose spots are so differently spaced that their units must differ."""
    spacing = {i: float(np.median(d[:, 0])) for i, d in enumerate(nearest) if d.size}
    if not spacing:
        raise InputError("every slice has one spot: none has a neighbour")
    most, least = max(spacing, key=spacing.__getitem__), min(spacing, key=spacing.__getitem__)
    if spacing[most] > UNITS * spacing[least]:
        raise InputError(
            f"neighbours are {spacing[most]:.4g} apart in slice {most + 1} and "
            f"{spacing[least]:.4g} in slice {least + 1}: bring all slices to the same unit, or "
            "use the nearest neighbours (kind='nearest')"
        )


def _choose_radius(nearest: list[np.ndarray], neighbours: int) -> float:
    """A radius that gives a spot about so many neighbours; between two rings, if there are."""
    distances = np.sort(np.concatenate([d.ravel() for d in nearest]))
    spots = sum(map(len, nearest))
    ratios = distances[1:] / distances[:-1]
    first, last = (min(len(ratios), int(count * spots)) for count in RING_NEIGHBOURS)
    if neighbours == NEIGHBOURS and last > first:
        gap = first + int(ratios[first:last].argmax())
        if ratios[gap] >= RING:
            return float(np.sqrt(distances[gap] * distances[gap + 1]))
    place = min(neighbours * spots, len(distances)) - 1
    return float(distances[place])


def _edges(places: np.ndarray, radius: float | None, neighbours: int) -> sparse.csr_matrix:
    """Distances of neighbours within a slice, symmetric, sorted."""
    from sklearn.neighbors import NearestNeighbors

    count = min(neighbours, len(places) - 1)
    if count < 1:
        return sparse.csr_matrix((len(places), len(places)))
    if radius is None:
        search = NearestNeighbors(n_neighbors=count).fit(places)
        edges = search.kneighbors_graph(mode="distance").tocsr()
        edges = edges.maximum(edges.T)
    else:
        search = NearestNeighbors(radius=radius).fit(places)
        edges = search.radius_neighbors_graph(mode="distance").tocsr()
    edges.sort_indices()
    return edges


def _joined(
    edges: list[sparse.csr_matrix], members: list[np.ndarray], spots: int
) -> sparse.csr_matrix:
    """The graphs of all slices in the order of the spots."""
    joined = sparse.block_diag(edges, format="csr")
    place = np.empty(spots, np.int64)
    place[np.concatenate(members)] = np.arange(spots)
    joined = joined[place][:, place]
    joined.sort_indices()
    return joined


def _raise_no_edges(nearest: list[np.ndarray], radius: float | None) -> None:
    distances = [d[:, 0] for d in nearest if d.size]
    if not distances:
        raise InputError("every slice has one spot: none has a neighbour")
    raise InputError(
        f"no two spots are within a radius of {radius:g}: the nearest two are "
        f"{min(map(np.min, distances)):.4g} apart. A radius of "
        f"{_choose_radius(nearest, NEIGHBOURS):.4g} gives a spot about {NEIGHBOURS} neighbours"
    )


def coordinates_of(adata: AnnData, kind: GraphKind, basis: str = "spatial") -> np.ndarray:
    """Coordinates of an object's spots, [spots, axes].

    Raises
    ------
    InputError
        If it has none.
    """
    if kind == "grid":
        missing = [name for name in GRID_COLUMNS if name not in adata.obs]
        if missing:
            raise InputError(
                f"obs has no column {' and no '.join(missing)}, which a grid is told from: use "
                "kind='radius'"
            )
        return np.stack([np.asarray(adata.obs[name], np.float64) for name in GRID_COLUMNS], axis=1)
    if basis not in adata.obsm:
        others = ", ".join(map(repr, adata.obsm)) or "nothing"
        raise InputError(
            f"obsm has no {basis!r}, where coordinates of spots belong (it holds {others}): set "
            f"adata.obsm[{basis!r}] to an array [spots, 2]"
        )
    return np.asarray(adata.obsm[basis])


def slices_of(adata: AnnData, batch_key: str | None) -> np.ndarray | None:
    """The slice of each spot, by a column of ``obs``; None for a single one.

    Raises
    ------
    InputError
        If there is no such column, or it lacks the slice of a spot.
    """
    if batch_key is None:
        return None
    if batch_key not in adata.obs:
        raise InputError(
            f"batch_key: obs has no column {batch_key!r}; it has "
            f"{', '.join(map(repr, adata.obs)) or 'none'}"
        )
    column = adata.obs[batch_key]
    if column.isna().any():
        raise InputError(
            f"obs[{batch_key!r}] names no slice for {int(column.isna().sum()):,} spots"
        )
    return np.asarray(column.astype(str))


def store_graph(adata: AnnData, graph: SpatialGraph, batch_key: str | None = None) -> None:
    """Add a graph to an object, under squidpy's names."""
    connectivities = graph.distances.astype(np.float32)
    connectivities.data[:] = 1
    adata.obsp[CONNECTIVITIES] = connectivities
    adata.obsp[DISTANCES] = graph.distances
    slices = {} if batch_key is None else {"batch_key": batch_key}
    adata.uns[PARAMETERS] = {
        "connectivities_key": CONNECTIVITIES,
        "distances_key": DISTANCES,
        "params": graph.params() | slices,
    }
