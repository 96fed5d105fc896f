"""Graphs of spots: right for every kind, symmetric, within slices; refused where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from cellpatch_fast.errors import InputError
from cellpatch_fast.spatial.choices import GraphKind
from cellpatch_fast.spatial.graphs import spatial_graph

from ..examples import examples


def grid(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Visium's array, and where its spots are, 100 apart."""
    row, step = np.divmod(np.arange(rows * columns), columns)
    array = np.stack([row, 2 * step + row % 2], axis=1)
    return array, array[:, ::-1] * [50.0, 50 * np.sqrt(3)]


@examples(30)
@given(spots=st.integers(2, 40), radius=st.floats(0.05, 1.5), seed=st.integers(0, 1000))
def test_neighbours_within_a_radius_are_those(spots: int, radius: float, seed: int) -> None:
    places = np.random.default_rng(seed).random((spots, 2))
    apart = cdist(places, places)
    expected = (apart <= radius) & ~np.eye(spots, dtype=bool)
    if not expected.any():
        with pytest.raises(InputError, match="no two spots are within a radius"):
            spatial_graph(places, radius=radius)
        return
    graph = spatial_graph(places, radius=radius)
    assert np.array_equal(graph.distances.toarray() > 0, expected)
    np.testing.assert_allclose(graph.distances.toarray()[expected], apart[expected])
    assert graph.isolated == int((~expected.any(axis=1)).sum())


def test_nearest_neighbours_are_mutual() -> None:
    places = np.random.default_rng(0).random((101, 3))
    graph = spatial_graph(places, kind="nearest", neighbours=5)
    nearest = np.argsort(cdist(places, places), axis=1)[:, 1:6]
    expected = np.zeros((101, 101), bool)
    expected[np.arange(101)[:, None], nearest] = True
    assert np.array_equal(graph.distances.toarray() > 0, expected | expected.T)


def test_neighbours_on_the_grid_are_the_six_around_a_spot() -> None:
    array, places = grid(7, 11)
    graph = spatial_graph(array, kind="grid")
    apart = cdist(places, places)
    assert np.array_equal(graph.distances.toarray() > 0, (apart > 0) & (apart < 101))
    np.testing.assert_allclose(graph.distances.data, 1)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_the_radius_that_is_chosen_encloses_the_first_ring_of_a_grid(noise: float) -> None:
    array, places = grid(13, 17)
    moved = places + noise * np.random.default_rng(0).standard_normal(places.shape)
    graph = spatial_graph(moved)
    assert graph.radius is not None
    on_grid = spatial_graph(array, kind="grid")
    assert np.array_equal(graph.distances.indices, on_grid.distances.indices)
    assert "5." in str(graph)  # neighbours, with those at the border


def test_the_radius_that_is_chosen_gives_scattered_spots_six_neighbours() -> None:
    places = np.random.default_rng(0).random((2_003, 2)) * 1e4
    assert spatial_graph(places).neighbours.mean() == pytest.approx(6, abs=0.1)
    assert spatial_graph(places, neighbours=11).neighbours.mean() == pytest.approx(11, abs=0.1)


def test_no_edge_leads_from_one_slice_to_another() -> None:
    places = np.random.default_rng(0).random((61, 2))
    slices = np.random.default_rng(1).choice(["a", "b", "c"], 61)
    kinds: tuple[GraphKind, ...] = ("radius", "nearest")
    for kind in kinds:
        graph = spatial_graph(places, kind=kind, slices=slices)
        rows, columns = graph.distances.nonzero()
        assert len(rows)
        assert (slices[rows] == slices[columns]).all()
        for name in "abc":  # each is what it would be alone
            spots = np.flatnonzero(slices == name)
            alone = spatial_graph(places[spots], kind=kind, radius=graph.radius)
            part = graph.distances[spots][:, spots]
            np.testing.assert_allclose(part.toarray(), alone.distances.toarray())


def test_permuting_spots_permutes_the_graph() -> None:
    places = np.random.default_rng(0).random((53, 2))
    order = np.random.default_rng(1).permutation(53)
    graph, permuted = spatial_graph(places), spatial_graph(places[order])
    assert np.array_equal(
        permuted.distances.toarray(), graph.distances.toarray()[np.ix_(order, order)]
    )


PLACES = np.random.default_rng(0).random((7, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinates": PLACES[:, 0]}, r"must be \[spots, 2 or 3\], found shape \[7\]"),
        ({"coordinates": PLACES[:1]}, "1 spot has no neighbours"),
        ({"coordinates": np.where(PLACES > 0.9, np.nan, PLACES)}, "not finite, the first is spot"),
        ({"coordinates": PLACES[[0, 1, 2, 1]]}, "2 spots share their position .* spots 1 and 3"),
        ({"radius": 1e-9}, "nearest two are 0.*A radius of .* gives a spot about 6"),
        ({"radius": -1.0}, "radius must be positive"),
        ({"kind": "nearest", "radius": 1.0}, "takes no radius"),
        ({"kind": "delaunay"}, "unknown kind of graph 'delaunay': choose radius, nearest, grid"),
        ({"kind": "grid"}, "whole rows and columns"),
        ({"neighbours": 0}, "at least 1 neighbour"),
        ({"slices": ["a"] * 3}, "one of each of 7 spots"),
        ({"slices": list("abcdefg")}, "every slice has one spot"),
    ],
)
def test_what_makes_no_graph_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spatial_graph(**{"coordinates": PLACES} | arguments)


def test_slices_in_different_units_are_refused() -> None:
    places = np.random.default_rng(0).random((40, 2))
    places[20:] *= 1_000
    with pytest.raises(InputError, match=r"slice 2 and .* in slice 1: bring all slices to"):
        spatial_graph(places, slices=["a"] * 20 + ["b"] * 20)
