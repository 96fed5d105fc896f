"""Tools on AnnData, in scanpy's shape: they add to the object and return None."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .embedding import Embedder
from .errors import InputError
from .model.storage import fingerprint
from .progress import progress_bar

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

    from .detect import Expected
    from .model import CellPatch
    from .model.encoder import Pool

logger = logging.getLogger("cellpatch_fast")


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
        Where to compute; None for where the model is.
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
        If no gene matches, values are negative or not finite, or the matrix is not usable.

    Examples
    --------
    >>> cellpatch_fast.tl.embed(adata, "my-model")  # doctest: +SKIP
    >>> scanpy.pp.neighbors(adata, use_rep="X_cellpatch")  # doctest: +SKIP
    """
    if not key_added:
        raise InputError("key_added is empty: name the embedding in obsm")
    embedder = Embedder(model, pooling=pool, batch_size=batch_size, backend=backend, device=device)
    options: dict[str, Any] = {"layer": layer, "use_raw": use_raw}
    options |= {"gene_column": gene_column, "input": input}
    with contextlib.closing(embedder.open(adata, **options)) as stream:
        logger.info("%s", stream)
        rows = np.empty((stream.n_cells, embedder.width), np.float32)
        unknown = empty = 0
        with (
            progress_bar(stream.n_cells, "embedding", progress) as bar,
            contextlib.closing(embedder.run([stream])) as batches,
        ):
            for cells in batches:
                rows[cells.rows] = cells.features
                unknown += int(cells.unknown_entries.sum())
                empty += int((cells.entries == 0).sum())
                bar.update(len(cells))
    params = {
        "model": fingerprint(embedder.model),
        "layer": layer or "",
        "use_raw": use_raw,
        "gene_column": gene_column or "",
        "input": stream.kind,
        "pool": pool,
        "backend": embedder.backend,
        "device": embedder.device.type,
        "genes_matched": stream.genes_matched,
        "genes_unknown": stream.genes_unknown,
        "unknown_entries": unknown,
        "empty_cells": empty,
    }
    if copy:
        adata = adata.to_memory() if adata.isbacked else adata.copy()
    _add(adata, key_added, rows, params)
    logger.info(
        "added obsm[%r]: %s cells x %d (%s empty cells, %s entries of unknown genes left out)",
        *(key_added, f"{len(rows):,}", rows.shape[1], f"{empty:,}", f"{unknown:,}"),
    )
    return adata if copy else None


def _add(adata: AnnData, key: str, rows: np.ndarray, params: dict[str, object]) -> None:
    """Set ``obsm[key]`` and ``uns[key]``; a view becomes an object of its own by that."""
    from anndata import ImplicitModificationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)  # it is what was asked for
        adata.obsm[key] = rows
        adata.uns[key] = {"params": params}
