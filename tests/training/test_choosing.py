"""What a run is trained with: by the number of cells, by what was given, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary, InputError, atlas
from cellpatch_fast.config import Reading
from cellpatch_fast.training import (
    Finetuned,
    FinetuningSettings,
    PretrainingSettings,
    choosing,
    finetune,
    pretrain,
)
from cellpatch_fast.training.choosing import choose, complete, new_config
from cellpatch_fast.training.folder import read_settings

from ..conftest import write_zarr

SMALL: dict[str, Any] = {"patches": 5, "dim": 14, "heads": 2, "mlp_dim": 11}
SMALL |= {"self_attention_blocks": 1, "projection_dim": 3}


@pytest.fixture
def inputs(
    file: Path, labelled: anndata.AnnData, tmp_path: Path, small_vocabulary: GeneVocabulary
) -> list[Any]:
    """147 cells each: a file, a folder, an object and a token store."""
    store = tmp_path / "tokens.zarr"
    atlas.tokenize(file, store, vocabulary=small_vocabulary)
    return [file, write_zarr(labelled, tmp_path / "cells.zarr"), labelled, store]


def test_few_cells_are_those_below_a_number_that_is_said(
    inputs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all inputs together, whatever they are."""
    assert choosing.FEW == 20_000
    monkeypatch.setattr(choosing, "FEW", 4 * 147)
    for data in (*inputs, inputs[:3]):
        cells = 147 * (3 if isinstance(data, list) else 1)
        choice = choose(data, None, None, Reading())
        assert choice.few
        assert str(choice) == (
            f"settings for few cells: there are {cells} cells, fewer than 588 (--no-few-cells, "
            "few_cells=False: the others)"
        )
    choice = choose(inputs, None, {"epochs": 3}, Reading())
    assert not choice.few
    assert str(choice).startswith("the paper's settings: there are 588 cells, at least 588")


@pytest.mark.parametrize("few", [True, False])
def test_what_is_asked_for_comes_before_the_number_of_cells(
    inputs: list[Any], monkeypatch: pytest.MonkeyPatch, few: bool
) -> None:
    for number in (1, 10**6):
        monkeypatch.setattr(choosing, "FEW", number)
        choice = choose(inputs, few, None, Reading())
        assert (choice.few, choice.reason) == (few, "as asked for")


@pytest.mark.parametrize("kind", [PretrainingSettings, FinetuningSettings])
def test_complete_settings_are_taken_as_they_are(file: Path, kind: Any) -> None:
    for settings, few in ((kind(), False), (kind.for_few_cells(100), True)):
        choice = choose(file, None, settings, Reading())
        assert (choice.few, choice.reason) == (few, "as they were given")
        assert complete(kind, settings, choice.few, 147) is settings
        for asked in (True, False):
            with pytest.raises(InputError, match="complete settings were given"):
                choose(file, asked, settings, Reading())


@pytest.mark.parametrize("kind", [PretrainingSettings, FinetuningSettings])
def test_settings_that_are_given_come_before_defaults(kind: Any) -> None:
    given = {"epochs": 7, "learning_rate": 0.25}
    assert complete(kind, given, False, 147) == kind(**given)
    assert complete(kind, given, True, 147) == kind.for_few_cells(147, **given)
    assert complete(kind, None, True, None) == kind.for_few_cells()
    assert complete(kind, {"validation": 0}, True, 147).validation == 0  # patience is 0 there
    assert given == {"epochs": 7, "learning_rate": 0.25}
    for few in (True, False):
        with pytest.raises(InputError, match="unknown training settings: pace"):
            complete(kind, {"pace": 3}, few, None)
        with pytest.raises(InputError, match="epochs must be at least 1, found 0"):
            complete(kind, {"epochs": 0}, few, None)


@pytest.mark.parametrize("few", [True, False])
def test_a_new_model_takes_what_was_given_then_what_stores_have(
    inputs: list[Any], few: bool
) -> None:
    choice = choosing.Choice(few, "")
    defaults = CellPatchConfig.for_few_cells() if few else CellPatchConfig()
    assert new_config(inputs[:3], choice, None) == defaults
    found = new_config(inputs, choice, {"dim": 6})
    assert (found.dim, found.value_rounding, found.value_clip) == (6, "round", 5.0)
    assert found.attention_dropout == defaults.attention_dropout
    assert new_config(inputs, choice, {"value_clip": 4.0}).value_clip == 4.0
    given = CellPatchConfig(dim=6)
    assert new_config(inputs, choice, given) is given
    for wrong in ({"width": 3}, {"heads": 5}):
        with pytest.raises(InputError, match="the model's configuration: "):
            new_config(inputs, choice, wrong)


@pytest.mark.parametrize("rounding", ["round", "truncate", "none"])
def test_a_store_can_be_trained_on_however_it_was_made(
    file: Path, tmp_path: Path, rounding: Any, small_vocabulary: GeneVocabulary,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Of the settings for few cells, which are not those that the store was made with."""
    made = CellPatchConfig(value_rounding=rounding, value_clip=4.0)
    store = tmp_path / "tokens.zarr"
    atlas.tokenize(file, store, vocabulary=small_vocabulary, config=made)
    config = SMALL | {"max_genes": small_vocabulary.size}
    with caplog.at_level("INFO", "cellpatch_fast"):
        pretrain(
            store, tmp_path / "run", vocabulary=small_vocabulary, config=config,
            settings={"epochs": 1},
        )  # fmt: skip
    found = CellPatch.from_pretrained(tmp_path / "run").config
    assert (found.value_rounding, found.value_clip) == (rounding, 4.0)
    settings = read_settings(tmp_path / "run")["settings"]
    assert (settings["epochs"], settings["spectral"], settings["batch_size"]) == (1, True, 16)
    assert (
        "pretraining of a new model, settings for few cells: there are 147 cells, fewer than "
        "20,000 (--no-few-cells, few_cells=False: the others); 1 epochs of batches of 16"
        in caplog.text
    )


# --- what fine-tuning says ----------------------------------------------------------------------


Start = Callable[..., Finetuned]


@pytest.fixture
def start(tmp_path: Path, small_vocabulary: GeneVocabulary) -> Start:
    """``start(cells, **options)``: one epoch of a small new model."""

    def run(data: anndata.AnnData, **options: Any) -> Finetuned:
        settings = {"epochs": 1} | options.pop("settings", {})
        config = SMALL | {"max_genes": small_vocabulary.size}
        given: dict[str, Any] = {"label": "type", "vocabulary": small_vocabulary}
        given |= {"config": config} | options
        return finetune(data, tmp_path / "run", settings=settings, **given)

    return run


def test_20_cells_are_few_and_that_is_said(
    start: Start, labelled: anndata.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    """With the paper's settings they are fewer than a batch, and what helps is said too."""
    order = np.argsort(labelled.obs["type"].to_numpy(), kind="stable")
    chosen = np.concatenate([order[:7], order[60:66], order[-7:]])
    cells = labelled[chosen].copy()
    with pytest.raises(
        InputError, match=r"too few for batches of 256\..*settings for few"
    ) as error:
        start(cells, few_cells=False)
    assert "--few-cells" in str(error.value)
    with caplog.at_level("INFO", "cellpatch_fast"):
        start(cells)
    assert re.search(
        r"a new model, settings for few cells: there are 20 cells, fewer than "
        r"20,000 \(--no-few-cells, few_cells=False: the others\)",
        caplog.text,
    )
    assert (
        "14 cells to train on, 3 to validate, 3 to test; epochs: 1, in batches of 1" in caplog.text
    )
    assert "there are only 3 test cells (1 of the rarest class): one is 33.3 %" in caplog.text


def test_text_that_means_no_label_is_warned_of(
    start: Start, labelled: anndata.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    cells = labelled.copy()
    cells.obs["type"] = cells.obs["type"].astype(str).replace("b", "nan")
    start(cells)
    (message,) = (r.getMessage() for r in caplog.records if "has a class called" in r.getMessage())
    assert message.startswith(
        "obs['type'] has a class called 'nan', which is taken for a cell type"
    )


def test_few_test_cells_are_warned_of_and_many_are_not(
    start: Start, labelled: anndata.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    start(labelled, settings={"test": 0.4})
    assert "test cells (" not in caplog.text
    assert "has a class called" not in caplog.text
    start(labelled, settings={"test": 0.1}, overwrite=True)
    assert re.search(r"there are only 1\d test cells \(\d of the rarest class\)", caplog.text)


def test_a_network_that_knows_only_the_largest_class_is_warned_of(
    start: Start, labelled: anndata.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    """At a learning rate of nearly 0 it calls all cells alike; it is not warned of one that is."""
    start(labelled, few_cells=False, settings={"batch_size": 32, "learning_rate": 1e-12})
    assert re.search(
        r"the network's accuracy on the validation cells, 0\.\d+, is hardly above that of calling "
        r"all of them '[abc]', 0\.\d+: it has not learnt to tell the classes apart\. More epochs",
        caplog.text,
    )
    caplog.clear()
    start(labelled, settings={"epochs": 3}, overwrite=True)
    assert "is hardly above" not in caplog.text
