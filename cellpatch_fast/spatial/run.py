"""From a file of spots to a folder of domains, tables and figures: what ``cellpatch spatial`` does.

::

    OUTPUT/
        spatial.h5ad     obs, coordinates, graph, embedding and domains; no expression
        domains.csv      the domain of every spot, and how far random starts agree on it
        starts.csv       likelihood of every start, and its agreement with the kept one
        numbers.csv      agreement and BIC of every number of domains, where none was given
        domains.png …    what is known and what was found
        paga.png …       UMAP of the embedding, and which domains are connected
        run/             settings, losses and checkpoint of the network

A tissue that is too large for memory is read from its file in blocks; obs and coordinates are read
whole. After an interruption the same call goes on.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import Reading
from ..devices import default_device, usable_device
from ..errors import InputError
from ..files import made_whole, write_whole
from ..io.stores.partial import LOCK
from ..model import CellPatch
from ..training.folder import held
from . import pictures, tools
from .choices import GraphKind, Method, Preset
from .domains import require_possible
from .embedding import SCRATCH, embed_tissue, require_model
from .graphs import coordinates_of, slices_of, spatial_graph, store_graph
from .settings import SpatialSettings

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

logger = logging.getLogger("cellpatch_fast")

RUN, TABLE = "run", "spatial.h5ad"
ADDED = ("domain", "domain_agreement")  # to obs
RESULTS = (
    TABLE, "domains.csv", "starts.csv", "numbers.csv",
    "domains.png", "domains.svg", "paga.png", "paga.svg",
)  # fmt: skip
UNFINISHED = r"\..+\.\d+\.unfinished"  # see `files`
PARTS = ("obs", "obsm", "uns")  # of a file, that are read without its expression


@dataclass(frozen=True, eq=False)
class SpatialRun:
    """What was made.

    Parameters
    ----------
    spots
        AnnData without expression: obs, obsm, obsp, uns.
    score
        Adjusted Rand index with the annotated layers, of the spots that have one; None without.
    """

    spots: AnnData
    score: float | None

    def __str__(self) -> str:
        agreement = self.spots.uns["domain"].get("agreement")
        text = f"{self.spots.n_obs:,} spots in {self.spots.obs['domain'].nunique()} domains"
        if agreement is not None:
            text += f", random starts agree to {agreement:.2f}"
        return text if self.score is None else f"{text}; ARI with the annotation {self.score:.3f}"


def spatial_run(
    data: str | Path,
    output: str | Path,
    model: CellPatch | str | Path | None = None,
    *,
    domains: int | None = None,
    method: Method = "mixture",
    refined: bool = False,
    truth: str | None = None,
    preset: Preset = "default",
    kind: GraphKind = "radius",
    radius: float | None = None,
    batch_key: str | None = None,
    basis: str = "spatial",
    reading: Reading = Reading(),
    tile_spots: int | None = None,
    overwrite: bool = False,
    backend: str | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> SpatialRun:
    """Find the domains of a tissue.

    Parameters
    ----------
    data
        An .h5ad file, or AnnData .zarr, with coordinates in ``obsm[basis]``.
    output
        The folder to make; see the module for what it holds.
    model
        Whose features are added to the expression; None for STAGATE alone.
    domains
        How many; None takes the number at which random starts agree best.
    truth
        Column of obs with annotated layers, to compare with; spots without one do not count.
    method, refined
        As of `cellpatch_fast.tl.spatial_domains`.
    preset, tile_spots, **settings
        As of `cellpatch_fast.tl.spatial_embed`.
    kind, radius, batch_key, basis
        As of `cellpatch_fast.tl.spatial_graph`.

    Raises
    ------
    InputError
        If the input is not usable, or ``output`` holds something else.
    """
    chosen = SpatialSettings.preset(preset, **settings)
    require_model(chosen, model is not None)
    target = default_device() if device is None else usable_device(device)
    data, output = Path(data), Path(output)
    spots = read_spots(data)
    require_possible(spots.n_obs, domains, method)
    if truth is not None:
        _require_truth(spots, truth, data)
    graph = spatial_graph(
        coordinates_of(spots, kind, basis),
        kind=kind, radius=radius, slices=slices_of(spots, batch_key),
    )  # fmt: skip
    logger.info("%s: %s", data, graph)
    store_graph(spots, graph, batch_key)
    if model is not None and not isinstance(model, CellPatch):
        model = CellPatch.from_pretrained(model)
    with _held(output):
        embedding = embed_tissue(
            data, coordinates_of(spots, "radius", basis), graph, model,
            settings=chosen, reading=reading, tile_spots=tile_spots, folder=output / RUN,
            overwrite=overwrite, backend=backend, device=target, progress=progress,
        )  # fmt: skip
        spots.obsm["X_stagate"] = embedding.rows
        params = {name: value for name, value in embedding.params.items() if value is not None}
        spots.uns["X_stagate"] = {"params": params, "losses": np.array(embedding.losses)}
        tools.spatial_domains(
            spots, domains, method=method, refined=refined, basis=basis,
            seed=chosen.seed, progress=progress,
        )  # fmt: skip
        _write(spots, output, truth, basis, batch_key)
    return SpatialRun(spots, None if truth is None else score(spots, truth))


def score(spots: AnnData, truth: str) -> float:
    """Adjusted Rand index of the domains with annotated layers, over spots that have one."""
    from sklearn.metrics import adjusted_rand_score

    column, known = spots.obs[truth], _labelled(spots, truth)
    return float(adjusted_rand_score(column[known].astype(str), spots.obs["domain"][known]))


def _labelled(spots: AnnData, truth: str) -> np.ndarray:
    """bool [spots]: those that have a layer."""
    column = spots.obs[truth]
    labelled: np.ndarray = (column.notna() & (column.astype(str) != "nan")).to_numpy()
    return labelled


def _require_truth(spots: AnnData, truth: str, data: Path) -> None:
    """Refuse a column that domains cannot be compared with."""
    if truth not in spots.obs:
        raise InputError(f"{data}: obs has no column {truth!r} (it has {', '.join(spots.obs)})")
    if truth in ADDED:
        raise InputError(
            f"{data}: {truth!r} is where the domains that are found go: give the column with "
            "annotated layers another name"
        )
    if not _labelled(spots, truth).any():
        raise InputError(f"{data}: obs[{truth!r}] names no layer of any spot")


def read_spots(path: Path) -> AnnData:
    """An AnnData file without its expression: obs, obsm and uns.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    import anndata
    import h5py
    import zarr

    if not path.exists():
        raise InputError(f"{path} does not exist")
    try:
        if path.is_dir() or path.suffix == ".zip":
            group: Any = zarr.open_group(path, mode="r")
            parts = {name: anndata.io.read_elem(group[name]) for name in PARTS if name in group}
        else:
            with h5py.File(path) as file:
                parts = {name: anndata.io.read_elem(file[name]) for name in PARTS if name in file}
    except Exception as error:  # of any type: what a file holds is not known
        raise InputError(
            f"{path} cannot be read as AnnData ({error}): spatial data are read from .h5ad and "
            "AnnData .zarr, with coordinates in obsm; convert others with scanpy or spatialdata-io"
        ) from error
    if "obs" not in parts:
        raise InputError(f"{path} has no obs: it is no AnnData file")
    return anndata.AnnData(**parts)


@contextlib.contextmanager
def _held(output: Path) -> Iterator[None]:
    """The folder of the results, held by this process, without what a killed one has left.

    Raises
    ------
    InputError
        If it holds other things, or another process writes there.
    """
    if output.is_file():
        raise InputError(f"{output} is a file: choose a folder for the results")
    others = output.is_dir() and [
        path for path in output.iterdir() if path.name != LOCK and not _is_left(path)
    ]
    if others and not (output / RUN).is_dir():
        raise InputError(f"{output} holds other things than a spatial run: choose another output")
    with held(output):
        for path in filter(_is_left, list(output.iterdir())):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def _is_left(path: Path) -> bool:
    """Whether a killed run has left it: tiles of a tissue, or a file in the making."""
    return path.name.startswith(SCRATCH) or re.fullmatch(UNFINISHED, path.name) is not None


def _write(
    spots: AnnData, output: Path, truth: str | None, basis: str, batch_key: str | None
) -> None:
    """All files, each of them whole, and none of other domains."""
    import pandas as pd

    for name in RESULTS:
        (output / name).unlink(missing_ok=True)
    with made_whole(output / TABLE) as unfinished:
        spots.write_h5ad(unfinished)
    columns = [name for name in ADDED if name in spots.obs]
    write_whole(output / "domains.csv", spots.obs[columns].to_csv(index_label="spot"))
    record = spots.uns["domain"]
    for name in ("starts", "numbers"):
        if name in record:
            write_whole(output / f"{name}.csv", pd.DataFrame(record[name]).to_csv(index=False))
    pictures.spatial_domains(
        spots, truth=truth, basis=basis, batch_key=batch_key, save=output / "domains"
    )
    if spots.obs["domain"].nunique() > 1:
        pictures.spatial_paga(spots, save=output / "paga")
