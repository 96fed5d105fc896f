"""Embed any number of cells: files in, one store out, resumable at any moment.

Cells are read once, in file order, in bounded memory; the rows of the result are those of the
inputs, one after the other. A cell's embedding depends on the cell alone, so shards, batches and
interruptions leave no trace in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..config import Reading
from ..inference.embedder import Embedder
from ..training.folder import warn_of_unfinished
from .making import KEY, make_store
from .selection import Selection
from .summary import Summary

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike

    from ..config import Expected
    from ..model import CellPatch
    from ..model.encoder import Pool


def embed(
    inputs: str | Path | Sequence[str | Path],
    model: CellPatch | str | Path,
    output: str | Path,
    *,
    layer: str | None = None,
    use_raw: bool = False,
    gene_column: str | None = None,
    input: Expected = "auto",  # noqa: A002  (the name users know)
    obs_query: str | None = None,
    rows: ArrayLike | None = None,
    pool: Pool = "flatten",
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int | None = None,
    backend: str | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Summary:
    """Embed the cells of files into an embedding store.

    Parameters
    ----------
    inputs
        AnnData files (``.h5ad``, ``.zarr``) or 10x output; their cells follow each other in the
        store. Of several inputs, ``obs["cellpatch_input"]`` says which a cell comes from; a
        column of obs that only some have is missing in the others.
    model
        A `CellPatch`, a model directory, or the name of a model on the Hugging Face hub.
    output
        The store to make: an AnnData Zarr store with ``obs`` and ``obsm["X_cellpatch"]``.
        Until it is complete it is called ``OUTPUT.partial``; running the same again finishes it.
    layer, use_raw, gene_column, input, pool, batch_size, backend, device, progress
        As in `tl.embed`.
    obs_query
        Embed only the cells whose row of obs it holds for, as `pandas.DataFrame.query` reads it:
        ``"tissue == 'blood' and n_genes > 200"``; ``index`` are the names of the cells. Of several
        inputs, each must have the columns.
    rows
        Embed only these cells: positions, counted from 0 through all inputs, ascending; or bool
        for each cell.
    dtype
        Of the stored embedding.
    overwrite
        Replace an embedding store at ``output`` once the new one is complete, and drop
        unfinished work that was begun with other settings. Anything else is never deleted.

    Returns
    -------
    Summary
        Counts and speed; its text is one line.

    Raises
    ------
    InputError
        If an input or the model cannot be used, a column or a row does not exist, the output
        exists, or unfinished work there was begun with other settings.
    OSError
        If the output cannot be written, a full disk for one. What is done is kept.

    Examples
    --------
    >>> cellpatch_fast.atlas.embed("atlas.h5ad", "my-model", "atlas.zarr")  # doctest: +SKIP
    >>> adata = anndata.read_zarr("atlas.zarr")  # doctest: +SKIP
    """
    reading = Reading(layer=layer, use_raw=use_raw, gene_column=gene_column, input=input)
    selection = Selection(obs_query, rows)
    warn_of_unfinished(model)
    embedder = Embedder(model, pooling=pool, batch_size=batch_size, backend=backend, device=device)
    widths = {KEY: embedder.width}
    return make_store(
        inputs,
        embedder,
        output,
        reading=reading,
        selection=selection,
        widths=widths,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
    )
