"""Labelled cells that the benchmark of quality learns from, and how they are split."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp

from cellpatch_fast import GeneVocabulary

FILES = {"pbmc3k_annotated": "cell_type", "sc_mixology": "cell_line"}  # and what their labels are
TEST = 0.2  # share of cells


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled cells: ``X`` holds counts or log-normalised values, obs[``label``] the types."""

    name: str
    cells: anndata.AnnData
    label: str
    counts: bool

    @property
    def labels(self) -> np.ndarray:
        """object [cells]"""
        return self.cells.obs[self.label].to_numpy(object)

    @property
    def vocabulary(self) -> GeneVocabulary:
        """Of these genes alone: steps are faster, and others would learn nothing."""
        return GeneVocabulary([], []).add(list(self.cells.var_names))

    def log_normalised(self) -> anndata.AnnData:
        """Cells with log1p of proportions, 10⁴ · count / total, float64."""
        import scanpy

        cells = anndata.AnnData(
            sp.csr_matrix(self.cells.X, dtype=np.float64), var=self.cells.var[[]].copy()
        )
        if self.counts:
            scanpy.pp.normalize_total(cells, target_sum=1e4)
            scanpy.pp.log1p(cells)
        return cells

    def some(self, number: int) -> Dataset:
        """The first cells alone, of types that have ten of them."""
        cells = self.cells[:number]
        common = cells.obs[self.label].value_counts().loc[lambda counts: counts >= 10].index
        return replace(self, cells=cells[cells.obs[self.label].isin(common)].copy())


@dataclass(frozen=True, eq=False)
class Split:
    """A data set and one way to part it: ``seed`` decides which cells are tested on."""

    data: Dataset
    seed: int

    @cached_property
    def parts(self) -> np.ndarray:
        """``"train"`` or ``"test"`` for each cell, object [cells]: a share of every type."""
        from sklearn.model_selection import train_test_split

        rows = np.arange(self.data.cells.n_obs)
        _, test = train_test_split(
            rows, test_size=TEST, stratify=self.data.labels, random_state=self.seed
        )
        parts = np.full(len(rows), "train", object)
        parts[test] = "test"
        return parts

    @property
    def training(self) -> np.ndarray:
        """bool [cells]"""
        return self.parts == "train"


def read_datasets(folder: Path | None) -> list[Dataset]:
    """scanpy's pbmc68k_reduced, and those of `FILES` that are in the folder."""
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bundled file is old, and scanpy says so
        bundled = scanpy.datasets.pbmc68k_reduced()
    cells = bundled.raw.to_adata()
    cells.obs = bundled.obs[["bulk_labels"]].copy()
    datasets = [Dataset("pbmc68k_reduced", cells, "bulk_labels", counts=False)]
    for name, label in FILES.items():
        if folder is not None and (folder / f"{name}.h5ad").exists():
            cells = anndata.read_h5ad(folder / f"{name}.h5ad")
            datasets.append(Dataset(name, cells, label, counts=True))
    return datasets
