"""Whether the genes of a matrix are a selection of those that were measured.

Counts are normalised to the sum of a cell. Where variable genes were selected before, that is the
sum of these genes, and values come out several times too large: no value of the matrix shows it.
What does is said of the cells (their total counts), of the genes (all are marked as variable), or
which genes are missing: those of ribosomal proteins, in every cell and nearly all of the same
level, are in whole transcriptomes and hardly ever among the variable genes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from ..cells import CellBlock
    from ..genes import GeneVocabulary
    from ..genes.vocabulary import GeneMatch
    from ..io.sources.tables import Table

#: Columns of ``obs`` that hold the counts of a cell, as scanpy, Seurat, CELLxGENE and others write.
TOTALS = (
    "total_counts", "n_counts", "nCount_RNA", "nCount_Spatial", "raw_sum",
    "n_umis", "n_umi", "nUMI", "total_umis", "total_UMIs",
)  # fmt: skip
MORE = 1.3  # times the counts that there are: removed genes, and less is ambient RNA or a filter
SELECTIONS = range(500, 6_000)  # genes; panels have fewer, whole transcriptomes more
RIBOSOMAL = re.compile(r"RP[SL](\d+[AX]?|A|P\d)\Z", re.IGNORECASE)  # 77 human genes
FEWEST_RIBOSOMAL = 40  # of a vocabulary whose species is known to call them so


def selection_of_genes(
    var: pd.DataFrame,
    match: GeneMatch,
    vocabulary: GeneVocabulary,
    sample: CellBlock,
    obs: Table | None,
) -> str | None:
    """What shows that the genes are a selection, in words; None if nothing does.

    Parameters
    ----------
    var
        The gene table.
    match, vocabulary
        How its names were matched, and by what.
    sample
        Some cells of the matrix.
    obs
        The annotation of all cells, if the matrix holds counts.
    """
    return (
        _shown_by_mark(var)
        or _shown_by_names(match, vocabulary)
        or (None if obs is None else _shown_by_totals(obs, sample))
    )


def _shown_by_mark(var: pd.DataFrame) -> str | None:
    if "highly_variable" not in var:
        return None
    variable = var["highly_variable"].to_numpy()
    if variable.dtype != bool or not variable.all():
        return None
    return 'var["highly_variable"] marks them all'


def _shown_by_names(match: GeneMatch, vocabulary: GeneVocabulary) -> str | None:
    if match.matched not in SELECTIONS:
        return None
    ribosomal = [
        token
        for token, symbol in zip(vocabulary.tokens.tolist(), vocabulary.symbols, strict=True)
        if symbol[:2] in ("RP", "Rp") and RIBOSOMAL.match(symbol)
    ]
    present = int(np.isin(ribosomal, match.tokens).sum())
    if len(ribosomal) < FEWEST_RIBOSOMAL or 2 * present > len(ribosomal):
        return None
    return (
        f"of the {len(ribosomal)} genes of ribosomal proteins, which are in every whole "
        f"transcriptome, {present} are among them"
    )


def _shown_by_totals(obs: Table, sample: CellBlock) -> str | None:
    sums = np.concatenate([[0.0], np.cumsum(sample.data, dtype=np.float64)])[sample.indptr]
    sums = np.diff(sums)  # [c]
    filled = np.flatnonzero(sums > 0)
    cells = [sample.position(int(cell)) for cell in filled]
    for column in (name for name in TOTALS if name in obs.columns and len(cells)):
        totals = np.asarray(obs.values(column))
        if totals.dtype.kind not in "iuf":
            continue
        times = float(np.median(totals[cells] / sums[filled]))
        if times > MORE:
            return f'by obs["{column}"], cells have {times:.3g} times the counts that are in it'
    return None
