"""Spatial tools on AnnData: what is added under which names, for scanpy and for files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
from anndata import AnnData
from scipy import sparse

import cellpatch_fast as cp
from cellpatch_fast import CellPatch
from cellpatch_fast.errors import InputError, InputWarning
from cellpatch_fast.model.storage import fingerprint
from cellpatch_fast.spatial.embedding import embed_tissue
from cellpatch_fast.spatial.graphs import spatial_graph

from .conftest import SMALL, SPOTS, small


def embedded(tissue: AnnData, **options: Any) -> AnnData:
    """With graph and embedding; a few epochs leave the layers as they are in the expression."""
    cp.tl.spatial_embed(tissue, **SMALL | options)
    return tissue


def test_the_graph_has_squidpys_names(tissue: AnnData, places: np.ndarray) -> None:
    assert cp.tl.spatial_graph(tissue) is None
    graph = spatial_graph(places)
    distances, connectivities = (
        tissue.obsp[f"spatial_{name}"] for name in ("distances", "connectivities")
    )
    assert np.array_equal(distances.toarray(), graph.distances.toarray())
    assert np.array_equal(connectivities.toarray() > 0, graph.distances.toarray() > 0)
    assert set(connectivities.data) == {1}
    entry = tissue.uns["spatial_neighbors"]
    assert entry["connectivities_key"] == "spatial_connectivities"
    assert entry["distances_key"] == "spatial_distances"
    assert entry["params"] == {"kind": "radius", "radius": graph.radius, "isolated": 0}


def test_the_grid_and_slices_come_from_obs(tissue: AnnData) -> None:
    tissue.obs["slice"] = pd.Categorical(np.where(np.arange(SPOTS) < 50, "a", "b"))
    cp.tl.spatial_graph(tissue, kind="grid", batch_key="slice")
    rows, columns = tissue.obsp["spatial_distances"].nonzero()
    assert (tissue.obs["slice"].to_numpy()[rows] == tissue.obs["slice"].to_numpy()[columns]).all()
    assert tissue.uns["spatial_neighbors"]["params"]["batch_key"] == "slice"
    assert tissue.uns["spatial_neighbors"]["params"]["kind"] == "grid"


def test_the_embedding_is_that_of_the_graph_that_is_there(
    tissue: AnnData, places: np.ndarray, tissue_model: CellPatch
) -> None:
    nearest: dict[str, Any] = {"kind": "nearest", "neighbours": 3}
    for graph, options in (
        (spatial_graph(places), {}),
        (spatial_graph(places, **nearest), nearest),
    ):
        cp.tl.spatial_graph(tissue, **options)
        embedded(tissue, model=tissue_model)
        expected = embed_tissue(tissue, places, graph, tissue_model, settings=small())
        assert np.array_equal(tissue.obsm["X_stagate"], expected.rows)
        assert tissue.uns["X_stagate"]["losses"].tolist() == expected.losses


def test_without_a_graph_one_is_added(tissue: AnnData) -> None:
    embedded(tissue, key_added="X_mine")
    assert tissue.obsm["X_mine"].shape == (SPOTS, SMALL["output"])
    assert "spatial_distances" in tissue.obsp
    params = tissue.uns["X_mine"]["params"]
    assert params["preset"] == "default"
    assert params["epochs"] == SMALL["epochs"]
    assert "model" not in params


def test_a_model_may_be_a_folder(tissue: AnnData, tissue_model: CellPatch, tmp_path: Path) -> None:
    tissue_model.save_pretrained(tmp_path / "model")
    one, two = (
        embedded(tissue.copy(), model=model) for model in (tissue_model, tmp_path / "model")
    )
    assert np.array_equal(one.obsm["X_stagate"], two.obsm["X_stagate"])
    assert one.uns["X_stagate"]["params"]["model"] == fingerprint(tissue_model)


def test_mouse_genes_are_embedded_as_human_ones(tissue: AnnData, tissue_model: CellPatch) -> None:
    mouse = tissue.copy()
    mouse.var = mouse.var.set_index(mouse.var["feature_name"].str.capitalize())[[]]
    for preset in ("default", "original-code"):
        expected = embedded(tissue.copy(), model=tissue_model, preset=preset)
        with pytest.warns(InputWarning, match="if they are written in capitals"):
            rows = embedded(mouse.copy(), model=tissue_model, preset=preset).obsm["X_stagate"]
        assert np.array_equal(rows, expected.obsm["X_stagate"])
    with pytest.warns(InputWarning, match="if they are written in capitals"):
        cp.tl.spatial_niches(mouse, tissue_model)
    cp.tl.spatial_niches(tissue, tissue_model)
    assert np.array_equal(mouse.obsm["X_niche"], tissue.obsm["X_niche"])


def test_niches_are_added(tissue: AnnData, tissue_model: CellPatch) -> None:
    cp.tl.spatial_niches(tissue, tissue_model, components=5)
    assert tissue.obsm["X_niche"].shape == (SPOTS, 5)
    params = tissue.uns["X_niche"]["params"]
    assert params["model"] == fingerprint(tissue_model)
    assert params["kind"] == "nearest"
    assert params["sigma"] > 0
    assert "spatial_distances" not in tissue.obsp  # a graph of its own, of more neighbours
    cp.tl.spatial_niches(tissue, tissue_model, components=0, key_added="X_all")
    assert tissue.obsm["X_all"].shape == (SPOTS, 42)


def test_domains_are_added_the_largest_first(tissue: AnnData) -> None:
    tissue.obsm["X_mine"] = 9 * np.eye(3)[tissue.obs["layer"].cat.codes]
    tissue.obsm["X_mine"] += np.random.default_rng(0).standard_normal((SPOTS, 3))
    cp.tl.spatial_domains(tissue, n=3, use_rep="X_mine", starts=4)
    assert tissue.obs["domain"].dtype == "category"
    assert list(tissue.obs["domain"].cat.categories) == ["1", "2", "3"]
    assert list(tissue.obs["domain"].value_counts().index) == ["1", "2", "3"]
    table = pd.crosstab(tissue.obs["domain"], tissue.obs["layer"])
    assert ((table > 0).sum() == 1).all()
    assert tissue.obs["domain_agreement"].dtype == np.float32
    assert (tissue.obs["domain_agreement"] == 1).all()
    record = tissue.uns["domain"]
    assert record["params"] == {
        "method": "mixture", "use_rep": "X_mine", "refined": False, "seed": 0
    }  # fmt: skip
    assert record["agreement"] == pytest.approx(1)
    assert record["starts"]["agreement"].tolist() == [1] * 4


def test_another_method_leaves_no_agreement_of_the_one_before(tissue: AnnData) -> None:
    embedded(tissue)
    cp.tl.spatial_domains(tissue, n=3, starts=2)
    assert "domain_agreement" in tissue.obs
    cp.tl.spatial_domains(tissue, method="leiden")
    assert "domain_agreement" not in tissue.obs
    assert "starts" not in tissue.uns["domain"]


def test_refined_domains_are_named_anew_by_size(
    tissue: AnnData, places: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strays all over the tissue are the largest group, until each joins those around it."""
    side = places[:, 0] > np.median(places[:, 0])
    monkeypatch.setattr("cellpatch_fast.spatial.domains.REFINING", 13)
    stray = np.random.default_rng(0).permutation(SPOTS) < 47
    group = np.where(stray, 2, side.astype(int))
    tissue.obsm["X_mine"] = 12 * np.eye(3)[group]
    tissue.obsm["X_mine"] += np.random.default_rng(1).standard_normal((SPOTS, 3))
    cp.tl.spatial_domains(tissue, n=3, use_rep="X_mine", starts=4)
    assert tissue.obs["domain"].value_counts()["1"] == stray.sum()
    cp.tl.spatial_domains(tissue, n=3, use_rep="X_mine", starts=4, refined=True)
    counts = tissue.obs["domain"].value_counts(sort=False)
    assert list(counts.index) == [str(i + 1) for i in range(len(counts))]
    assert counts.min() > 0
    assert counts.is_monotonic_decreasing


def test_copies_leave_the_object_alone(tissue: AnnData, tissue_model: CellPatch) -> None:
    before = tissue.copy()
    graph = cp.tl.spatial_graph(tissue, copy=True)
    assert "spatial_distances" in graph.obsp
    embedding = cp.tl.spatial_embed(tissue, tissue_model, copy=True, **SMALL)
    assert "X_stagate" in embedding.obsm
    niches = cp.tl.spatial_niches(tissue, tissue_model, copy=True)
    assert "X_niche" in niches.obsm
    domains = cp.tl.spatial_domains(niches, n=2, use_rep="X_niche", starts=2, copy=True)
    assert "domain" in domains.obs
    assert "domain" not in niches.obs
    for part in ("obs", "obsm", "obsp", "uns"):
        assert list(getattr(tissue, part)) == list(getattr(before, part))


def test_scanpy_and_files_take_what_is_added(
    tissue: AnnData, tissue_model: CellPatch, tmp_path: Path
) -> None:
    tissue.obs["slice"] = "a"
    cp.tl.spatial_graph(tissue, batch_key="slice")
    embedded(tissue, model=tissue_model)
    cp.tl.spatial_niches(tissue, tissue_model)
    cp.tl.spatial_domains(tissue, starts=2)  # with a table of numbers
    tissue.write_h5ad(tmp_path / "tissue.h5ad")
    back = anndata.read_h5ad(tmp_path / "tissue.h5ad")
    for name in ("X_stagate", "X_niche", "spatial"):
        assert np.array_equal(back.obsm[name], tissue.obsm[name])
    assert (back.obs["domain"] == tissue.obs["domain"]).all()
    assert back.uns["domain"]["numbers"].keys() == {"domains", "bic", "agreement"}
    rows = tissue.obsm["X_stagate"].copy()
    cp.tl.spatial_embed(back, tissue_model, **SMALL)  # by the graph of the file
    assert np.array_equal(back.obsm["X_stagate"], rows)
    cp.tl.spatial_domains(back, n=3, starts=2, refined=True)
    scanpy.pp.neighbors(back, use_rep="X_stagate")
    scanpy.tl.paga(back, groups="domain")
    assert back.uns["paga"]["connectivities"].shape == (back.obs["domain"].nunique(),) * 2
    scanpy.tl.leiden(
        back, adjacency=back.obsp["spatial_connectivities"], flavor="igraph", n_iterations=1,
        directed=False,
    )  # fmt: skip


def test_a_graph_by_squidpy_is_taken(tissue: AnnData, places: np.ndarray) -> None:
    """As it may write them: with spots themselves, and other parameters."""
    graph = spatial_graph(places, kind="nearest", neighbours=4)
    edges, spots = graph.distances.tocoo(), np.arange(SPOTS)
    rows, columns = np.append(edges.row, spots), np.append(edges.col, spots)
    distances = np.append(edges.data, np.zeros(SPOTS))
    tissue.obsp["spatial_distances"] = sparse.csr_matrix((distances, (rows, columns)))
    assert tissue.obsp["spatial_distances"].nnz == graph.distances.nnz + SPOTS
    tissue.uns["spatial_neighbors"] = {
        "params": {"n_neighbors": 4, "coord_type": "generic", "radius": None, "transform": None}
    }
    embedded(tissue)
    expected = embed_tissue(tissue, places, graph, settings=small())
    assert np.array_equal(tissue.obsm["X_stagate"], expected.rows)


Tool = Any


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (lambda t: t.obsm.pop("spatial"), r"obsm has no 'spatial', .* holds nothing\): set"),
        (
            lambda t: t.obsm.update(spatial=np.where(t.obsm["spatial"] > 500, np.nan, 1.0)),
            "not finite, the first is spot",
        ),
        (
            lambda t: t.obsm.update(spatial=np.floor(t.obsm["spatial"] / 200)),
            "share their position .*batch_key",
        ),
    ],
)
def test_coordinates_that_are_none_are_refused(tissue: AnnData, tool: Tool, message: str) -> None:
    tool(tissue)
    with pytest.raises(InputError, match=message):
        cp.tl.spatial_graph(tissue)
    with pytest.raises(InputError, match=message):
        cp.tl.spatial_embed(tissue, **SMALL)


def test_other_bad_input_is_refused(tissue: AnnData, tissue_model: CellPatch) -> None:
    with pytest.raises(InputError, match="1 spot has no neighbours"):
        cp.tl.spatial_embed(tissue[:1].copy())
    with pytest.raises(InputError, match=r"no two spots are within a radius of 99.*nearest .* 100"):
        cp.tl.spatial_graph(tissue, radius=99)
    with pytest.raises(InputError, match="obs has no column 'slice'; it has 'layer'"):
        cp.tl.spatial_graph(tissue, batch_key="slice")
    with pytest.raises(InputError, match="no column array_row and no array_col, which a grid"):
        cp.tl.spatial_graph(AnnData(tissue.X, obsm=dict(tissue.obsm)), kind="grid")
    tissue.obs["slice"] = [None, *["a"] * (SPOTS - 1)]
    with pytest.raises(InputError, match=r"obs\['slice'\] names no slice for 1 spots"):
        cp.tl.spatial_graph(tissue, batch_key="slice")
    with pytest.raises(InputError, match=r"obsm has no 'X_stagate' \(it holds 'spatial'\): run"):
        cp.tl.spatial_domains(tissue, n=3)
    embedded(tissue)
    with pytest.raises(InputError, match="1 to 110 domains, one per spot; found n=111"):
        cp.tl.spatial_domains(tissue, n=111)
    with pytest.raises(InputError, match="unknown settings: epoch"):
        cp.tl.spatial_embed(tissue, epoch=3)
    tissue.X = tissue.X - sparse.csr_matrix(np.eye(*tissue.shape) * 50)
    for tool in (cp.tl.spatial_embed, cp.tl.spatial_niches):
        with pytest.raises(InputError, match="Counts and their logarithms are never negative"):
            tool(tissue, tissue_model)


def test_units_of_slices_must_be_the_same(tissue: AnnData) -> None:
    tissue.obs["slice"] = np.where(np.arange(SPOTS) < 50, "a", "b")
    tissue.obsm["spatial"][:50] *= 1_000
    with pytest.raises(InputError, match="bring all slices to the same unit"):
        cp.tl.spatial_embed(tissue, batch_key="slice")
