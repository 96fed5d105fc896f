"""A small generated tissue, and a small model of its genes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData

from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary
from cellpatch_fast.datasets import synthetic_tissue
from cellpatch_fast.spatial.graphs import SpatialGraph, spatial_graph
from cellpatch_fast.spatial.settings import SpatialSettings

SPOTS, GENES = 110, 41
SMALL: dict[str, Any] = {"epochs": 5, "hidden": 13, "output": 7}  # settings of a network


@pytest.fixture
def tissue() -> AnnData:
    """110 spots of Visium's grid in 3 layers, counts of 41 genes."""
    return synthetic_tissue(SPOTS, layers=3, genes=GENES)


@pytest.fixture
def places(tissue: AnnData) -> np.ndarray:
    return np.asarray(tissue.obsm["spatial"])


@pytest.fixture
def graph(places: np.ndarray) -> SpatialGraph:
    return spatial_graph(places)


@pytest.fixture(scope="session")
def tissue_model() -> CellPatch:
    """Knows the tissue's genes but for the last; random weights."""
    var = synthetic_tissue(4, genes=GENES).var.iloc[:-1]
    vocabulary = GeneVocabulary(list(var.index), list(var["feature_name"]))
    config = CellPatchConfig(
        max_genes=vocabulary.size, patches=3, dim=14, heads=2, mlp_dim=11,
        self_attention_blocks=1, projection_dim=5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return CellPatch(config, vocabulary).eval()


def small(preset: str = "default", **changes: Any) -> SpatialSettings:
    """Settings of a preset for a network that is trained in no time."""
    return SpatialSettings.preset(preset, **SMALL | changes)  # type: ignore[arg-type]
