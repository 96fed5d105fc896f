"""The expression that a network on a tissue learns from: variable genes, normalised, logged.

As in STAGATE's tutorials: the most variable genes (``seurat_v3``, on counts), library sizes of all
genes brought to 1e4, log1p, then the variable genes alone. Zeros stay zeros, so the matrix stays
sparse. It is read in blocks, and what a large file holds goes to disk (8 bytes per entry of a
variable gene), so memory holds a block and, per spot, its offset.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from scipy import sparse

from ..config import Reading
from ..errors import InputError
from ..io.sources.source import CellSource, open_source
from ..loading.inputs import detect_in, sample_of
from ..preprocessing.blocks import invalid_entry, readable_block

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from ..cells import CellBlock

logger = logging.getLogger("cellpatch_fast")

CHOOSING_SPOTS = 50_000  # that variable genes are chosen from, in stretches over all of them
STRETCHES = 50
FEWEST_VARYING = 12  # genes, whose variances a curve can be drawn through


class SpotExpression:
    """Normalised and logged expression of the chosen genes.

    Parameters
    ----------
    matrix
        CSR float32 [spots, genes]; its arrays may lie on disk.
    var
        The input's annotation of these genes; its index holds their names.
    """

    def __init__(self, matrix: sparse.csr_matrix, var: pd.DataFrame) -> None:
        self.matrix, self.var = matrix, var

    @property
    def genes(self) -> pd.Index:
        """Names of the genes."""
        return self.var.index


def read_expression(
    data: str | Path | AnnData,
    *,
    variable_genes: int,
    target_sum: float,
    reading: Reading = Reading(),
    folder: Path | None = None,
) -> SpotExpression:
    """Read, choose genes, normalise and log.

    Parameters
    ----------
    data
        Spots x genes: counts; or log-normalised values, if no genes are to be chosen.
    variable_genes
        Most genes to take; all are taken where there are no more.
    target_sum
        Library size after normalisation.
    reading
        Which matrix, and what it holds.
    folder
        Where to keep the matrix; None keeps it in memory.

    Raises
    ------
    InputError
        If the matrix cannot be read, holds what no counts are, or genes are to be chosen from
        logged values; or scikit-misc, which that needs, is missing.
    """
    with open_source(data, layer=reading.layer, use_raw=reading.use_raw) as source:
        detected = detect_in(source, sample_of(source), reading.input, target_sum)
        logged = detected.kind == "lognorm"
        chosen = np.arange(source.n_genes)
        if source.n_genes > variable_genes:
            if logged:
                raise InputError(
                    f"{source.name}: the {variable_genes:,} most variable of {source.n_genes:,} "
                    f"genes are chosen by counts, but found {detected.reason}. Name a layer with "
                    "counts (layer=), or take all genes (variable_genes=)"
                )
            chosen = _most_variable(source, variable_genes)
        logger.info("%s: %s; %s genes", source.name, detected.reason, f"{len(chosen):,}")
        kept = _Columns(source, chosen, None if logged else target_sum)
        matrix = _in_memory(source, kept) if folder is None else _on_disk(source, kept, folder)
        if not matrix.nnz:
            raise InputError(f"{source.name}: the chosen genes are expressed by no spot")
        return SpotExpression(matrix, source.var.iloc[chosen])


class _Columns:
    """Cuts the chosen genes out of a block, normalised by all of its genes."""

    def __init__(self, source: CellSource, chosen: np.ndarray, target_sum: float | None) -> None:
        self._source, self._chosen, self._target = source, chosen, target_sum
        self._genes = source.n_genes

    def of(self, block: CellBlock) -> sparse.csr_matrix:
        """CSR float32 [spots of the block, chosen genes]."""
        rows = _matrix_of(block, self._source)
        if self._target is not None:
            sizes = np.asarray(rows.sum(axis=1)).ravel()
            sizes[sizes == 0] = 1.0  # an empty spot stays empty
            rows.data *= np.repeat(self._target / sizes, np.diff(rows.indptr))
            np.log1p(rows.data, out=rows.data)
        if len(self._chosen) < self._genes:
            rows = rows[:, self._chosen]
        rows.eliminate_zeros()
        rows.sort_indices()
        return rows.astype(np.float32)


def _matrix_of(block: CellBlock, source: CellSource) -> sparse.csr_matrix:
    """CSR float64 [spots of the block, genes], of finite numbers that are not negative."""
    block = readable_block(block, source.name)
    wrong = np.flatnonzero(~((block.data >= 0) & (block.data < np.inf)))
    if len(wrong):
        raise invalid_entry(block, int(wrong[0]), source.name, source.var.index)
    rows = sparse.csr_matrix(
        (block.data.astype(np.float64), block.indices, block.indptr),
        shape=(len(block), source.n_genes), copy=True,
    )  # fmt: skip
    rows.sum_duplicates()
    return rows


def _in_memory(source: CellSource, kept: _Columns) -> sparse.csr_matrix:
    return sparse.vstack([kept.of(block) for block in source.read_cells()], format="csr")


def _on_disk(source: CellSource, kept: _Columns, folder: Path) -> sparse.csr_matrix:
    """A matrix whose entries are files that are mapped into memory."""
    offsets = [np.zeros(1, np.int64)]
    columns, values = folder / "columns", folder / "values"
    width = 0
    with columns.open("wb") as to_columns, values.open("wb") as to_values:
        for rows in map(kept.of, source.read_cells()):
            _append(to_columns, rows.indices.astype(np.int32))
            _append(to_values, rows.data)
            offsets.append(rows.indptr[1:].astype(np.int64) + offsets[-1][-1])
            width = rows.shape[1]
    indptr = np.concatenate(offsets)
    if not indptr[-1]:  # an empty file cannot be mapped
        return sparse.csr_matrix((len(indptr) - 1, width), dtype=np.float32)
    return sparse.csr_matrix(
        (np.memmap(values, np.float32, "r"), np.memmap(columns, np.int32, "r"), indptr),
        shape=(len(indptr) - 1, width),
    )


def _append(file: IO[bytes], array: np.ndarray) -> None:
    file.write(np.ascontiguousarray(array).tobytes())


def _most_variable(source: CellSource, count: int) -> np.ndarray:
    """Columns of the most variable genes, ascending; by a sample where there are many spots."""
    try:
        import scanpy
        import skmisc  # noqa: F401
    except ImportError as error:
        raise InputError(
            "choosing variable genes needs scanpy and scikit-misc: "
            "pip install 'cellpatch-fast[spatial]'"
        ) from error
    from anndata import AnnData

    sample = AnnData(sparse.vstack(list(_sample(source)), format="csr"))
    if sample.n_obs < source.n_cells:
        logger.info(
            "variable genes are chosen from %s of %s spots",
            *(f"{spots:,}" for spots in (sample.n_obs, source.n_cells)),
        )
    _require_varying(sample.X, source.name)
    try:
        scanpy.pp.highly_variable_genes(
            sample, n_top_genes=count, flavor="seurat_v3", check_values=False
        )
    except ValueError as error:  # of the curve that is drawn through all variances
        raise _not_ranked(source.name, str(error)) from error
    return np.flatnonzero(sample.var["highly_variable"])


def _require_varying(counts: sparse.csr_matrix, name: str) -> None:
    """Refuse too few genes for a curve through their variances, which ends the process."""
    means = np.asarray(counts.mean(axis=0)).ravel()
    squares = np.asarray(counts.multiply(counts).mean(axis=0)).ravel()
    varying = int((squares > means**2 * (1 + 1e-6)).sum())
    if varying < FEWEST_VARYING:
        raise _not_ranked(name, f"only {varying} genes vary between spots")


def _not_ranked(name: str, reason: str) -> InputError:
    return InputError(
        f"{name}: the most variable genes cannot be told ({reason}): take all genes "
        "(variable_genes=, --variable-genes)"
    )


def _sample(source: CellSource) -> Iterator[sparse.csr_matrix]:
    ranges = [(0, source.n_cells)]
    if source.n_cells > CHOOSING_SPOTS:
        length = CHOOSING_SPOTS // STRETCHES
        starts = np.linspace(0, source.n_cells - length, STRETCHES).astype(int)
        ranges = [(int(start), int(start) + length) for start in starts]
    for block in source.read_cells(ranges):
        yield _matrix_of(block, source).astype(np.float32)
