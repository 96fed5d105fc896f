"""Preprocess AnnData objects: `quality_control`, `normalize`, `tokenize`.

None of this is needed to embed cells: `cellpatch_fast.tl.embed` takes raw counts as they are.
These functions are for looking at what a model gets to see, and for analyses beside it. The
first two are scanpy's functions with the paper's settings, and guarded: a matrix that is already
logged is refused instead of logged again.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from .cells import RaggedCells
from .config import CellPatchConfig, Expected, Reading
from .errors import InputError
from .genes import GeneVocabulary
from .io.sources.memory import require_anndata
from .io.sources.source import open_source
from .loading import CellLoader
from .loading.inputs import detect_in, open_stream, sample_of

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

__all__ = ["normalize", "quality_control", "tokenize"]


def __dir__() -> list[str]:
    return __all__


# Of a batch: large enough that what one costs does not show.
BATCH_CELLS, BATCH_ENTRIES = 8_192, 1 << 20

log = logging.getLogger("cellpatch_fast")


def quality_control(
    adata: AnnData,
    *,
    min_genes: int | None = None,
    min_cells: int | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Remove cells with few genes, then genes in few cells.

    Parameters
    ----------
    adata
        Cells x genes, counts in X.
    min_genes
        Least number of expressed genes of a cell that stays; None keeps all cells.
    min_cells
        Least number of cells that express a gene that stays; None keeps all genes.
    copy
        Leave ``adata`` alone and return a filtered copy.

    Returns
    -------
    AnnData or None
        The copy if ``copy``; else None, and ``adata`` is filtered. Adds ``obs["n_genes"]`` and
        ``var["n_cells"]``, as scanpy does.
    """
    require_anndata(adata, "pp.quality_control filters an AnnData object")
    scanpy = _import_scanpy()
    adata = adata.copy() if copy else adata
    cells, genes = adata.shape
    if min_genes is not None:
        scanpy.pp.filter_cells(adata, min_genes=min_genes)
    if min_cells is not None:
        scanpy.pp.filter_genes(adata, min_cells=min_cells)
    log.info(
        "quality control kept %s of %s cells and %s of %s genes",
        f"{adata.n_obs:,}",
        f"{cells:,}",
        f"{adata.n_vars:,}",
        f"{genes:,}",
    )
    return adata if copy else None


def normalize(
    adata: AnnData,
    *,
    target_sum: float = 1e4,
    layer: str | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Normalise each cell to one library size, then log1p.

    Parameters
    ----------
    adata
        Cells x genes.
    target_sum
        Library size after normalisation.
    layer
        The layer to normalise; X by default.
    key_added
        Layer that receives the result; by default it replaces the matrix that was read.
    copy
        Leave ``adata`` alone and return a copy.

    Returns
    -------
    AnnData or None
        The copy if ``copy``; else None, and ``adata`` has changed. Like scanpy, notes the
        logarithm in ``uns["log1p"]``.

    Raises
    ------
    InputError
        If the matrix is already logged, or holds negative, infinite or missing values (two
        thousand cells are looked at), or the layer does not exist.
    """
    require_anndata(adata, "pp.normalize changes an AnnData object")
    with open_source(adata, layer=layer) as source:
        detected = detect_in(source, sample_of(source), "auto", target_sum)
    place = "X" if layer is None else f"layer {layer!r}"
    if detected.kind == "lognorm":
        raise InputError(
            f"AnnData object: {place} is already logged: found {detected.reason}. Choose the raw "
            "counts with layer."
        )
    scanpy = _import_scanpy()
    adata = adata.copy() if copy else adata
    if key_added is not None:
        adata.layers[key_added] = (adata.X if layer is None else adata.layers[layer]).copy()
        layer = key_added
    scanpy.pp.normalize_total(adata, target_sum=target_sum, layer=layer)
    scanpy.pp.log1p(adata, layer=layer)
    target = "X" if layer is None else f"layers[{layer!r}]"
    log.info(
        "%s: found %s; normalised to %s and logged in %s",
        place,
        detected.reason,
        f"{target_sum:,.7g}",
        target,
    )
    return adata if copy else None


def tokenize(
    adata: AnnData | str | Path,
    vocabulary: GeneVocabulary | None = None,
    config: CellPatchConfig | None = None,
    *,
    layer: str | None = None,
    use_raw: bool = False,
    gene_column: str | None = None,
    input: Expected = "auto",  # noqa: A002  (the name users know)
) -> RaggedCells:
    """The cells as a model gets to see them: gene tokens and preprocessed values.

    All cells at once, 3 bytes per entry for the paper's discrete values.

    Parameters
    ----------
    adata
        Cells x genes, or the path of a file that holds them.
    vocabulary
        The model's genes; the bundled human reference by default.
    config
        The model's configuration; the paper's by default.
    layer, use_raw
        Which matrix: a layer, or ``raw.X``; X by default.
    gene_column
        Column of var with gene names; by default the one with most known names.
    input
        What the matrix holds: ``"counts"``, ``"lognorm"``, or ``"auto"`` to find out.

    Returns
    -------
    RaggedCells
        One cell per row, in the order of the rows; offsets int64 [cells + 1], genes uint16 or
        int32 [entries], values uint8 (discrete) or float32 (continuous) [entries].

    Raises
    ------
    InputError
        If there is no such matrix or column, no gene is known, values are negative, infinite or
        missing, or the matrix is not what ``input`` says.
    """
    vocabulary = GeneVocabulary.human() if vocabulary is None else vocabulary
    config = CellPatchConfig() if config is None else config
    reading = Reading(layer=layer, use_raw=use_raw, gene_column=gene_column, input=input)
    with contextlib.closing(open_stream(adata, vocabulary, config, reading)) as stream:
        loader = CellLoader([stream], batch_size=BATCH_CELLS, max_entries=BATCH_ENTRIES)
        batches = list(loader)
    cells = RaggedCells.concatenate([batch.cells for batch in batches])
    empty = sum(int((batch.entries == 0).sum()) for batch in batches)
    unknown = sum(int(batch.unknown_entries.sum()) for batch in batches)
    log.info(
        "%s; %s cells (%s empty), %s entries (%s of unknown genes left out)",
        stream,
        f"{len(cells):,}",
        f"{empty:,}",
        f"{cells.entries:,}",
        f"{unknown:,}",
    )
    return cells


def _import_scanpy() -> Any:
    try:
        import scanpy
    except ImportError as error:
        raise ImportError(
            "this function needs scanpy: pip install 'cellpatch-fast[analysis]'"
        ) from error
    return scanpy
