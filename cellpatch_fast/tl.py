"""Tools on AnnData, in scanpy's shape: they add to the object and return None."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import Reading
from .errors import InputError
from .inference.embedder import Embedder
from .inference.labels import label_column, most_likely, require_threshold
from .io.sources.memory import require_anndata
from .model.storage import fingerprint
from .progress import progress_bar
from .spatial.tools import spatial_domains, spatial_embed, spatial_graph, spatial_niches
from .training.folder import warn_of_unfinished

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

    from .config import Expected
    from .model import CellPatch, CellPatchAnnotator
    from .model.encoder import Pool

__all__ = [
    "annotate",
    "embed",
    "spatial_domains",
    "spatial_embed",
    "spatial_graph",
    "spatial_niches",
]

logger = logging.getLogger("cellpatch_fast")


def __dir__() -> list[str]:
    return __all__


def embed(
    adata: AnnData,
    model: CellPatch | str | Path,
    *,
    layer: str | None = None,
    use_raw: bool = False,
    gene_column: str | None = None,
    input: Expected = "auto",  # noqa: A002  (the name users know)
    key_added: str = "X_cellpatch",
    pool: Pool = "flatten",
    batch_size: int | None = None,
    backend: str | None = None,
    device: torch.device | str | None = None,
    copy: bool = False,
    progress: bool | None = None,
) -> AnnData | None:
    """Embed every cell of ``adata`` with a CellPatch model.

    Parameters
    ----------
    adata
        Cells x genes. Raw counts are best; log-normalised values are recognised.
    model
        A `CellPatch`, a model directory, or the name of a model on the Hugging Face hub.
    layer, use_raw
        Take this layer, or ``adata.raw``, instead of ``X``.
    gene_column
        Column of ``var`` with gene names (Ensembl IDs or symbols); None finds the best.
    input
        What the matrix holds: ``"counts"``, ``"lognorm"``, or ``"auto"`` to find out.
    key_added
        Where in ``adata.obsm`` the embedding goes.
    pool
        ``"flatten"``: all patch features side by side, patches x output_dim numbers per cell.
        ``"mean"``: their mean.
    batch_size
        Cells per batch at most. It changes memory and speed, never the result.
    backend
        ``"reference"``, ``"numba"`` or ``"triton"``; None for the fastest.
    device
        Where to compute; None for a GPU if there is one, or where the model is if it is an object
        already.
    copy
        Return a copy instead of changing ``adata``.
    progress
        Show a progress bar; None for only on a terminal.

    Returns
    -------
    AnnData or None
        With ``copy`` a changed copy. Sets ``obsm[key_added]``, float32 [cells, width], and
        ``uns[key_added]["params"]``: what it depends on (the model by its fingerprint), and
        counts of genes and of empty cells. After an error ``adata`` is as it was.

    Raises
    ------
    InputError
        If ``adata`` is no AnnData object or a view of one in a file, no gene matches, values are
        negative or not finite, or the matrix is not usable.

    Examples
    --------
    >>> cellpatch_fast.tl.embed(adata, "my-model")  # doctest: +SKIP
    >>> scanpy.pp.neighbors(adata, use_rep="X_cellpatch")  # doctest: +SKIP
    """
    _require_object(adata, "embed", copy)
    if not key_added:
        raise InputError("key_added is empty: name the embedding in obsm")
    warn_of_unfinished(model)
    embedder = Embedder(model, pooling=pool, batch_size=batch_size, backend=backend, device=device)
    reading = Reading(layer=layer, use_raw=use_raw, gene_column=gene_column, input=input)
    computed = _compute(embedder, adata, reading, "embedding", progress)
    if copy:
        adata = _copy(adata)
    _add(adata, {key_added: computed.features}, {}, key_added, computed.params)
    logger.info(
        "added obsm[%r]: %s cells x %d (%s)",
        key_added,
        f"{len(computed.features):,}",
        computed.features.shape[1],
        str(computed),
    )
    return adata if copy else None


def annotate(
    adata: AnnData,
    model: CellPatchAnnotator | str | Path,
    *,
    threshold: float = 0.0,
    layer: str | None = None,
    use_raw: bool = False,
    gene_column: str | None = None,
    input: Expected = "auto",  # noqa: A002  (the name users know)
    key_added: str = "cellpatch",
    pool: Pool = "flatten",
    batch_size: int | None = None,
    backend: str | None = None,
    device: torch.device | str | None = None,
    copy: bool = False,
    progress: bool | None = None,
) -> AnnData | None:
    """Annotate every cell of ``adata`` with a cell type.

    Parameters
    ----------
    adata
        Cells x genes. Raw counts are best; log-normalised values are recognised.
    model
        A `CellPatchAnnotator`, its directory, or its name on the Hugging Face hub.
    threshold
        A cell whose type has a lower probability is ``"unknown"``.
    key_added
        What the names of all that is added begin with.
    layer, use_raw, gene_column, input, pool, batch_size, backend, device, copy, progress
        As in `embed`.

    Returns
    -------
    AnnData or None
        With ``copy`` a changed copy. Sets ``obs["<key>_label"]`` (categorical),
        ``obs["<key>_probability"]``, ``obsm["<key>_probabilities"]`` float32 [cells, classes],
        ``obsm["X_<key>"]``, the embedding, and ``uns["<key>"]``: the classes, in the order of the
        probabilities, and the parameters. After an error ``adata`` is as it was.

    Raises
    ------
    InputError
        If the model is no annotator, no gene matches, or the matrix is not usable.

    Examples
    --------
    >>> cellpatch_fast.tl.annotate(adata, "my-annotator")  # doctest: +SKIP
    >>> adata.obs["cellpatch_label"].value_counts()  # doctest: +SKIP
    """
    _require_object(adata, "annotate", copy)
    if not key_added:
        raise InputError("key_added is empty: name what is added")
    warn_of_unfinished(model)
    embedder = Embedder(
        model,
        pooling=pool,
        batch_size=batch_size,
        backend=backend,
        device=device,
        annotate=True,
    )
    assert embedder.annotator is not None
    classes = embedder.annotator.classes
    require_threshold(threshold, classes)
    reading = Reading(layer=layer, use_raw=use_raw, gene_column=gene_column, input=input)
    computed = _compute(embedder, adata, reading, "annotation", progress)
    assert computed.probabilities is not None
    codes, highest = most_likely(computed.probabilities, threshold)
    if copy:
        adata = _copy(adata)
    obsm = {
        f"X_{key_added}": computed.features,
        f"{key_added}_probabilities": computed.probabilities,
    }
    obs = {
        f"{key_added}_label": label_column(codes, classes),
        f"{key_added}_probability": highest,
    }
    params = computed.params | {"threshold": threshold}
    _add(adata, obsm, obs, key_added, params, classes=list(classes))
    logger.info(
        "added obs[%r] and obs[%r]: %s cells of %d classes (%s)",
        f"{key_added}_label",
        f"{key_added}_probability",
        f"{len(highest):,}",
        len(np.unique(codes)),
        str(computed),
    )
    return adata if copy else None


def _require_object(adata: AnnData, tool: str, copy: bool) -> None:
    """Refuse what nothing can be added to, before anything is computed."""
    if isinstance(adata, str | Path):
        raise InputError(
            f"tl.{tool} adds to an AnnData object, found the path {str(adata)!r}: read it first "
            f"(anndata.read_h5ad), or have cellpatch_fast.atlas.{tool} make a store of the file"
        )
    require_anndata(adata, f"tl.{tool} adds to an AnnData object")
    if adata.isbacked and adata.is_view and not copy:
        raise InputError(
            "adata is a view of an object that is backed by a file, and nothing can be added to "
            "such a view: pass copy=True, or adata.to_memory()"
        )


@dataclass(frozen=True, eq=False)
class _Computed:
    """What was computed of all cells; as text what was left out."""

    features: np.ndarray  # float32 [c, width]
    probabilities: np.ndarray | None  # float32 [c, classes]
    params: dict[str, Any]

    def __str__(self) -> str:
        empty, unknown = self.params["empty_cells"], self.params["unknown_entries"]
        return f"{empty:,} empty cells, {unknown:,} entries of unknown genes left out"


def _compute(
    embedder: Embedder,
    adata: AnnData,
    reading: Reading,
    what: str,
    progress: bool | None,
) -> _Computed:
    """Run every cell of ``adata`` through the embedder."""
    with contextlib.closing(embedder.open(adata, reading)) as stream:
        logger.info("%s", stream)
        features = np.empty((stream.n_cells, embedder.width), np.float32)
        probabilities = None
        if embedder.annotator is not None:
            probabilities = np.empty((stream.n_cells, len(embedder.annotator.classes)), np.float32)
        unknown = empty = 0
        with (
            progress_bar(stream.n_cells, what, progress) as bar,
            contextlib.closing(embedder.run([stream])) as batches,
        ):
            for cells in batches:
                features[cells.rows] = cells.features
                if probabilities is not None:
                    probabilities[cells.rows] = cells.probabilities
                unknown += int(cells.unknown_entries.sum())
                empty += int((cells.entries == 0).sum())
                bar.update(len(cells))
    params = {
        "model": fingerprint(embedder.model),
        **reading.record(),
        "input": stream.kind,
        "pool": embedder.pooling,
        "backend": embedder.backend,
        "device": embedder.device.type,
        "genes_matched": stream.genes_matched,
        "genes_unknown": stream.genes_unknown,
        "genes_duplicated": stream.genes_duplicated,
        "genes_ambiguous": stream.genes_ambiguous,
        "unknown_entries": unknown,
        "empty_cells": empty,
    }
    return _Computed(features, probabilities, params)


def _copy(adata: AnnData) -> AnnData:
    return adata.to_memory() if adata.isbacked else adata.copy()


def _add(
    adata: AnnData,
    obsm: Mapping[str, np.ndarray],
    obs: Mapping[str, Any],
    key: str,
    params: dict[str, Any],
    **others: Any,
) -> None:
    """Set ``obsm``, ``obs`` and ``uns[key]``; a view becomes an object of its own by that."""
    from anndata import ImplicitModificationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)  # it is what was asked for
        for name, rows in obsm.items():
            adata.obsm[name] = rows
        for name, column in obs.items():
            adata.obs[name] = column
        adata.uns[key] = {"params": params, **others}
