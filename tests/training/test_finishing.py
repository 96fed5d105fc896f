"""The end of fine-tuning: linear models, calibration, their mixture, and the test of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

from cellpatch_fast import CellLoader, CellPatchAnnotator, GeneVocabulary, RaggedCells, tl
from cellpatch_fast.training import Finetuned, expression, finetune
from cellpatch_fast.training.calibration import mixture_shares, temperature
from cellpatch_fast.training.finishing import PRIOR
from cellpatch_fast.training.folder import read_settings
from cellpatch_fast.training.linear import SEEN_C, VALUES_C, fit

from .conftest import assert_same_run, stream_of

Start = Callable[..., tuple[Path, Finetuned]]
RESULTS = ("metrics.json", "linear_metrics.json", "per_class.csv", "test_predictions.csv")
SIZES: dict[str, Any] = {"patches": 5, "dim": 14, "heads": 2, "mlp_dim": 11}
SIZES |= {"self_attention_blocks": 1, "projection_dim": 3}


@pytest.fixture(scope="session")
def fine_tuned(
    labelled: anndata.AnnData, small_vocabulary: GeneVocabulary,
    tmp_path_factory: pytest.TempPathFactory,
) -> Start:  # fmt: skip
    """``fine_tuned(folder, **options)``: a new model of few cells, two epochs."""

    def run(folder: Path | None = None, **options: Any) -> tuple[Path, Finetuned]:
        folder = folder or tmp_path_factory.mktemp("runs") / "annotator"
        settings = {"epochs": 2, "test": 0.2, "validation": 0.2} | options.pop("settings", {})
        given: dict[str, Any] = {"data": labelled, "few_cells": True, "label": "type"}
        given |= {"vocabulary": small_vocabulary, "add_genes": False}
        given |= {"config": SIZES | {"max_genes": small_vocabulary.size}} | options
        return folder, finetune(output=folder, settings=settings, **given)

    return run


@pytest.fixture(scope="session")
def whole(fine_tuned: Start) -> tuple[Path, Finetuned]:
    return fine_tuned()


def test_results_are_of_the_annotator_and_of_linear_models_alone(
    whole: tuple[Path, Finetuned],
) -> None:
    folder, done = whole
    assert done.test is not None
    assert done.linear is not None
    for name, evaluation in (("metrics.json", done.test), ("linear_metrics.json", done.linear)):
        found = json.loads((folder / name).read_text())
        assert found == json.loads(json.dumps(evaluation.metrics()))
        assert found["accuracy"] > 0.85
    assert done.test.cells == done.linear.cells == len(predictions_of(folder))
    settings = read_settings(folder)["settings"]
    assert settings["linear"]
    assert settings["spectral"]


def predictions_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "test_predictions.csv")


@pytest.mark.parametrize("linear", [True, False])
def test_annotating_gives_the_numbers_of_the_test(
    fine_tuned: Start, whole: tuple[Path, Finetuned], labelled: anndata.AnnData, linear: bool
) -> None:
    folder, _ = whole if linear else fine_tuned(settings={"linear": False})
    predictions, adata = predictions_of(folder), labelled.copy()
    tl.annotate(adata, folder)
    chosen = adata.obs.iloc[predictions["row"].to_numpy()]
    assert list(chosen["cellpatch_label"]) == list(predictions["predicted"])
    assert list(chosen["type"]) == list(predictions["truth"])
    assert np.array_equal(chosen["cellpatch_probability"], predictions["probability"].astype("f4"))
    model = CellPatchAnnotator.from_pretrained(folder)
    assert (model.linear is not None) == linear
    if not linear:  # the baseline is evaluated all the same
        assert (folder / "linear_metrics.json").exists()


def parts_of(folder: Path, adata: anndata.AnnData) -> dict[str, np.ndarray]:
    """Rows of the parts that the run was split into."""
    from cellpatch_fast.training import FinetuningSettings
    from cellpatch_fast.training.data import Labels, split_labelled

    categories = pd.Categorical(adata.obs["type"])
    settings = read_settings(folder)["settings"]
    chosen = FinetuningSettings(**{name: settings[name] for name in ("test", "validation", "seed")})
    labels = Labels(tuple(categories.categories), categories.codes.astype(np.int64), 0, {})
    rows = split_labelled(labels, chosen)
    assert list(rows["test"]) == list(predictions_of(folder)["row"])
    return rows


def cells_of(adata: anndata.AnnData, model: CellPatchAnnotator, rows: np.ndarray) -> RaggedCells:
    with CellLoader(adata, model.vocabulary, model.config, rows=rows, batch_size=256) as loader:
        return next(iter(loader)).cells


def test_validation_cells_decide_on_temperature_and_shares_and_then_are_trained_on(
    whole: tuple[Path, Finetuned], labelled: anndata.AnnData
) -> None:
    """All of it done here once more, from the saved network."""
    folder, _ = whole
    model, rows = CellPatchAnnotator.from_pretrained(folder), parts_of(folder, labelled)
    known = np.sort(np.concatenate([rows["training"], rows["validation"]]))
    codes = pd.Categorical(labelled.obs["type"]).codes.astype(np.int64)
    with stream_of(labelled, model.vocabulary, model.config) as stream:
        values = expression.gather([stream], known, model.config.max_genes, seed=0).values
    trained = np.isin(known, rows["training"])
    first = fit(values[trained], codes[rows["training"]], 3, seed=0)
    penalties = first.values.penalty, first.seen.penalty
    assert penalties[0] in VALUES_C
    assert penalties[1] in SEEN_C
    last = fit(values, codes[known], 3, 0, penalties, first.seen.exponent)
    path = model.linear
    assert path is not None
    saved = path.values.clone(), path.seen.clone()
    validation = cells_of(labelled, model, rows["validation"])
    first.load_into(path, path.shares.numpy())
    with torch.inference_mode():
        members = [*path.logits(validation).numpy(), model.logits(validation).numpy()]
    true = codes[rows["validation"]]
    found = [temperature(logits, true) for logits in members]
    assert model.config.temperature == pytest.approx(found[2], rel=1e-4)
    for table, of, divisor in zip(saved, (last.values, last.seen), found, strict=False):
        torch.testing.assert_close(
            table.double(), torch.from_numpy(of.weights / divisor), rtol=1e-4, atol=1e-7
        )
    likely = [
        softmax(x / t, axis=1)[np.arange(len(true)), true]
        for x, t in zip(members, found, strict=True)
    ]
    assert path.shares.numpy() == pytest.approx(mixture_shares(np.stack(likely), PRIOR), abs=1e-4)


@pytest.mark.parametrize("place", ["_combine", "_test", "_test_linear"])
def test_runs_interrupted_here_end_with_the_same_bits(
    fine_tuned: Start, whole: tuple[Path, Finetuned], tmp_path: Path, place: str
) -> None:
    """Before and after the annotator was completed; and done once more when all is there."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"cellpatch_fast.training.finishing.{place}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fine_tuned(tmp_path / "run")
    for _ in range(2):
        _, done = fine_tuned(tmp_path / "run")
        assert_same_run(tmp_path / "run", whole[0])
        for name in RESULTS:
            assert (tmp_path / "run" / name).read_bytes() == (whole[0] / name).read_bytes(), name
        for one, other in ((done.test, whole[1].test), (done.linear, whole[1].linear)):
            assert one is not None
            assert other is not None
            assert one.metrics() == other.metrics()


def test_without_validation_cells_shares_are_the_prior_s_and_that_is_said(
    fine_tuned: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "cellpatch_fast"):
        folder, done = fine_tuned(settings={"validation": 0.0})
    model = CellPatchAnnotator.from_pretrained(folder)
    assert model.config.temperature == 1.0
    assert model.linear is not None
    assert model.linear.shares.numpy() == pytest.approx(np.array(PRIOR) / sum(PRIOR), abs=1e-7)
    assert re.search(r"40 % from a linear .* 40 % from one .* 20 % .*; default", caplog.text)
    assert done.test is not None
    assert done.test.accuracy > 0.85


def test_without_test_cells_there_is_an_annotator_but_no_result(fine_tuned: Start) -> None:
    folder, done = fine_tuned(settings={"test": 0.0, "epochs": 1})
    assert done.test is None
    assert done.linear is None
    assert not [name for name in RESULTS if (folder / name).exists()]
    model = CellPatchAnnotator.from_pretrained(folder)
    assert model.linear is not None
    assert model.linear.values.any()
    assert float(model.linear.shares[0]) > 0.1


def test_a_column_without_validation_cells_keeps_some_training_cells_apart(
    fine_tuned: Start, labelled: anndata.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    """The share of settings, of each class; test cells are the column's."""
    adata = labelled.copy()
    adata.obs["part"] = np.where(np.arange(147) < 101, "train", "test")
    with caplog.at_level("INFO", "cellpatch_fast"):
        folder, done = fine_tuned(data=adata, split_column="part", settings={"epochs": 1})
    counts = np.bincount(pd.Categorical(adata.obs["type"]).codes[:101])
    kept = sum(max(1, int(0.2 * count)) for count in counts)
    assert f"{101 - kept} cells to train on, {kept} to validate, 46 to test" in caplog.text
    assert list(predictions_of(folder)["row"]) == list(range(101, 147))
    assert f"chosen by {kept} validation cells" in caplog.text
    assert done.history.best["validation_accuracy"] > 0


def test_a_class_that_a_sample_misses_can_be_saved_and_loaded(
    fine_tuned: Start, labelled: anndata.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory holds a sample of cells only, the linear models may see none of a rare class."""
    adata = labelled.copy()
    types = adata.obs["type"].astype(str).to_numpy(copy=True)
    types[[3, 5, 7, 11, 13]] = "rare"
    adata.obs["type"] = types
    entries = int((adata.X > 0).sum())
    monkeypatch.setattr(expression, "MOST_ENTRIES", entries // 10)
    folder, _ = fine_tuned(data=adata, settings={"epochs": 1, "spectral": False, "seed": 4})
    model = CellPatchAnnotator.from_pretrained(folder)
    assert model.linear is not None
    missing = ~model.linear.values.any(dim=0)
    assert missing.tolist() == [False, False, False, True]
    assert (model.linear.bias[:, 3] < -1e3).all()  # -1e4, divided by a temperature
    tl.annotate(adata, model)
    assert np.isfinite(adata.obsm["cellpatch_probabilities"]).all()
