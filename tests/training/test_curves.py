"""The fast path learns what the reference learns: their loss curves agree to rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from cellpatch_fast import CellPatchConfig, GeneVocabulary
from cellpatch_fast.training import (
    FinetuningSettings,
    PretrainingSettings,
    finetune,
    pretrain,
)

STEPS = 42


@pytest.fixture(scope="module")
def without_dropout(config: CellPatchConfig) -> CellPatchConfig:
    """Each backend draws the weights that it drops in its own order."""
    return replace(config, attention_dropout=0.0, decoder_dropout=0.0, head_dropout=0.0)


@pytest.mark.parametrize("kind", ["pretraining", "fine-tuning"])
def test_loss_curves_agree_to_rounding(
    kind: str,
    labelled: anndata.AnnData,
    without_dropout: CellPatchConfig,
    small_vocabulary: GeneVocabulary,
    tmp_path: Path,
) -> None:
    """Two units in the last place for each step, as differences add up from step to step."""

    def losses(backend: str) -> np.ndarray:
        """The loss of every step, float64 [steps]."""
        folder = tmp_path / backend
        begin: dict[str, Any] = {"config": without_dropout, "vocabulary": small_vocabulary}
        common: dict[str, Any] = {
            "batch_size": 23,
            "learning_rate": 1e-3,
            "validation": 0,
            "backend": backend,
        }
        if kind == "pretraining":
            pretrain(labelled, folder, settings=PretrainingSettings(epochs=7, **common), **begin)
        else:
            settings = FinetuningSettings(epochs=6, test=0, patience=0, **common)
            finetune(labelled, folder, label="type", settings=settings, **begin)
        return pd.read_csv(folder / "steps.csv")["loss"].to_numpy(np.float64)

    fast, reference = losses("numba"), losses("reference")
    assert len(fast) == len(reference) == STEPS
    assert reference[-5:].mean() < 0.9 * reference[:5].mean()  # something was learnt
    difference = np.abs(fast / reference - 1)
    assert difference[0] <= 2**-20
    assert difference.max() <= 2 * STEPS * 2**-23
