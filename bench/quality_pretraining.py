"""What pretraining came to: hidden values told, and neighbours of the same type."""

from __future__ import annotations

import numpy as np
import torch

from bench.quality_data import Dataset, Split
from cellpatch_fast import CellLoader, CellPatch, tl
from cellpatch_fast.model import MaskedGeneModel
from cellpatch_fast.model.encoder import Pool
from cellpatch_fast.training import PretrainingSettings

NEIGHBOURS = 15
MASKS = 20  # drawn of every training cell to find each gene's mean
POOLS: tuple[Pool, ...] = ("flatten", "mean")


def targets(
    data: Dataset, rows: np.ndarray, settings: PretrainingSettings, model: CellPatch, epochs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What masks ask for of some cells, and what a model says.

    Returns
    -------
    tuple
        Gene tokens int [targets], true values and predictions float64 [targets]: hidden values and
        sampled zeros alike, of ``epochs`` masks per cell. Without a decoder there are no
        predictions.
    """
    genes, values, predictions = [], [], []
    with CellLoader(
        data.cells,
        model.vocabulary,
        model.config,
        rows=rows,
        masking=settings.masking,
        seed=settings.seed,
        batch_size=64,
    ) as loader:
        for _ in range(epochs):
            for batch in loader:
                assert batch.targets is not None
                genes.append(batch.targets.genes.numpy())
                values.append(batch.targets.values.double().numpy())
                if isinstance(model, MaskedGeneModel):
                    with torch.inference_mode():
                        predictions.append(model.predict(batch.cells, batch.targets).numpy())
    told = np.concatenate(predictions, dtype=np.float64) if predictions else np.zeros(0)
    return np.concatenate(genes), np.concatenate(values), told


def reconstruction(
    split: Split, model: MaskedGeneModel, settings: PretrainingSettings
) -> dict[str, float]:
    """Mean squared error on the test cells: the model's, and of predicting each gene's mean.

    The mean is over all that masks ask for of a gene in the training cells, hidden values and
    sampled zeros alike, as these are what the model learns from. A gene that they never ask for
    gets the mean over all genes.
    """
    model.eval()
    training, test = np.flatnonzero(split.training), np.flatnonzero(~split.training)
    encoder_only = CellPatch(model.config, model.vocabulary)
    genes, values, _ = targets(split.data, training, settings, encoder_only, MASKS)
    asked = np.bincount(genes, minlength=model.vocabulary.size)
    total = np.bincount(genes, values, minlength=model.vocabulary.size)
    means = np.where(asked > 0, total / np.maximum(asked, 1), values.mean())
    genes, values, told = targets(split.data, test, settings, model, 1)
    return {
        "error": float(np.square(told - values).mean()),
        "error of means": float(np.square(means[genes] - values).mean()),
    }


def neighbour_agreement(data: Dataset, model: CellPatch) -> dict[str, float]:
    """Share of a cell's nearest neighbours in the embedding that have its label, over all cells."""
    from sklearn.neighbors import NearestNeighbors

    agreement: dict[str, float] = {}
    for pool in POOLS:
        embedded = tl.embed(data.cells, model.eval(), pool=pool, copy=True, progress=False)
        assert embedded is not None  # with copy=True
        rows = embedded.obsm["X_cellpatch"]
        search = NearestNeighbors(n_neighbors=NEIGHBOURS + 1).fit(rows)
        nearest = search.kneighbors(rows, return_distance=False)[:, 1:]  # the first is the cell
        agreement[pool] = float((data.labels[nearest] == data.labels[:, None]).mean())
    return agreement
