"""Tissues with annotated layers that the benchmark of spatial domains is judged on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from cellpatch_fast import GeneVocabulary
from cellpatch_fast.spatial.graphs import SpatialGraph, spatial_graph
from cellpatch_fast.synthetic.tissue import synthetic_tissue

FILES = ("starmap_mpfc_BZ5", "starmap_mpfc_BZ14", "dlpfc_151510_500_genes")
GENERATED = "generated tissue"
LABEL = "layer"
SMOOTHING = 18  # nearest spots that a smoothed PCA averages over, and niches are made of
SPOTS, GENES, FOLD = 1_000, 1_000, 8.0  # of the generated tissue, and of its markers


@dataclass(frozen=True, eq=False)
class Tissue:
    """Counts of spots, their places ``obsm["spatial"]`` and layers ``obs["layer"]``."""

    name: str
    spots: anndata.AnnData

    @property
    def places(self) -> np.ndarray:
        """float64 [spots, axes]"""
        return np.asarray(self.spots.obsm["spatial"], np.float64)

    @cached_property
    def annotated(self) -> np.ndarray:
        """bool [spots]: some spots have no layer; they are embedded, and not judged."""
        layers = self.spots.obs[LABEL]
        return np.asarray(layers.notna() & (layers.astype(str) != "nan"))

    @property
    def layers(self) -> np.ndarray:
        """int64 [annotated spots]: codes of their layers."""
        codes, _ = pd.factorize(self.spots.obs[LABEL].astype(str)[self.annotated])
        return np.asarray(codes, np.int64)

    @property
    def count(self) -> int:
        """Number of layers."""
        return int(self.layers.max()) + 1

    @cached_property
    def graph(self) -> SpatialGraph:
        """Within a radius that gives about six neighbours: what users get."""
        return spatial_graph(self.places)

    @cached_property
    def surroundings(self) -> SpatialGraph:
        """The nearest spots that smoothing and niches take in."""
        return spatial_graph(self.places, kind="nearest", neighbours=SMOOTHING)

    @property
    def vocabulary(self) -> GeneVocabulary:
        """Of these genes alone, whatever the species: models here are trained on nothing else."""
        return GeneVocabulary([], []).add(list(map(str, self.spots.var_names)))


def read_tissues(folder: Path | None, spots: int = SPOTS) -> tuple[list[Tissue], list[str]]:
    """The generated tissue, those of `FILES` that are in the folder, and the names of the others.

    Parameters
    ----------
    spots
        Of the generated tissue.
    """
    tissues, absent = [], []
    for name in FILES:
        if folder is not None and (path := folder / f"{name}.h5ad").exists():
            tissues.append(Tissue(name, anndata.read_h5ad(path)))
        else:
            absent.append(name)
    generated = synthetic_tissue(spots, genes=GENES, marker_fold=FOLD)
    return [*tissues, Tissue(GENERATED, generated)], absent
