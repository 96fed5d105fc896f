"""What genes are called: in the human reference, in a file's ``var``, in the original's dict.

The bundled reference is CELLxGENE's gene table for GENCODE v38; the header of
data/human_genes.csv.gz and scripts/build_human_genes.py say where every column is from. It is read
in one go, into three tuples, because it is read at every start of the command line.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

from ..errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

#: Columns of ``var`` that usually hold gene names, tried after its index.
GENE_COLUMNS = (
    "gene_ids", "gene_id", "feature_id", "ensembl_id", "ensembl_ids", "ensembl_gene_id",
    "ensembl", "feature_name", "gene_symbols", "gene_symbol", "symbol", "symbols",
    "gene_names", "gene_name", "gene_short_name",
)  # fmt: skip

# an Ensembl gene ID of any species at the end of a name, with its version
ENSEMBL_NAME = re.compile(r"(?<![^_])(ENS[A-Z]*G\d{11})(?:\.\d+)?(?:_PAR_Y)?\Z", re.ASCII)


def split_name(name: str) -> tuple[str, str]:
    """``(Ensembl ID, symbol)`` of a gene name; what the name does not say is empty.

    >>> split_name("CD3D_ENSG00000167286.10")
    ('ENSG00000167286', 'CD3D')
    """
    match = ENSEMBL_NAME.search(name)
    return (match[1], name[: match.start()].removesuffix("_")) if match else ("", name)


class HumanGenes(NamedTuple):
    """The bundled human gene reference, one element per gene, in the order of the genome."""

    ensembl_ids: tuple[str, ...]
    symbols: tuple[str, ...]  # empty where a gene has none; several genes may share one
    biotypes: tuple[str, ...]  # GENCODE's gene_type; empty where it is not known


@cache
def human_genes() -> HumanGenes:
    """Read the bundled human gene reference."""
    packed = (files("cellpatch_fast") / "data" / "human_genes.csv.gz").read_bytes()
    text = gzip.decompress(packed).decode("ascii")
    _, _, genes = text.partition("ensembl_id,symbol,biotype\n")
    # no field is quoted; one flat list is four times as fast to make as 60,000 small ones
    fields = genes.rstrip("\n").replace("\n", ",").split(",")
    return HumanGenes(*(tuple(fields[column::3]) for column in range(3)))


def original_names(names: list[str]) -> tuple[list[str], list[str]]:
    """Ensembl IDs and symbols for the names in a ``gene2tok.json`` of the original code.

    Each name stays findable as it is written. A plain symbol gets its Ensembl ID from the human
    reference if exactly one gene has that symbol, there and in ``names``.
    """
    human = human_genes()
    uses = Counter(human.symbols)
    human_id = {s: e for s, e in zip(human.symbols, human.ensembl_ids, strict=True) if uses[s] == 1}
    parts = [split_name(name) for name in names]
    uses = Counter(symbol for _, symbol in parts)

    taken: set[str] = set()
    for gene, (ensembl_id, _) in enumerate(parts):
        if ensembl_id in taken:  # a second name for one gene: keep it apart, under this very name
            parts[gene] = ("", names[gene])
        elif ensembl_id:
            taken.add(ensembl_id)
    for gene, (ensembl_id, symbol) in enumerate(parts):
        translated = human_id.get(symbol, "")
        if not ensembl_id and uses[symbol] == 1 and translated not in taken:
            parts[gene] = (translated, symbol)
    return [ensembl_id for ensembl_id, _ in parts], [symbol for _, symbol in parts]


def var_names(var: pd.DataFrame, gene_column: str | None, path: str | Path) -> dict[str, list[str]]:
    """The lists of gene names that ``var`` offers, each under a description of its place.

    ``gene_column`` is a column, ``"index"``, or None for the index and all usual columns. Missing
    names are empty strings.
    """
    if not len(var):
        raise InputError(f"{path}: it has no genes (its var table is empty)")
    index = {"the var index": var.index}
    if gene_column is None:
        usual = {f"column {name!r}": var[name] for name in GENE_COLUMNS if name in var.columns}
        places = index | usual
    elif gene_column in var.columns:
        places = {f"column {gene_column!r}": var[gene_column]}
    elif gene_column in ("index", var.index.name):
        places = index
    else:
        raise InputError(f"{path}: var has no column {gene_column!r}; it has {var_columns(var)}")
    return {
        place: [
            "" if missing else str(name) for name, missing in zip(names, names.isna(), strict=True)
        ]
        for place, names in places.items()
    }


def var_columns(var: pd.DataFrame) -> str:
    """What can be chosen as ``gene_column``, for messages."""
    return ", ".join(["'index'", *(repr(column) for column in var.columns)])


def first_names(names: list[str]) -> str:
    """Three names as examples, for messages."""
    return ", ".join(repr(name) for name in names[:3]) + (", …" if len(names) > 3 else "")
