"""Spatial domains in scanpy's shape: functions that add to an AnnData object. See `cp.tl`.

cp.tl.spatial_graph(adata)            # obsp["spatial_connectivities"], obsp["spatial_distances"]
cp.tl.spatial_embed(adata, model)     # obsm["X_stagate"]
cp.tl.spatial_niches(adata, model)    # obsm["X_niche"]
cp.tl.spatial_domains(adata, n=7)     # obs["domain"], obs["domain_agreement"]
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from ..config import Reading
from ..errors import InputError
from ..model import CellPatch
from ..model.storage import fingerprint
from .choices import GraphKind, Method, Preset
from .domains import STARTS, Domains, by_size, find_domains, refine
from .embedding import embed_tissue
from .features import Components, as_written, cells_of, niche_features
from .graphs import (
    DISTANCES,
    NEIGHBOURS,
    PARAMETERS,
    SpatialGraph,
    coordinates_of,
    slices_of,
    store_graph,
)
from .graphs import spatial_graph as find_graph
from .settings import SpatialSettings

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

    from ..config import Expected

logger = logging.getLogger("cellpatch_fast")

NICHE_NEIGHBOURS = 18  # that a spot's patches attend to, where there is no graph: two rings


def spatial_graph(
    adata: AnnData,
    *,
    kind: GraphKind = "radius",
    radius: float | None = None,
    neighbours: int = NEIGHBOURS,
    batch_key: str | None = None,
    basis: str = "spatial",
    copy: bool = False,
) -> AnnData | None:
    """Find which spots are neighbours.

    Parameters
    ----------
    adata
        With coordinates in ``obsm[basis]``, in one unit for all slices.
    kind
        ``"radius"``, ``"nearest"`` or ``"grid"`` (Visium's, from ``obs["array_row"]`` and
        ``obs["array_col"]``); see `cellpatch_fast.spatial.graphs.spatial_graph`.
    radius
        None chooses one that gives a spot about ``neighbours`` neighbours.
    neighbours
        See ``radius``; for ``"nearest"`` the number of them.
    batch_key
        Column of ``obs`` with the slice or sample of each spot: no edge leads from one to another.
    basis
        Where the coordinates are.
    copy
        Return a copy instead of changing ``adata``.

    Returns
    -------
    AnnData or None
        With ``copy`` a changed copy. Sets ``obsp["spatial_connectivities"]``,
        ``obsp["spatial_distances"]`` and ``uns["spatial_neighbors"]``, as squidpy does.

    Raises
    ------
    InputError
        If coordinates are missing, not finite, or the same for two spots; if slices have different
        units; or no two spots are within the radius.
    """
    places = coordinates_of(adata, kind, basis)
    graph = find_graph(
        places, kind=kind, radius=radius, neighbours=neighbours, slices=slices_of(adata, batch_key)
    )
    logger.info("%s", graph)
    adata = adata.copy() if copy else adata
    store_graph(adata, graph, batch_key)
    return adata if copy else None


def spatial_embed(
    adata: AnnData,
    model: CellPatch | str | Path | None = None,
    *,
    preset: Preset = "default",
    layer: str | None = None,
    use_raw: bool = False,
    gene_column: str | None = None,
    input: Expected = "auto",  # noqa: A002  (the name users know)
    basis: str = "spatial",
    batch_key: str | None = None,
    key_added: str = "X_stagate",
    tile_spots: int | None = None,
    backend: str | None = None,
    device: torch.device | str | None = None,
    copy: bool = False,
    progress: bool | None = None,
    **settings: Any,
) -> AnnData | None:
    """Embed every spot among its neighbours by STAGATE; with a model, by its features too.

    Parameters
    ----------
    adata
        Spots x genes, raw counts, with coordinates in ``obsm[basis]``. The graph in ``obsp`` is
        used if there is one (`spatial_graph`), else made with its defaults.
    model
        A `CellPatch`, a model directory, or the name of a model on the Hugging Face hub, whose
        features are added to the expression; None for STAGATE alone.
    preset
        ``"default"``, ``"paper"`` or ``"original-code"``; see `SpatialSettings`.
    layer, use_raw, gene_column, input
        Which matrix, and what it holds; as of `cellpatch_fast.tl.embed`.
    basis, batch_key
        Coordinates, and the slice of each spot, as of `spatial_graph`.
    key_added
        Where in ``obsm`` the embedding goes.
    tile_spots
        Spots that are computed together at most: changes memory, and the result by rounding only.
    backend, device
        As of `cellpatch_fast.tl.embed`.
    copy
        Return a copy instead of changing ``adata``.
    progress
        Show a progress bar; None for only on a terminal.
    **settings
        Settings that shall differ from the preset's, such as ``epochs=300`` or ``seed=1``.

    Returns
    -------
    AnnData or None
        With ``copy`` a changed copy. Sets ``obsm[key_added]``, float32 [spots, 30], and
        ``uns[key_added]``: ``params`` and ``losses``.

    Raises
    ------
    InputError
        If the graph, the matrix, the model or a setting is not usable.

    Examples
    --------
    >>> cellpatch_fast.tl.spatial_embed(adata, "my-model")  # doctest: +SKIP
    >>> cellpatch_fast.tl.spatial_domains(adata, n=7)  # doctest: +SKIP
    """
    chosen = SpatialSettings.preset(preset, **settings)
    adata = adata.copy() if copy else adata
    graph = _graph_of(adata, basis, batch_key)
    if model is not None and not isinstance(model, CellPatch):
        model = CellPatch.from_pretrained(model)
    embedding = embed_tissue(
        adata, coordinates_of(adata, "radius", basis), graph, model,
        settings=chosen, tile_spots=tile_spots, backend=backend, device=device, progress=progress,
        reading=Reading(layer=layer, use_raw=use_raw, gene_column=gene_column, input=input),
    )  # fmt: skip
    params = embedding.params | {"preset": preset, **graph.params()}
    adata.obsm[key_added] = embedding.rows
    adata.uns[key_added] = {
        "params": {name: value for name, value in params.items() if value is not None},
        "losses": np.array(embedding.losses),
    }
    logger.info(
        "added obsm[%r]: %s spots x %d, loss %.4g after %d epochs",
        *(key_added, f"{adata.n_obs:,}", embedding.rows.shape[1]),
        *(embedding.losses[-1], len(embedding.losses)),
    )
    return adata if copy else None


def spatial_niches(
    adata: AnnData,
    model: CellPatch | str | Path,
    *,
    sigma: float | None = None,
    neighbours: int = NICHE_NEIGHBOURS,
    components: int = 30,
    layer: str | None = None,
    use_raw: bool = False,
    gene_column: str | None = None,
    input: Expected = "auto",  # noqa: A002  (the name users know)
    basis: str = "spatial",
    batch_key: str | None = None,
    key_added: str = "X_niche",
    backend: str | None = None,
    copy: bool = False,
    progress: bool | None = None,
) -> AnnData | None:
    """Embed every spot's niche: patches attend to the genes of a spot and of its neighbours.

    Nothing is trained: it takes seconds.

    Parameters
    ----------
    adata
        Spots x genes, raw counts, with coordinates in ``obsm[basis]``.
    model
        A `CellPatch`, a model directory, or the name of a model on the Hugging Face hub.
    sigma
        Distance at which a neighbour's gene weighs 0.61 of the spot's own; None for the mean
        distance of neighbours.
    neighbours
        The nearest spots that a spot attends to.
    components
        Principal components that features are reduced to; 0 keeps all.
    layer, use_raw, gene_column, input
        Which matrix, and what it holds; as of `cellpatch_fast.tl.embed`.
    basis, batch_key
        As of `spatial_graph`.
    key_added
        Where in ``obsm`` the embedding goes.
    backend, copy, progress
        As of `spatial_embed`.

    Returns
    -------
    AnnData or None
        With ``copy`` a changed copy. Sets ``obsm[key_added]``, float32 [spots, components], and
        ``uns[key_added]["params"]``.
    """
    adata = adata.copy() if copy else adata
    if not isinstance(model, CellPatch):
        model = CellPatch.from_pretrained(model)
    places = coordinates_of(adata, "nearest", basis)
    slices = slices_of(adata, batch_key)
    graph = find_graph(places, kind="nearest", neighbours=neighbours, slices=slices)
    reading = Reading(layer=layer, use_raw=use_raw, gene_column=gene_column, input=input)
    seen = as_written(adata, model, reading)
    cells = cells_of(adata, seen, reading)
    rows = niche_features(cells, seen, graph, sigma=sigma, backend=backend, progress=progress)
    if components:
        rows = Components(rows, components)(rows)
    adata.obsm[key_added] = rows
    adata.uns[key_added] = {
        "params": {
            "model": fingerprint(model),
            "sigma": float(graph.distances.data.mean()) if sigma is None else sigma,
            **graph.params(),
        }
    }
    logger.info("added obsm[%r]: %s spots x %d", key_added, f"{len(rows):,}", rows.shape[1])
    return adata if copy else None


def spatial_domains(
    adata: AnnData,
    n: int | None = None,
    *,
    method: Method = "mixture",
    use_rep: str = "X_stagate",
    refined: bool = False,
    starts: int = STARTS,
    basis: str = "spatial",
    key_added: str = "domain",
    seed: int = 0,
    copy: bool = False,
    progress: bool | None = None,
) -> AnnData | None:
    """Group spots into domains by their embedding.

    Parameters
    ----------
    adata
        With ``obsm[use_rep]``, from `spatial_embed`, say.
    n
        Number of domains; None takes the number, of 3 to 15, at which random starts agree best.
    method
        ``"mixture"``: the most likely of ``starts`` Gaussian mixtures with a common covariance (as
        mclust's EEE). ``"leiden"``: communities of the graph of nearest embeddings. ``"mclust"``:
        R's own, where R is installed.
    refined
        Give each spot the domain that most of its 50 nearest spots have.
    seed
        Of the starts.
    key_added
        What the names of all that is added begin with.

    Returns
    -------
    AnnData or None
        With ``copy`` a changed copy. Sets ``obs[key_added]`` (categorical, "1" the most frequent),
        for a mixture ``obs[key_added + "_agreement"]``: the share of starts that put the spot into
        the same domain, and ``uns[key_added]``: ``params``, the starts' likelihoods and how far
        they agree with the kept one (adjusted Rand index). Low agreement means that the domains
        are a matter of chance.

    Raises
    ------
    InputError
        If the embedding is missing or not finite, or there are fewer spots than domains.
    """
    import pandas as pd

    if use_rep not in adata.obsm:
        others = ", ".join(map(repr, adata.obsm)) or "nothing"
        raise InputError(
            f"obsm has no {use_rep!r} (it holds {others}): run cellpatch_fast.tl.spatial_embed"
        )
    rows = np.asarray(adata.obsm[use_rep])
    domains = find_domains(rows, n, method=method, starts=starts, seed=seed, progress=progress)
    labels = domains.labels
    adata = adata.copy() if copy else adata
    if refined:
        places = coordinates_of(adata, "radius", basis)
        labels = by_size(refine(labels, places, _graph_of(adata, basis)))
    names = [str(code + 1) for code in range(int(labels.max()) + 1)]
    adata.obs[key_added] = pd.Categorical.from_codes(labels, names)
    agreement = f"{key_added}_agreement"
    if domains.spot_agreement is not None:
        adata.obs[agreement] = domains.spot_agreement
    elif agreement in adata.obs:  # of domains that were found before
        del adata.obs[agreement]
    adata.uns[key_added] = _record(domains, use_rep, refined, seed)
    logger.info("added obs[%r]: %s", key_added, domains)
    return adata if copy else None


def _record(domains: Domains, use_rep: str, refined: bool, seed: int) -> dict[str, Any]:
    """What ``uns`` keeps of how domains were found."""
    record: dict[str, Any] = {
        "params": {"method": domains.method, "use_rep": use_rep, "refined": refined, "seed": seed}
    }
    if domains.agreement is not None:
        record["agreement"] = domains.agreement
    for name, table in (("starts", domains.starts), ("numbers", domains.numbers)):
        if table is not None:
            record[name] = {column: table[column].to_numpy() for column in table}
    return record


def _graph_of(adata: AnnData, basis: str, batch_key: str | None = None) -> SpatialGraph:
    """The object's graph, which is added where there is none."""
    if DISTANCES not in adata.obsp:
        spatial_graph(adata, basis=basis, batch_key=batch_key)
    distances = sparse.csr_matrix(adata.obsp[DISTANCES])
    params = adata.uns.get(PARAMETERS, {}).get("params", {})
    key = params.get("batch_key", batch_key)
    slices = slices_of(adata, None if key is None else str(key))
    codes = np.zeros(adata.n_obs, np.int64)
    if slices is not None:
        codes = np.unique(slices.astype(str), return_inverse=True)[1]
    return SpatialGraph(distances, params.get("kind", "radius"), params.get("radius"), codes)
