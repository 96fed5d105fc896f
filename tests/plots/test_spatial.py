"""Pictures of tissues: spots in place, matching colours, slices apart, what is missing is grey."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from cellpatch_fast import InputError, pl
from cellpatch_fast.datasets import synthetic_tissue
from cellpatch_fast.plots.figures import GREY
from cellpatch_fast.plots.spatial import match_labels, side_by_side

from ..examples import examples
from .drawn import assert_nothing_is_cut_off, panels, texts

pytestmark = pytest.mark.usefixtures("nothing_is_left_to_pyplot")

SPOTS = 110


@pytest.fixture
def tissue() -> AnnData:
    """Domains are the layers by other names, but for two spots."""
    adata = synthetic_tissue(SPOTS, layers=3, genes=7)
    names = adata.obs["layer"].map({"layer 1": "2", "layer 2": "3", "layer 3": "1"}).astype(str)
    names.iloc[[0, 1]] = "1"
    adata.obs["domain"] = pd.Categorical(names)
    adata.obsm["X_stagate"] = np.eye(3)[adata.obs["layer"].cat.codes] + np.random.default_rng(
        0
    ).normal(0, 0.1, (SPOTS, 3))
    return adata


def drawn(figure: Figure) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Positions and colours (RGB) of the spots, by the title of the panel."""
    return {
        axes.get_title(): (
            np.asarray(axes.collections[0].get_offsets()),
            axes.collections[0].get_facecolors()[:, :3],
        )
        for axes in panels(figure)
        if axes.collections
    }


def test_domains_have_the_colours_of_the_layers_that_they_match(tissue: AnnData) -> None:
    figure = pl.spatial_domains(tissue, truth="layer")
    shown = drawn(figure)
    assert list(shown) == ["layer", "domain"]
    for places, _ in shown.values():
        assert np.array_equal(places, tissue.obsm["spatial"])
    differing = (shown["layer"][1] != shown["domain"][1]).any(axis=1)
    assert np.flatnonzero(differing).tolist() == [0, 1]
    assert {"layer 1", "layer 2", "layer 3"} <= set(texts(figure))
    assert "1" not in texts(figure)
    assert_nothing_is_cut_off(figure)


def test_down_is_down_as_in_an_image(tissue: AnnData) -> None:
    (axes, *_) = panels(pl.spatial_domains(tissue))
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert axes.get_aspect() == 1


def test_domains_beyond_the_layers_have_names_and_colours_of_their_own(tissue: AnnData) -> None:
    names = tissue.obs["domain"].astype(str)
    names.iloc[50:55] = "4"
    tissue.obs["domain"] = names
    figure = pl.spatial_domains(tissue, truth="layer")
    assert "domain 4" in texts(figure)
    colours = drawn(figure)["domain"][1]
    assert len(np.unique(colours, axis=0)) == 4


def test_several_columns_are_several_panels(tissue: AnnData) -> None:
    tissue.obs["other"] = tissue.obs["domain"].astype(str).map({"1": 1, "2": 2, "3": 2})
    figure = pl.spatial_domains(tissue, domains=["domain", "other"], truth="layer")
    assert list(drawn(figure)) == ["layer", "domain", "other"]
    assert not {"1.0", "2.0", "domain 1.0"} & set(texts(figure))


def test_spots_without_a_layer_are_grey_and_match_nothing(tissue: AnnData) -> None:
    """Though most spots of a domain have none."""
    layers = tissue.obs["layer"].astype(object)
    layers[tissue.obs["domain"] == "1"] = None
    tissue.obs["layer"] = layers
    figure = pl.spatial_domains(tissue, truth="layer")
    shown = drawn(figure)
    missing = layers.isna().to_numpy()
    assert (shown["layer"][1][missing] == to_rgb(GREY)).all()
    assert not (shown["domain"][1] == to_rgb(GREY)).all(axis=1).any()


def test_slices_are_drawn_side_by_side(tissue: AnnData) -> None:
    tissue.obsm["spatial"] = tissue.obsm["spatial"] * [-1, 3]
    slices = np.where(np.arange(SPOTS) % 2, "a", "b")
    tissue.obs["slice"] = slices
    (places, _) = drawn(pl.spatial_domains(tissue, batch_key="slice"))["domain"]
    assert places[slices == "a", 0].max() < places[slices == "b", 0].min()
    for name in "ab":
        there, before = places[slices == name], tissue.obsm["spatial"][slices == name]
        np.testing.assert_allclose(there - there[0], before - before[0], atol=1e-9)
        assert there[:, 1].min() == 0
    alone = side_by_side(places, np.full(SPOTS, "a"))
    np.testing.assert_allclose(alone - alone[0], places - places[0], atol=1e-9)


def with_image(tissue: AnnData) -> AnnData:
    size = np.ceil(tissue.obsm["spatial"].max(axis=0) * 0.1).astype(int)
    tissue.uns["spatial"] = {
        "one": {
            "images": {"hires": np.full((size[1], size[0], 3), [1.0, 0, 0])},
            "scalefactors": {"tissue_hires_scalef": 0.1},
        },
        "two": {
            "images": {"lowres": np.zeros((7, 5, 3))},
            "scalefactors": {"tissue_lowres_scalef": 0.01},
        },
    }
    return tissue


def test_the_picture_of_the_tissue_lies_below_the_spots(tissue: AnnData) -> None:
    with_image(tissue)
    (axes, *_) = panels(pl.spatial_domains(tissue))
    (image,) = axes.images
    height, width = image.get_array().shape[:2]
    assert image.get_extent() == pytest.approx((0, 10 * width, 10 * height, 0))
    (axes, *_) = panels(pl.spatial_domains(tissue, image="two"))
    assert axes.images[0].get_array().shape[:2] == (7, 5)
    (axes, *_) = panels(pl.spatial_domains(tissue, image=False))
    assert not axes.images
    tissue.obs["slice"] = "a"
    (axes, *_) = panels(pl.spatial_domains(tissue, batch_key="slice"))
    assert not axes.images
    with pytest.raises(InputError, match=r"no library 'three'; it has 'one', 'two'"):
        pl.spatial_domains(tissue, image="three")


@examples(40)
@given(
    found=st.lists(st.integers(0, 3), min_size=1, max_size=17),
    truth=st.lists(st.integers(0, 2), min_size=17, max_size=17),
)
def test_labels_match_as_well_as_any_assignment(found: list[int], truth: list[int]) -> None:
    one = pd.Series([f"d{x}" for x in found], dtype=object)
    other = pd.Series([f"t{x}" for x in truth[: len(found)]], dtype=object)
    matched = match_labels(one, other)
    assert matched.keys() == set(one)
    assert len(set(matched.values())) == len(matched)
    agreeing = (one.map(matched) == other).sum()
    names = [*(f"t{x}" for x in range(3)), "none"]
    best = max(
        (one.map(dict(zip(["d0", "d1", "d2", "d3"], order, strict=True))) == other).sum()
        for order in permutations(names)
    )
    assert agreeing == best


def test_paga_shows_domains_where_their_spots_are(tissue: AnnData) -> None:
    before = list(tissue.obsm), list(tissue.uns), list(tissue.obsp)
    figure = pl.spatial_paga(tissue)
    left, right = panels(figure)
    assert (left.get_title(), right.get_title()) == ("UMAP", "PAGA")
    points = np.asarray(left.collections[0].get_offsets())
    assert len(points) == SPOTS
    middles = np.asarray(right.collections[0].get_offsets())
    assert middles.shape == (3, 2)
    sizes = right.collections[0].get_sizes()
    counts = tissue.obs["domain"].value_counts()[["1", "2", "3"]]
    assert np.array_equal(np.argsort(sizes), np.argsort(counts.to_numpy()))
    assert {"1", "2", "3"} <= {text.get_text() for text in right.texts}
    assert (list(tissue.obsm), list(tissue.uns), list(tissue.obsp)) == before
    assert_nothing_is_cut_off(figure)


def test_figures_are_saved(tissue: AnnData, tmp_path: Path) -> None:
    pl.spatial_domains(tissue, save=tmp_path / "domains.png")
    pl.spatial_paga(tissue, save=tmp_path / "paga")
    assert {path.name for path in tmp_path.iterdir()} == {"domains.png", "paga.png", "paga.svg"}


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda t: pl.spatial_domains(t, domains="leiden"), "obs lacks 'leiden'; it has 'layer'"),
        (lambda t: pl.spatial_domains(t, truth="cortex"), "obs lacks 'cortex'"),
        (lambda t: pl.spatial_domains(t, basis="X_umap"), "obsm lacks 'X_umap'"),
        (lambda t: pl.spatial_domains(t, batch_key="slice"), "no column 'slice'"),
        (lambda t: pl.spatial_paga(t, domains="leiden"), "obs lacks 'leiden'"),
        (lambda t: pl.spatial_paga(t, use_rep="X_other"), "obsm lacks 'X_other'"),
        (
            lambda t: pl.spatial_paga(t[t.obs["domain"] == "1"].copy()),
            "has 1 domain: a graph needs two",
        ),
    ],
)
def test_what_cannot_be_drawn_is_told(
    tissue: AnnData, draw: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        draw(tissue)
