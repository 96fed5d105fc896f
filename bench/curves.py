"""Loss curves of the fast path beside the reference's: do they differ by more than rounding?

What "to rounding" means is measured, not assumed: the reference runs once more from weights
one unit in the last place away. Differences of that size are what another order of additions makes;
they grow from step to step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from cellpatch_fast.kernels import Backend

from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary
from cellpatch_fast.model import MaskedGeneModel
from cellpatch_fast.training import (
    FinetuningSettings,
    PretrainingSettings,
    finetune,
    pretrain,
)

CELLS, BATCH = 80, 8
FIRST_STEP = 2**-20  # most that it may differ: 8 units in the last place
TIMES_DRIFT = 10.0  # that backends may differ more than the reference does from itself


def nudged(model: MaskedGeneModel) -> MaskedGeneModel:
    """The model with every weight moved to one of the two floats beside it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            up = torch.rand(weight.shape, generator=generator) < 0.5
            towards = torch.full_like(weight, torch.inf).where(up, torch.tensor(-torch.inf))
            weight.copy_(torch.nextafter(weight, towards))
    return model


def compare(
    cells: anndata.AnnData,
    label: str,
    vocabulary: GeneVocabulary,
    config: CellPatchConfig,
    pretraining: PretrainingSettings,
    finetuning: FinetuningSettings,
    steps: int,
    folder: Path,
) -> dict[str, dict[str, float]]:
    """The largest relative difference of the loss over all steps, fast path to reference.

    Of both trainings, on `CELLS` of the cells in batches of `BATCH`, without dropout, as each
    backend draws the weights that it drops in its own order.
    """
    rng = np.random.default_rng(0)
    few = cells[np.sort(rng.permutation(cells.n_obs)[:CELLS])].copy()
    config = replace(config, attention_dropout=0.0, decoder_dropout=0.0, head_dropout=0.0)
    common: dict[str, Any] = {
        "epochs": steps // (CELLS // BATCH),
        "batch_size": BATCH,
        "validation": 0.0,
    }
    pretraining = replace(pretraining, **common)
    finetuning = replace(finetuning, **common, test=0, patience=0, min_cells=1)

    def pretrained(start: CellPatch, backend: Backend, run: Path) -> None:
        pretrain(few, run, model=start, settings=replace(pretraining, backend=backend))

    def finetuned(start: CellPatch, backend: Backend, run: Path) -> None:
        settings = replace(finetuning, backend=backend)
        finetune(few, run, label=label, model=start, settings=settings)

    torch.manual_seed(0)
    start = MaskedGeneModel(config, vocabulary)
    kinds = {"pretraining": pretrained, "fine-tuning": finetuned}
    return {name: _compare(train, start, folder / name) for name, train in kinds.items()}


def _compare(
    train: Callable[[CellPatch, Backend, Path], None], start: MaskedGeneModel, folder: Path
) -> dict[str, float]:
    def losses(name: str, model: CellPatch, backend: Backend) -> np.ndarray:
        train(model, backend, folder / name)
        return pd.read_csv(folder / name / "steps.csv")["loss"].to_numpy(np.float64)

    reference = losses("reference", start, "reference")
    difference = np.abs(losses("fast", start, "numba") / reference - 1)
    drift = np.abs(losses("nudged", nudged(copy.deepcopy(start)), "reference") / reference - 1)
    found = {
        "steps": len(reference),
        "first loss": float(reference[0]),
        "last loss": float(reference[-1]),
        "difference, step 1": float(difference[0]),
        "largest difference": float(difference.max()),
        "largest drift": float(drift.max()),
    }
    assert difference[0] <= FIRST_STEP, found
    assert difference.max() <= TIMES_DRIFT * drift.max(), found
    return found
