"""What a new model starts from, and how fast its parts learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from cellpatch_fast.kernels import reference
from torch import Tensor

from cellpatch_fast import CellLoader, CellPatchConfig, GeneVocabulary, MaskedGeneModel
from cellpatch_fast.training import PretrainingSettings, pretrain
from cellpatch_fast.training.distributed import Processes
from cellpatch_fast.training.starting import whiten_attention

from .conftest import untimed, weights

Settings = Callable[..., PretrainingSettings]


@pytest.fixture
def model(config: CellPatchConfig, small_vocabulary: GeneVocabulary) -> MaskedGeneModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MaskedGeneModel(config, small_vocabulary)


@torch.no_grad()
def test_what_whitened_attention_adds_to_patches_has_mean_0_and_no_correlations(
    model: MaskedGeneModel, labelled: anndata.AnnData
) -> None:
    """Up to the drawn matrix W that follows the whitening one: the covariance is that of W."""
    projection = model.cross_block.attention.out_proj
    drawn = projection.weight.double()
    settings = PretrainingSettings(batch_size=37)
    with CellLoader(labelled, model.vocabulary, model.config, batch_size=37) as loader:
        cells = [batch.cells for batch in loader]
        with Processes.join("cpu", None) as processes:
            whiten_attention(model, loader, settings, processes)
    model.double()
    added = []
    for part in cells:
        found = reference.patch_cross_attention(
            model.encoder_weights(), part.offsets, part.genes, part.values
        )
        added.append(projection(found.attended).flatten(0, 1))  # [c · p, D]
    rows = torch.cat(added)
    assert len(rows) == 147 * model.config.patches
    assert rows.mean(0).abs().max() < 1e-4
    expected = drawn @ drawn.T * (len(drawn) / drawn.square().sum())
    assert torch.cov(rows.T, correction=0) == pytest.approx(expected.numpy(), abs=1e-3)
    assert rows.square().mean() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("values", ["empty", "equal"])
def test_cells_that_do_not_differ_leave_the_drawn_matrix(
    model: MaskedGeneModel, small_vocabulary: GeneVocabulary, values: str
) -> None:
    counts = np.zeros((7, 5), np.float32) if values == "empty" else np.ones((7, 5), np.float32)
    cells = anndata.AnnData(counts)
    cells.var_names = small_vocabulary.ensembl_ids[:5]
    with torch.no_grad():  # every patch and every cell then finds the same
        model.gene_embedding.weight[:] = 0.5
        model.cross_block.attention.in_proj_bias.zero_()
    before = model.cross_block.attention.out_proj.weight.clone()
    settings = PretrainingSettings(batch_size=7)
    with (
        CellLoader(cells, model.vocabulary, model.config, batch_size=7) as loader,
        Processes.join("cpu", None) as processes,
    ):
        whiten_attention(model, loader, settings, processes)
    found = model.cross_block.attention.out_proj.weight
    assert found.isfinite().all()
    if values == "empty":
        assert torch.equal(found, before)


def test_parts_of_a_model_learn_at_their_own_rates(
    model: MaskedGeneModel, file: Path, tmp_path: Path
) -> None:
    """Adam's first step moves a weight by the learning rate, where its gradient is not tiny."""
    settings = PretrainingSettings(
        epochs=1, batch_size=147, validation=0, weight_decay=0, learning_rate=1e-3,
        gene_rate=5.0, encoder_rate=0.3,
    )  # fmt: skip
    before = {name: x.clone() for name, x in model.state_dict().items()}
    pretrain(file, tmp_path / "run", model=model, settings=settings)
    after = weights(tmp_path / "run")

    def moved(name: str) -> Tensor:
        return (after[name] - before[name]).abs().flatten()

    rates = {
        "gene_embedding.weight": 5e-3,
        "patches": 3e-4,
        "cross_block.mlp.0.weight": 3e-4,
        "projection.weight": 3e-4,
        "decoder.output.weight": 1e-3,
    }
    for name, rate in rates.items():
        assert moved(name).max() == pytest.approx(rate, rel=0.02), name
    (row,) = untimed(tmp_path / "run" / "steps.csv")
    assert float(row["learning_rate"]) == 1e-3


def test_whitened_runs_are_repeatable_and_another_start(
    pretraining: Settings, file: Path, config: CellPatchConfig, tmp_path: Path,
    small_vocabulary: GeneVocabulary,
) -> None:  # fmt: skip
    common: dict[str, Any] = {"config": config, "vocabulary": small_vocabulary}
    found = []
    for name, whitened in (("one", True), ("two", True), ("other", False)):
        settings = pretraining(epochs=1, whitened=whitened)
        pretrain(file, tmp_path / name, settings=settings, **common)
        found.append(weights(tmp_path / name)["cross_block.attention.out_proj.weight"])
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 0.1
