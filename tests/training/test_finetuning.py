"""Fine-tuning: what is learnt, what is left out and said, and annotation by what was learnt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from cellpatch_fast import (
    CellPatch,
    CellPatchAnnotator,
    CellPatchConfig,
    GeneVocabulary,
    InputError,
    RaggedCells,
    atlas,
    cli,
    tl,
)
from cellpatch_fast.errors import InputWarning
from cellpatch_fast.training import Finetuned, FinetuningSettings, data, finetune

from .conftest import assert_same_run, untimed, weights

Settings = Callable[..., FinetuningSettings]
Finetune = Callable[..., Finetuned]


@pytest.fixture(scope="session")
def start(
    file: Path, config: CellPatchConfig, small_vocabulary: GeneVocabulary
) -> Callable[..., Finetuned]:
    """``start(folder, settings, …)``: fine-tunes a new model."""

    def run(folder: Path, settings: FinetuningSettings, **options: Any) -> Finetuned:
        if "model" not in options:
            options = {"config": config, "vocabulary": small_vocabulary, **options}
        options = {"data": file, "label": "type", **options}
        return finetune(options.pop("data"), folder, settings=settings, **options)

    return run


@pytest.fixture(scope="session")
def annotator(start: Finetune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finetuned]:
    """The folder and the result of a whole run."""
    folder = tmp_path_factory.mktemp("runs") / "annotator"
    settings = FinetuningSettings(epochs=15, batch_size=16, learning_rate=3e-3, test=0.2)
    return folder, start(folder, settings)


def test_types_that_differ_are_told_apart(annotator: tuple[Path, Finetuned]) -> None:
    folder, done = annotator
    assert done.test is not None
    assert done.test.accuracy > 0.85
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["accuracy"] == done.test.accuracy
    assert metrics["macro_f1"] == done.test.macro_f1
    for name in (
        *("per_class.csv", "confusion.csv", "confusion.png", "confusion.svg", "classes.json"),
        *("training_curves.png", "training_curves.svg", "training.json", "checkpoint.pt"),
    ):
        assert (folder / name).stat().st_size, name
    rows = untimed(folder / "epochs.csv")
    scores = [float(r["validation_accuracy"]) + float(r["validation_macro_f1"]) for r in rows]
    assert done.history.best_epoch == 1 + int(np.argmax(scores))


def test_test_predictions_are_those_of_tl_annotate(
    annotator: tuple[Path, Finetuned], labelled: anndata.AnnData
) -> None:
    folder, _ = annotator
    predictions = pd.read_csv(folder / "test_predictions.csv")
    adata = labelled.copy()
    tl.annotate(adata, folder)
    chosen = adata.obs.iloc[predictions["row"].to_numpy()]
    assert list(chosen["cellpatch_label"]) == list(predictions["predicted"])
    assert list(chosen["type"]) == list(predictions["truth"])
    assert np.array_equal(chosen["cellpatch_probability"], predictions["probability"].astype("f4"))
    assert adata.uns["cellpatch"]["classes"] == ["a", "b", "c"]
    assert adata.obsm["X_cellpatch"].shape == (147, 5 * 14)  # no projection
    assert np.allclose(adata.obsm["cellpatch_probabilities"].sum(axis=1), 1, atol=1e-6)


def test_a_cells_annotation_depends_on_that_cell_alone(
    annotator: tuple[Path, Finetuned], labelled: anndata.AnnData
) -> None:
    whole, part = labelled.copy(), labelled[np.r_[100:103, 7]].copy()
    tl.annotate(whole, annotator[0], batch_size=71)
    tl.annotate(part, annotator[0])
    for key in ("X_cellpatch", "cellpatch_probabilities"):
        assert np.array_equal(whole.obsm[key][np.r_[100:103, 7]], part.obsm[key])


def test_files_are_annotated_as_objects_are(
    annotator: tuple[Path, Finetuned],
    labelled: anndata.AnnData,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, store, report = annotator[0], tmp_path / "out.zarr", tmp_path / "report"
    expected = labelled.copy()
    tl.annotate(expected, folder, threshold=0.9)
    command = ["annotate", file, "--model", folder, "--output", store, "--threshold", 0.9]
    command += ["--label", "type", "--report", report]
    assert cli.main(list(map(str, command))) == 0
    out, _ = capsys.readouterr()
    assert "accuracy" in out
    assert json.loads((report / "metrics.json").read_text())["cells"] == 147
    found = anndata.read_zarr(store)
    for key in ("X_cellpatch", "cellpatch_probabilities"):
        assert np.array_equal(found.obsm[key], expected.obsm[key])
    for name in ("cellpatch_label", "cellpatch_probability", "type", "kind"):
        assert list(found.obs[name]) == list(expected.obs[name])
    assert "unknown" in set(found.obs["cellpatch_label"])
    assert list(found.obs["cellpatch_label"].cat.categories) == ["a", "b", "c", "unknown"]
    # again: complete already
    assert cli.main(list(map(str, command))) == 0
    assert "nothing to do" in capsys.readouterr().out
    atlas.annotate(file, folder, tmp_path / "labels.zarr", embedding=False)
    assert list(anndata.read_zarr(tmp_path / "labels.zarr").obsm) == ["cellpatch_probabilities"]


def test_labels_with_other_names_do_not_stop_an_annotation(
    annotator: tuple[Path, Finetuned], labelled: anndata.AnnData, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adata, file, report = labelled.copy(), tmp_path / "cells.h5ad", tmp_path / "report"
    adata.obs["type"] = adata.obs["type"].map({"a": "type A", "b": "type B", "c": "type C"})
    adata.write_h5ad(file)
    command = ["annotate", file, "--model", annotator[0], "--output", tmp_path / "out.zarr"]
    command += ["--label", "type", "--report", report]
    assert cli.main(list(map(str, command))) == 0
    out, err = capsys.readouterr()
    assert "no label is among the model's classes: no accuracy, no macro F1" in out
    assert "warning: 147 of 147 labelled cells have a label in obs['type'] that is not" in err
    assert list(anndata.read_zarr(tmp_path / "out.zarr").obs["type"]) == list(adata.obs["type"])
    confusion = pd.read_csv(report / "confusion.csv", index_col="truth")
    assert confusion.to_numpy().sum() == 147
    assert (report / "confusion.png").exists()

    (tmp_path / "map.csv").write_text("data,model\ntype A,a\ntype B,b\n")
    command += ["--label-map", tmp_path / "map.csv"]
    assert cli.main(list(map(str, command))) == 0
    out, err = capsys.readouterr()
    others = (adata.obs["type"] == "type C").sum()
    assert f"on {147 - others} of 147 labelled cells" in out
    assert f"warning: {others} of 147 labelled cells have" in err
    confusion = pd.read_csv(report / "confusion.csv", index_col="truth")
    assert list(confusion.index) == ["a", "b", "c", "type C"]
    everything = {"type A": "a", "type B": "b", "type C": "c"}
    options: dict[str, Any] = {"label": "type", "label_map": everything}
    done = atlas.annotate(file, annotator[0], tmp_path / "out.zarr", **options)
    assert done.evaluation is not None
    assert done.evaluation.cells == 147
    assert done.evaluation.accuracy == done.evaluation.overall_accuracy > 0.85


def test_the_model_of_an_unfinished_run_is_used_and_said_to_be_that(
    start: Finetune, finetuning: Settings, annotator: tuple[Path, Finetuned],
    labelled: anndata.AnnData, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, cells = tmp_path / "run", labelled[:5].copy()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the first epoch
        patch.setattr("cellpatch_fast.training.loop.describe_epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            start(run, finetuning(epochs=3))
    unfinished = f"{run} is the folder of a training run .* the best of 1 of 3 epochs"
    for use in (tl.annotate, tl.embed):
        with pytest.warns(InputWarning, match=unfinished):
            use(cells, run)
    for write in (atlas.annotate, atlas.embed):
        with pytest.warns(InputWarning, match=unfinished):
            write(file, run, tmp_path / f"{write.__name__}.zarr")
    (run / "checkpoint.pt").write_bytes(b"damaged")
    tl.annotate(cells, run)  # a warning would be an error
    tl.annotate(cells, annotator[0])


def test_annotators_are_models_like_any_other(annotator: tuple[Path, Finetuned]) -> None:
    """Saved, loaded, used as an encoder."""
    folder, _ = annotator
    model = CellPatchAnnotator.from_pretrained(folder)
    assert model.classes == ("a", "b", "c")
    encoder = CellPatch.from_pretrained(folder)
    cells = RaggedCells(torch.tensor([0, 2]), torch.tensor([3, 5]), torch.tensor([1.0, 2.0]))
    with torch.inference_mode():
        assert torch.equal(encoder.encode(cells), model.encode(cells))
        assert model(cells).shape == (1, 3)


def test_a_frozen_encoder_stays_as_it_is(
    start: Finetune, finetuning: Settings, annotator: tuple[Path, Finetuned], tmp_path: Path
) -> None:
    settings = finetuning(epochs=1, freeze_encoder=True, balance=True)
    start(tmp_path / "run", settings, model=annotator[0])
    before, after = weights(annotator[0]), weights(tmp_path / "run")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (not name.startswith("head.")), name


def test_64_cells_are_learnt_by_heart(
    start: Finetune, finetuning: Settings, labelled: anndata.AnnData, config: CellPatchConfig,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Nearly no loss is left."""
    settings = finetuning(
        epochs=40, batch_size=8, schedule="cosine", validation=0, test=0, weight_decay=0.0
    )
    config = replace(config, attention_dropout=0.0, head_dropout=0.0)
    done = start(tmp_path / "run", settings, data=labelled[:64].copy(), config=config)
    assert done.test is None
    assert float(untimed(tmp_path / "run" / "epochs.csv")[-1]["training_loss"]) < 0.02


def test_options_come_before_the_file_and_that_before_defaults(
    file: Path, small_vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    small_vocabulary.save(tmp_path / "vocabulary.json")
    content = {"model": {"patches": 3, "dim": 6}, "training": {"epochs": 9, "batch_size": 30}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    command = ["finetune", file, "--label", "type", "--output", tmp_path / "run", "--few-cells"]
    command += ["--config", tmp_path / "config.json", "--vocabulary", tmp_path / "vocabulary.json"]
    assert cli.main([str(word) for word in [*command, "--epochs", 1, "--balance"]]) == 0
    settings = json.loads((tmp_path / "run" / "training.json").read_text())["settings"]
    expected = {"epochs": 1, "batch_size": 30, "hidden": 0.5, "balance": True, "min_cells": 5}
    assert expected.items() <= settings.items()
    model = CellPatchAnnotator.from_pretrained(tmp_path / "run")
    assert (model.config.patches, model.config.value_rounding) == (3, "none")


def test_interrupted_runs_go_on(
    start: Finetune, finetuning: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all that is missing is the test."""
    settings = finetuning(epochs=2)
    whole = start(tmp_path / "whole", settings)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cellpatch_fast.training.finishing._test", interrupt)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "part", settings)
    again = start(tmp_path / "part", settings)
    assert_same_run(tmp_path / "part", tmp_path / "whole")
    assert again.test is not None
    assert whole.test is not None
    assert again.test.metrics() == whole.test.metrics()


def test_cells_without_a_label_and_rare_types_are_left_out_and_reported(
    start: Finetune, finetuning: Settings, labelled: anndata.AnnData, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    adata = labelled.copy()
    labels = adata.obs["type"].astype(object)
    labels.iloc[:4] = "rare"
    labels.iloc[5:12] = None
    adata.obs["type"] = labels
    with caplog.at_level("INFO", "cellpatch_fast"):
        done = start(tmp_path / "run", finetuning(epochs=1), data=adata)
    assert done.test is not None
    message = "136 cells of 3 classes; 7 cells without a label are left out; classes with too few "
    assert message + "cells are left out: rare (4)" in caplog.text
    assert CellPatchAnnotator.from_pretrained(tmp_path / "run").classes == ("a", "b", "c")
    assert not set(pd.read_csv(tmp_path / "run" / "test_predictions.csv")["row"]) & {*range(12)} - {
        4
    }


def test_a_column_decides_on_the_split(
    start: Finetune, finetuning: Settings, labelled: anndata.AnnData, tmp_path: Path
) -> None:
    adata = labelled.copy()
    adata.obs["part"] = ["train"] * 100 + ["val"] * 20 + ["test"] * 27
    start(tmp_path / "run", finetuning(epochs=1), data=adata, split_column="part")
    predictions = pd.read_csv(tmp_path / "run" / "test_predictions.csv")
    assert list(predictions["row"]) == list(range(120, 147))
    adata.obs["part"] = "fold1"
    with pytest.raises(InputError, match="found also: fold1"):
        start(tmp_path / "other", finetuning(), data=adata, split_column="part")
    adata.obs["part"] = np.where(adata.obs["type"] == "b", "test", "train")
    with pytest.raises(InputError, match="no training cells of: b"):
        start(tmp_path / "other", finetuning(), data=adata, split_column="part")


def test_splits_have_every_type_in_every_part() -> None:
    codes = np.repeat(np.arange(4), [3, 10, 57, 2])
    labels = data.Labels(("a", "b", "c", "d"), np.random.default_rng(0).permutation(codes), 0, {})
    split = data.split_labelled(labels, FinetuningSettings(test=0.1, validation=0.2))
    counts = {part: np.bincount(labels.codes[rows], minlength=4) for part, rows in split.items()}
    assert counts["test"].tolist() == [1, 1, 5, 0]
    assert counts["validation"].tolist() == [1, 2, 11, 0]
    assert counts["training"].tolist() == [1, 7, 41, 2]
    assert sorted(np.concatenate(list(split.values()))) == list(range(72))


def test_what_cannot_be_learnt_is_refused_before_any_work(
    start: Finetune, finetuning: Settings, labelled: anndata.AnnData, tmp_path: Path,
    annotator: tuple[Path, Finetuned], file: Path,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"no column 'celltype'.*kind, depth, barcode, type"):
        start(run, finetuning(), label="celltype")
    one_type, reserved = labelled.copy(), labelled.copy()
    one_type.obs["type"] = "only"
    reserved.obs["type"] = reserved.obs["type"].astype(str).replace("a", "unknown")
    with pytest.raises(InputError, match=r"1 classes with at least 5 cells.*only \(147\)"):
        start(run, finetuning(), data=one_type)
    with pytest.raises(InputError, match="holds numbers such as 0"):
        start(run, finetuning(), label="depth")
    with pytest.raises(
        InputError, match=r"only \d+ cells are left to train on, too few for batches of 500"
    ):
        start(run, finetuning(batch_size=500))
    with pytest.raises(InputError, match="a class 'unknown'"):
        start(run, finetuning(), data=reserved)
    assert not run.exists()
    with pytest.raises(InputError, match="a label map renames true labels: name their column"):
        atlas.annotate(file, annotator[0], run, label_map={"A": "a"})
    with pytest.raises(InputError, match="tells no classes"):
        tl.annotate(labelled, CellPatch.from_pretrained(annotator[0]))  # type: ignore[arg-type]
    CellPatch.from_pretrained(annotator[0]).save_pretrained(tmp_path / "encoder")
    with pytest.raises(InputError, match=r"classes\.json is missing"):
        tl.annotate(labelled, tmp_path / "encoder")
    with pytest.raises(InputError, match="the threshold is a probability"):
        tl.annotate(labelled, annotator[0], threshold=95)
