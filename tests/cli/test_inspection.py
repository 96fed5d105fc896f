"""``cellpatch inspect`` says what was looked at, what is doubtful, and which rows are spare."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest

from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary, cli
from cellpatch_fast.cli.inspection import describe

from ..conftest import MakeCells

HUMAN = GeneVocabulary.human()


@pytest.fixture
def path(tmp_path: Path, make_cells: MakeCells) -> Path:
    """211 cells, looked at in eight places, and the largest value elsewhere."""
    adata = make_cells()
    adata.X.data[adata.X.indptr[200]] = 7_919
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_the_largest_value_is_that_of_the_cells_looked_at(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert describe(path)["values"] == "integers up to 7,919: raw counts"
    monkeypatch.setattr("cellpatch_fast.loading.inputs.SAMPLE_CELLS", 96)
    values = describe(path)["values"]
    assert values.startswith("integers up to ")
    assert values.endswith(": raw counts (seen in 96 of 211 cells)")
    assert "7,919" not in values


def test_warnings_are_facts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = anndata.read_h5ad(path)
    adata.var["highly_variable"] = True
    adata.write_h5ad(path)
    facts = describe(path)
    assert len(facts["warnings"]) == 1
    assert "its 310 genes are a selection" in facts["warnings"][0]
    assert cli.main(["inspect", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "warnings: " in out


def test_no_warnings_are_no_fact(path: Path) -> None:
    assert "warnings" not in describe(path)


@pytest.mark.parametrize(
    ("chosen", "rows", "said"),
    [
        (slice(None, 307), 311, "311: row 0 for padding, 307 for genes, 3 spare (308 to 310) for"),
        (slice(None, 307), 308, "308: row 0 for padding, 307 for genes"),
        (slice(3, 307, 2), 308, "152 for genes, 155 spare (1 to 3, 5, 7, …) for genes"),
    ],
)
def test_rows_of_genes(tmp_path: Path, chosen: slice, rows: int, said: str) -> None:
    tokens = np.arange(1, len(HUMAN) + 1)
    vocabulary = GeneVocabulary(
        HUMAN.ensembl_ids[chosen], HUMAN.symbols[chosen], tokens[chosen].tolist()
    )
    model = CellPatch(CellPatchConfig(max_genes=rows, patches=2, dim=4, mlp_dim=5), vocabulary)
    model.save_pretrained(tmp_path / "model")
    assert said in describe(tmp_path / "model")["gene rows"]
