"""How good an embedding of spots is: its domains against annotated layers, and without these."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from bench.spatial_data import Tissue
from cellpatch_fast.spatial.domains import STARTS, fit_starts

FOLDS = 5
Score = dict[str, Any]  # MEASURES, and what else there is to say
ARI, MEDIAN_ARI, NMI = "ARI", "ARI, median over starts", "NMI"
AGREEMENT, CHAOS, SILHOUETTE, LIKELIHOOD = "agreement", "CHAOS", "silhouette", "log-likelihood"
JUDGED = (ARI, MEDIAN_ARI, NMI)
LABEL_FREE = (AGREEMENT, CHAOS, SILHOUETTE)
MEASURES = (*JUDGED, *LABEL_FREE)


def scored(tissue: Tissue, rows: np.ndarray, seed: int, starts: int = STARTS) -> Score:
    """Of the most likely mixture with the true number of domains, and of all starts.

    Its labels are those of `cellpatch_fast.tl.spatial_domains` with the same seed.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

    rows = np.asarray(rows, np.float64)
    fitted = fit_starts(rows, tissue.count, starts=starts, seed=seed, progress=False)
    judged = [start.labels[tissue.annotated] for start in fitted]
    aris = [float(adjusted_rand_score(tissue.layers, labels)) for labels in judged]
    best = fitted[0].labels
    others = [float(adjusted_rand_score(best, start.labels)) for start in fitted[1:]]
    return {
        ARI: aris[0],
        MEDIAN_ARI: statistics.median(aris),
        NMI: float(normalized_mutual_info_score(tissue.layers, judged[0])),
        AGREEMENT: statistics.mean(others) if others else 1.0,
        CHAOS: chaos(tissue.places, best),
        SILHOUETTE: float(
            silhouette_score(rows, best, sample_size=min(len(rows), 1_000), random_state=0)
        ),
        LIKELIHOOD: fitted[0].log_likelihood,
        "ARI of starts": aris,
    }


def chaos(places: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance to the nearest spot of the same domain, places standardised: low is smooth."""
    from sklearn.neighbors import NearestNeighbors

    scaled = (places - places.mean(axis=0)) / places.std(axis=0)
    total = 0.0
    for label in np.unique(labels):
        spots = scaled[labels == label]
        if len(spots) > 1:
            total += float(NearestNeighbors(n_neighbors=1).fit(spots).kneighbors()[0].sum())
    return total / len(labels)


def ceiling(tissue: Tissue, rows: np.ndarray, seed: int) -> Score:
    """Layers as a linear discriminant tells them from the other spots' layers, five folds."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    annotated = rows[tissue.annotated]
    told = cross_val_predict(LinearDiscriminantAnalysis(), annotated, tissue.layers, cv=folds)
    ari = float(adjusted_rand_score(tissue.layers, told))
    return {
        ARI: ari,
        MEDIAN_ARI: ari,
        NMI: float(normalized_mutual_info_score(tissue.layers, told)),
        AGREEMENT: None,
        CHAOS: chaos(tissue.places[tissue.annotated], told),
        SILHOUETTE: None,
    }
