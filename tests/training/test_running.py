"""Runs: a folder that holds another one is refused before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cellpatch_fast import CellPatchConfig, GeneVocabulary, InputError
from cellpatch_fast.training import (
    FinetuningSettings,
    PretrainingSettings,
    finetune,
    finetuning,
    pretrain,
    pretraining,
)


@pytest.fixture
def new_model(config: CellPatchConfig, small_vocabulary: GeneVocabulary) -> dict[str, Any]:
    return {"config": config, "vocabulary": small_vocabulary}


def test_pretraining_looks_at_the_folder_before_the_cells(
    file: Path, new_model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PretrainingSettings(epochs=1, batch_size=43, validation=0.1, spectral=True)
    other = PretrainingSettings(**first.to_dict() | {"seed": 3})
    pretrain(file, tmp_path, settings=first, **new_model)
    monkeypatch.delattr(pretraining, "gather")  # of the cells that a spectral start is made of
    with pytest.raises(InputError, match=r"other settings.*\n  seed: was 0, is now 3"):
        pretrain(file, tmp_path, settings=other, **new_model)


def test_finetuning_looks_at_the_folder_before_it_fits_linear_models(
    file: Path, new_model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FinetuningSettings(epochs=1, batch_size=16, linear=True)
    other = FinetuningSettings(**first.to_dict() | {"learning_rate": 0.5})
    finetune(file, tmp_path, label="type", settings=first, **new_model)
    monkeypatch.delattr(finetuning, "gather")
    monkeypatch.delattr(finetuning, "fit")
    with pytest.raises(InputError, match=r"other settings.*\n  learning_rate: was 0.001, is now"):
        finetune(file, tmp_path, label="type", settings=other, **new_model)
