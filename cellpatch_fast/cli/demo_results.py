"""What ``cellpatch demo`` comes to, and what its files and methods are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData

    from ..inference.evaluation import Evaluation

DATA, ANNOTATOR, STORE = "pbmc68k.h5ad", "annotator", "annotated.zarr"
FIGURE, PAGE = "umap", "index.html"
PARTS = {DATA, ANNOTATOR, STORE, f"{FIGURE}.png", f"{FIGURE}.svg", PAGE}
LABEL, SPLIT = "bulk_labels", "split"
OURS, BASELINE = "CellPatch", "logistic regression on all genes"
NETWORK, LINEAR = "CellPatch, its network alone", "CellPatch, its linear models alone"
NEIGHBOURS = 15


@dataclass(frozen=True)
class Results:
    """What the demo came to; every evaluation is of the test cells.

    Attributes
    ----------
    data, annotated
        All cells, and the same with labels and embedding.
    evaluations
        By the name of what annotates; the first is ours.
    right
        Of ours and the baseline, which test cells they told right, bool [test cells].
    neighbours, components
        Accuracy of the vote of the nearest training cells, in the embedding and in principal
        components.
    seconds
        By step.
    speed
        Cells annotated per second.
    """

    data: AnnData
    annotated: AnnData
    evaluations: Mapping[str, Evaluation]
    right: Mapping[str, np.ndarray]
    neighbours: float
    components: float
    seconds: Mapping[str, float]
    speed: float
