"""`atlas.annotate`: what cannot be compared is refused before work; some cells instead of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

import cellpatch_fast as cp
from cellpatch_fast import CellPatch, CellPatchAnnotator, InputError
from cellpatch_fast.errors import InputWarning
from cellpatch_fast.inference.embedder import Embedder

CLASSES = ["c", "a", "b"]  # as obs["kind"] has them


def annotator(model: CellPatch, classes: list[str]) -> CellPatchAnnotator:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return CellPatchAnnotator.from_encoder(model, classes).eval()


@pytest.mark.parametrize("options", [{"threshold": 0.3}, {"label": "kind"}])
def test_a_class_called_unknown_is_refused_before_any_cell(
    cells_file: Path,
    small_model: CellPatch,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    model = annotator(small_model, ["a", "unknown", "b"])
    with monkeypatch.context() as patch:
        patch.delattr(Embedder, "run")  # an AttributeError if a cell is computed
        with pytest.raises(InputError, match=r"a class 'unknown'.*without --threshold and --label"):
            cp.atlas.annotate(cells_file, model, output, **options)
    assert list(output.parent.iterdir()) == [cells_file]
    cp.atlas.annotate(cells_file, model, output)
    assert "unknown" in anndata.read_zarr(output).obs["cellpatch_label"].cat.categories


def test_warnings_point_at_the_line_that_annotates(
    cells_file: Path, small_model: CellPatch, output: Path
) -> None:
    with pytest.warns(InputWarning, match="not among the model's classes") as caught:
        cp.atlas.annotate(cells_file, annotator(small_model, ["a", "b"]), output, label="kind")
    ours = [warning for warning in caught if warning.category is InputWarning]
    assert [warning.filename for warning in ours] == [__file__]


def test_a_choice_of_cells_is_annotated_and_compared(
    cells_file: Path, small_model: CellPatch, output: Path, tmp_path: Path
) -> None:
    model = annotator(small_model, CLASSES)
    whole = cp.atlas.annotate(cells_file, model, tmp_path / "all.zarr", label="kind")
    every = anndata.read_zarr(tmp_path / "all.zarr")
    done = cp.atlas.annotate(cells_file, model, output, label="kind", obs_query="depth < 0.4")
    part = anndata.read_zarr(output)
    chosen = np.flatnonzero(every.obs["depth"] < 0.4)
    for name in ("X_cellpatch", "cellpatch_probabilities"):
        assert np.array_equal(part.obsm[name], every.obsm[name][chosen])
    assert (
        part.obs["cellpatch_label"].tolist() == every.obs["cellpatch_label"].iloc[chosen].tolist()
    )
    assert done.evaluation is not None
    assert whole.evaluation is not None
    assert done.evaluation.cells == len(chosen) < whole.evaluation.cells == every.n_obs
    right = every.obs["kind"].astype(str) == every.obs["cellpatch_label"].astype(str)
    assert done.evaluation.accuracy == pytest.approx(right.to_numpy()[chosen].mean())
