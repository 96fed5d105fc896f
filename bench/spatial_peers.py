"""Other packages for spatial domains: rows of the benchmark where they are installed.

`stagate-modern` (with `torch_geometric`) and `nichepca`; neither is needed by anything else.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from bench.spatial_data import Tissue
    from bench.spatial_methods import Recipe

UPSTREAM = "stagate-modern"
NICHEPCA = "nichepca"
IMPORTED = {UPSTREAM: "STAGATE_pyG", NICHEPCA: "nichepca"}


def spatial_net(tissue: Tissue) -> pd.DataFrame:
    """Our graph in the form that STAGATE's code takes."""
    edges = tissue.graph.distances.tocoo()
    names = tissue.spots.obs_names
    return pd.DataFrame(
        {"Cell1": names[edges.row], "Cell2": names[edges.col], "Distance": edges.data}
    )


def upstream(tissue: Tissue, seed: int, recipe: Recipe) -> np.ndarray:
    """stagate-modern on the same expression and graph, with its own settings but for epochs."""
    import STAGATE_pyG

    from bench.spatial_methods import logged

    spots = anndata.AnnData(logged(tissue), obs=tissue.spots.obs[[]].copy())
    spots.uns["Spatial_Net"] = spatial_net(tissue)
    STAGATE_pyG.train_STAGATE(spots, n_epochs=recipe.epochs, random_seed=seed, verbose=False)
    return np.asarray(spots.obsm["STAGATE"])


def nichepca(tissue: Tissue, seed: int, recipe: Recipe) -> np.ndarray:
    """nichepca with its defaults: expression averaged over 18 nearest spots, 30 components."""
    import nichepca as package

    from bench.spatial_data import SMOOTHING

    spots = anndata.AnnData(tissue.spots.X.copy(), var=tissue.spots.var[[]].copy())
    spots.obsm["spatial"] = tissue.places
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        package.wf.nichepca(spots, knn=SMOOTHING)
    return np.asarray(spots.obsm["X_npca"], np.float64)


def installed() -> dict[str, Callable[[Any, int, Any], np.ndarray]]:
    """Those that can be imported."""
    methods = {UPSTREAM: upstream, NICHEPCA: nichepca}
    return {name: embed for name, embed in methods.items() if _there(IMPORTED[name])}


def _there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
