"""Every way to embed spots that the benchmark of spatial domains compares.

An embedding's domains are all found in the same way (`spatial_scores`), with the true number.
Random numbers of weights, noise and starts of the clustering are a function of the seed, so that
what methods share is drawn alike, and differences can be taken seed by seed.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
import torch

from bench import spatial_peers
from bench.spatial_data import Tissue
from cellpatch_fast import CellLoader, CellPatch, CellPatchConfig
from cellpatch_fast.config import Reading
from cellpatch_fast.loading.inputs import open_stream
from cellpatch_fast.model import MaskedGeneModel
from cellpatch_fast.spatial.embedding import embed_tissue
from cellpatch_fast.spatial.expression import read_expression
from cellpatch_fast.spatial.features import Components, cells_of, frozen_features, niche_features
from cellpatch_fast.spatial.settings import SpatialSettings
from cellpatch_fast.training import PretrainingSettings, pretrain
from cellpatch_fast.training.distributed import Processes
from cellpatch_fast.training.expression import gather
from cellpatch_fast.training.starting import begin

COUNTS = Reading(input="counts")
COMPONENTS = 30
FLAT = 1e6  # mean distances of neighbours: all of them weigh the same

SMOOTHED, STAGATE, ALIASED = "smoothed PCA", "STAGATE", "STAGATE, aliased"
NOISE = "Gaussian noise + STAGATE"
CEILING = "linear discriminant of the smoothed PCA (knows the layers)"


@dataclass(frozen=True)
class Recipe:
    """How long what is trained is trained, and how large models are.

    Parameters
    ----------
    epochs
        Of STAGATE.
    trained_epochs
        Of the presets that train CellPatch's features too: an epoch of theirs takes ten times as
        long.
    pretraining_epochs
        Of the briefly pretrained model.
    sizes
        Fields of `CellPatchConfig`.
    """

    epochs: int = 500
    trained_epochs: int = 50
    pretraining_epochs: int = 10
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def config(self, tissue: Tissue) -> CellPatchConfig:
        """Of a new model for few cells."""
        return CellPatchConfig.for_few_cells(max_genes=tissue.vocabulary.size, **self.sizes)


Embed = Callable[[Tissue, int, Recipe], np.ndarray]  # float [spots, width], of a seed
Source = Callable[[Tissue, int, Recipe], CellPatch]


def logged(tissue: Tissue) -> sp.csr_matrix:
    """log1p of counts brought to 10⁴ per spot, of the variable genes."""
    return read_expression(tissue.spots, variable_genes=3000, target_sum=1e4, reading=COUNTS).matrix


def smoothed_pca(tissue: Tissue, seed: int = 0, recipe: Recipe | None = None) -> np.ndarray:
    """Principal components, averaged over a spot's nearest ones and itself."""
    rows = logged(tissue).toarray().astype(np.float64)
    rows -= rows.mean(axis=0)
    left, sizes, _ = np.linalg.svd(rows, full_matrices=False)
    components = left[:, :COMPONENTS] * sizes[:COMPONENTS]
    around = tissue.surroundings.distances
    sums = sp.csr_matrix((np.ones(around.nnz), around.indices, around.indptr), around.shape)
    return np.asarray((sums @ components + components) / (1 + sums.sum(axis=1)))


def untrained(tissue: Tissue, seed: int, recipe: Recipe) -> CellPatch:
    torch.manual_seed(seed)
    return CellPatch(recipe.config(tissue), tissue.vocabulary).eval()


def spectral(tissue: Tissue, seed: int, recipe: Recipe) -> CellPatch:
    """What pretraining starts from: rows of genes, and attention, made from the spots' counts."""
    model = untrained(tissue, seed, recipe)
    settings = PretrainingSettings.for_few_cells(tissue.spots.n_obs, seed=seed)
    with contextlib.closing(
        open_stream(tissue.spots, model.vocabulary, model.config, COUNTS)
    ) as stream:
        rows = np.arange(tissue.spots.n_obs)
        values = gather([stream], rows, model.config.max_genes, seed).values
        loader = CellLoader([stream], batch_size=settings.batch_size)
        with torch.no_grad():
            begin(model, loader, values, settings, Processes(0, 1, torch.device("cpu")))
    return model


def pretrained(tissue: Tissue, seed: int, recipe: Recipe) -> CellPatch:
    """Pretrained on the tissue itself, briefly."""
    settings = PretrainingSettings.for_few_cells(
        tissue.spots.n_obs, validation=0, seed=seed, epochs=recipe.pretraining_epochs
    )
    spots = anndata.AnnData(tissue.spots.X, var=tissue.spots.var[[]].copy())
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model"
        pretrain(
            spots, output, config=recipe.config(tissue), vocabulary=tissue.vocabulary,
            settings=settings, input="counts", progress=False,
        )  # fmt: skip
        return MaskedGeneModel.from_pretrained(output).eval()


def features_of(model: CellPatch, tissue: Tissue) -> np.ndarray:
    """As the preset ``default`` makes them, float32 [spots, 30]."""
    return frozen_features(
        tissue.spots, model, components=COMPONENTS, reading=COUNTS, progress=False
    )


def stagate(
    tissue: Tissue,
    seed: int,
    recipe: Recipe,
    features: np.ndarray | None = None,
    model: CellPatch | None = None,
    preset: Any = "default",
    **changes: Any,
) -> np.ndarray:
    """The embedding by our network."""
    settings = SpatialSettings.preset(preset, seed=seed, **{"epochs": recipe.epochs} | changes)
    return embed_tissue(
        tissue.spots, tissue.places, tissue.graph, model,
        settings=settings, features=features, reading=COUNTS, progress=False,
    ).rows  # fmt: skip


def aliased(tissue: Tissue, seed: int, recipe: Recipe) -> np.ndarray:
    return stagate(tissue, seed, recipe, tie="alias")


def with_features(source: Source) -> Embed:
    """STAGATE with frozen features of a model beside the expression."""

    def embed(tissue: Tissue, seed: int, recipe: Recipe) -> np.ndarray:
        features = features_of(source(tissue, seed, recipe), tissue)
        return stagate(tissue, seed, recipe, features)

    return embed


def with_noise(tissue: Tissue, seed: int, recipe: Recipe) -> np.ndarray:
    """Noise in the place of features: columns as wide as those of the spectral start's."""
    deviations = features_of(spectral(tissue, seed, recipe), tissue).std(axis=0)
    drawn = np.random.default_rng(seed).standard_normal((tissue.spots.n_obs, len(deviations)))
    return stagate(tissue, seed, recipe, (drawn * deviations).astype(np.float32))


def trained(preset: str) -> Embed:
    """A preset that trains the features of a spectral start with the network."""

    def embed(tissue: Tissue, seed: int, recipe: Recipe) -> np.ndarray:
        model = spectral(tissue, seed, recipe)
        epochs = recipe.trained_epochs
        return stagate(tissue, seed, recipe, model=model, preset=preset, epochs=epochs)

    return embed


def niches(source: Source, sigma: float | None = None) -> Embed:
    """Patches that attend to a spot and those around it; ``sigma`` None for the mean distance."""

    def embed(tissue: Tissue, seed: int, recipe: Recipe) -> np.ndarray:
        model, around = source(tissue, seed, recipe), tissue.surroundings
        width = None if sigma is None else sigma * float(around.distances.data.mean())
        cells = cells_of(tissue.spots, model, COUNTS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            rows = niche_features(cells, model, around, sigma=width, progress=False)
        return Components(rows, COMPONENTS)(rows)

    return embed


NETWORKS: dict[str, Embed] = {
    STAGATE: stagate,
    ALIASED: aliased,
    NOISE: with_noise,
    "CellPatch untrained + STAGATE": with_features(untrained),
    "CellPatch spectral + STAGATE": with_features(spectral),
    "CellPatch pretrained + STAGATE": with_features(pretrained),
}
NICHES: dict[str, Embed] = {
    "niche patches, untrained": niches(untrained),
    "niche patches, untrained, flat": niches(untrained, FLAT),
    "niche patches, spectral": niches(spectral),
    "niche patches, spectral, flat": niches(spectral, FLAT),
}
TRAINED: dict[str, Embed] = {
    "CellPatch + STAGATE, paper": trained("paper"),
    "CellPatch + STAGATE, original code": trained("original-code"),
}
CELLPATCH = (*list(NETWORKS)[3:], *NICHES, *TRAINED)
PEERS: dict[str, Embed] = spatial_peers.installed()
METHODS: dict[str, Embed] = {SMOOTHED: smoothed_pca} | NICHES | NETWORKS | PEERS | TRAINED
