"""Tools on AnnData, in scanpy's shape: they add to the object and return None."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .embedding import Embedder
from .io.sources import open_source
from .loader import CellStream
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
    expected: Expected = "auto",
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
    expected
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
        ``uns[key_added]["params"]``.

    Raises
    ------
    InputError
        If no gene matches, values are negative or not finite, or the matrix is not usable.

    Examples
    --------
    >>> cellpatch_fast.tl.embed(adata, "my-model")  # doctest: +SKIP
    >>> scanpy.pp.neighbors(adata, use_rep="X_cellpatch")  # doctest: +SKIP
    """
    adata = adata.copy() if copy else adata
    embedder = Embedder(model, pooling=pool, batch_size=batch_size, backend=backend, device=device)
    with open_source(adata, layer=layer, use_raw=use_raw) as source:
        stream = CellStream(
            source,
            embedder.model.vocabulary,
            embedder.model.config,
            gene_column=gene_column,
            expected=expected,
        )
        logger.info("%s: %s; %s", source.name, stream.match, stream.detected.reason)
        rows = np.empty((source.n_cells, embedder.width), np.float32)
        empty = 0
        with progress_bar(source.n_cells, "embedding", progress) as bar:
            for block in embedder.run([(stream, 0, source.n_cells)]):
                rows[block.start : block.start + len(block.rows)] = block.rows
                empty += block.empty_cells
                bar.update(len(block.rows))
    adata.obsm[key_added] = rows
    adata.uns[key_added] = {
        "params": {
            "model": _name(model),
            "pool": pool,
            "layer": layer or "",
            "use_raw": use_raw,
            "input": stream.detected.kind,
            "backend": embedder.backend,
            "genes_matched": stream.match.matched,
            "genes_unknown": len(stream.match.unknown),
            "empty_cells": empty,
        }
    }
    logger.info("added obsm[%r]: %d cells x %d (%d empty cells)", key_added, *rows.shape, empty)
    return adata if copy else None


def _name(model: CellPatch | str | Path) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__
