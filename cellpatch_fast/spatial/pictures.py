"""Pictures of a tissue in an AnnData object: domains in place, and as a graph; see `pl`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..plots.figures import finish
from ..plots.scatter import import_scanpy, labels_of, umap_of
from ..plots.spatial import Image, draw_graph, draw_tissue, match_labels, side_by_side
from .graphs import slices_of

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure


def spatial_domains(
    adata: AnnData,
    *,
    domains: str | Sequence[str] = "domain",
    truth: str | None = None,
    basis: str = "spatial",
    batch_key: str | None = None,
    image: str | bool = True,
    save: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """Draw domains where the spots lie: what is known and what was found side by side.

    A domain has the colour of the true layer that it matches best (Hungarian method), so that what
    differs between panels is what was found otherwise.

    Parameters
    ----------
    adata
        With coordinates in ``obsm[basis]``.
    domains
        Column of ``adata.obs``, or several, from `cellpatch_fast.tl.spatial_domains`.
    truth
        Column of ``adata.obs`` with annotated layers; None for none.
    basis
        Where the coordinates are.
    batch_key
        Column of ``adata.obs`` with the slice of each spot: slices are drawn side by side.
    image
        Draw the picture of the tissue below one slice, where ``uns["spatial"]`` has one, as Space
        Ranger's readers store it; the name of a library chooses one of several.
    save, show
        As of `embedding`.

    Raises
    ------
    InputError
        If coordinates or a column are missing.
    """
    names = [domains] if isinstance(domains, str) else list(domains)
    for name in (*names, *([] if truth is None else [truth])):
        _require_column(adata, name)
    if basis not in adata.obsm:
        raise InputError(f"adata.obsm lacks {basis!r}, where coordinates of spots belong")
    panels = {name: labels_of(adata.obs[name]) for name in names}
    if truth is not None:
        annotated = labels_of(adata.obs[truth])
        panels = {n: labels.map(match_labels(labels, annotated)) for n, labels in panels.items()}
        panels = {truth: annotated} | panels
    places, picture = np.asarray(adata.obsm[basis], np.float64)[:, :2], _image_of(adata, image)
    if (slices := slices_of(adata, batch_key)) is not None:
        places, picture = side_by_side(places, slices), None
    figure = draw_tissue(places, panels, image=picture, show=show)
    return finish(figure, save, show)


def spatial_paga(
    adata: AnnData,
    *,
    domains: str = "domain",
    use_rep: str = "X_stagate",
    seed: int = 0,
    save: str | Path | None = None,
    show: bool = False,
) -> Figure:
    """Draw the embedding's UMAP, and beside it which domains are connected (PAGA).

    Parameters
    ----------
    adata
        With ``obsm[use_rep]``; it is not changed.
    domains
        Column of ``adata.obs``.
    use_rep
        The embedding, of which 15 nearest neighbours make the graph.
    seed
        Of UMAP.
    save, show
        As of `embedding`.

    Raises
    ------
    InputError
        If the embedding or the column is missing, or there are fewer than two domains.
    """
    from anndata import AnnData

    _require_column(adata, domains)
    labels = labels_of(adata.obs[domains])
    order = sorted(labels.unique(), key=lambda name: (len(name), name))
    if len(order) < 2:
        raise InputError(f"adata.obs[{domains!r}] has {len(order)} domain: a graph needs two")
    points = umap_of(adata, use_rep, seed)
    scanpy = import_scanpy()
    spots = AnnData(obs=labels.astype("category").to_frame(), obsm={use_rep: adata.obsm[use_rep]})
    scanpy.pp.neighbors(spots, use_rep=use_rep, random_state=seed)
    scanpy.tl.paga(spots, groups=domains)
    place = [list(spots.obs[domains].cat.categories).index(name) for name in order]
    connectivities = spots.uns["paga"]["connectivities"].toarray()[np.ix_(place, place)]
    return finish(draw_graph(points, labels, connectivities, order, show=show), save, show)


def _require_column(adata: AnnData, name: str) -> None:
    if name not in adata.obs:
        raise InputError(
            f"adata.obs lacks {name!r}; it has {', '.join(map(repr, adata.obs)) or 'no column'}"
        )


def _image_of(adata: AnnData, wanted: str | bool) -> Image | None:
    """The picture of a tissue, the larger one; None if there is none or it is not wanted."""
    libraries = adata.uns.get("spatial", {})
    if wanted is False or not libraries:
        return None
    if isinstance(wanted, str) and wanted not in libraries:
        raise InputError(
            f"uns['spatial'] has no library {wanted!r}; it has {', '.join(map(repr, libraries))}"
        )
    library = libraries[wanted if isinstance(wanted, str) else next(iter(libraries))]
    for size in ("hires", "lowres"):
        if size in library.get("images", {}):
            scale = library["scalefactors"][f"tissue_{size}_scalef"]
            return Image(np.asarray(library["images"][size]), float(scale))
    return None
