"""Domains: groups of spots with similar embeddings.

Clustering decides more than the network does: one embedding has Gaussian mixtures that are locally
best and agree with annotated layers to anything from 0.28 to 0.57 (adjusted Rand index). So:

- **Many starts**, of which the most likely is kept. A mixture with one covariance for all domains
  ("tied", mclust's EEE) is the same in any coordinates, but the k-means that it starts from is not.
  On embeddings of STAGATE, starts from the *whitened* embedding are better (median 0.55, else
  0.41), on a smoothed PCA those from the embedding as it is (0.87, whitened 0.25): so half of the
  starts are of either kind, and likelihoods, which need no annotation, decide.
- **How far the starts agree** is reported: of the whole (mean adjusted Rand index with the kept
  one) and of every spot (share of starts that put it into the same domain). Low agreement means
  that the domains are a matter of chance.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np
import pandas as pd

from ..errors import InputError
from ..progress import progress_bar
from .choices import Method
from .graphs import SpatialGraph

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

logger = logging.getLogger("cellpatch_fast")

STARTS = 20
SAMPLE = 20_000  # spots that a mixture is fitted to
RANGE = range(3, 16)  # numbers of domains that are tried where none is given
REFINING = 50  # nearest spots that vote, as in the field's other codes
COVARIANCE_ADDED = 1e-6  # to the diagonal, as scikit-learn does
SMALLEST_VARIANCE = 1e-8  # of a whitened direction, relative to the largest


@dataclass(frozen=True, eq=False)
class Domains:
    """What was found.

    Parameters
    ----------
    labels
        int64 [spots], from 0; the most frequent domain first.
    method
        How.
    spot_agreement
        float32 [spots]: the share of starts that put a spot into the same domain; None where there
        are no starts.
    starts
        One row per start: ``log_likelihood`` per spot, ``agreement`` with the kept one (adjusted
        Rand index); None where there are none.
    numbers
        One row per number of domains that was tried, where none was given: ``bic``, ``agreement``.
    """

    labels: np.ndarray
    method: Method
    spot_agreement: np.ndarray | None = None
    starts: pd.DataFrame | None = None
    numbers: pd.DataFrame | None = None

    @property
    def count(self) -> int:
        """Number of domains."""
        return int(self.labels.max()) + 1

    @property
    def agreement(self) -> float | None:
        """Mean adjusted Rand index of the kept start with the others."""
        if self.starts is None or len(self.starts) < 2:
            return None
        return float(self.starts["agreement"].iloc[1:].mean())

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f", starts agree to {self.agreement:.2f}"
        sizes = np.bincount(self.labels)
        return f"{self.count} domains of {sizes.min():,} to {sizes.max():,} spots{agreement}"


def find_domains(
    embedding: np.ndarray,
    count: int | None,
    *,
    method: Method = "mixture",
    starts: int = STARTS,
    seed: int = 0,
    progress: bool | None = None,
) -> Domains:
    """Group spots by their embeddings.

    Parameters
    ----------
    embedding
        [spots, width].
    count
        Number of domains; None chooses: of mixtures with 3 to 15 domains the one whose starts agree
        best (the Bayesian information criterion, which `Domains.numbers` has too, takes ever more
        domains of real tissues); leiden by its own resolution of 1.
    method
        ``"mixture"``: a tied Gaussian mixture of the whitened embedding. ``"leiden"``: communities
        of scanpy's graph of nearest neighbours. ``"mclust"``: R's, model EEE, if R is installed.
    starts
        Of the mixture.
    seed
        Of the starts.

    Raises
    ------
    InputError
        If numbers are not finite, there are fewer spots than domains, or R is missing.
    """
    rows = np.asarray(embedding, np.float64)
    _check(rows)
    require_possible(len(rows), count, method, starts)
    if method == "leiden":
        return Domains(by_size(_leiden(rows, count, seed)), method)
    if method == "mclust":
        assert count is not None
        return Domains(by_size(_mclust(rows, count, seed)), method)
    if count is not None:
        return _mixture(rows, count, starts, seed, progress)[0]
    distinct = _distinct(rows[_sample(len(rows), seed)])
    if starts < 2 or distinct <= RANGE.start:
        raise InputError(
            f"the number of domains is chosen from {RANGE.start} to {RANGE.stop - 1} by how far 2 "
            f"starts or more agree; found {distinct:,} different rows and {starts} starts: give n"
        )
    tried = {n: _mixture(rows, n, starts, seed, progress) for n in RANGE if n < distinct}
    numbers = pd.DataFrame(
        {
            "domains": list(tried),
            "bic": [bic for _, bic in tried.values()],
            "agreement": [domains.agreement for domains, _ in tried.values()],
        }
    )
    best, _ = tried[int(numbers["domains"][numbers["agreement"].idxmax()])]
    return Domains(best.labels, method, best.spot_agreement, best.starts, numbers)


def require_possible(spots: int, count: int | None, method: Method, starts: int = STARTS) -> None:
    """Refuse what `find_domains` cannot do with so many spots, whatever their embedding.

    Raises
    ------
    InputError
        As of `find_domains`.
    """
    if method not in get_args(Method):
        raise InputError(f"unknown method {method!r}: choose {', '.join(get_args(Method))}")
    if count is not None and not 1 <= count <= spots:
        raise InputError(f"there can be 1 to {spots:,} domains, one per spot; found n={count}")
    if starts < 1:
        raise InputError(f"a mixture needs at least 1 start, found {starts}")
    if method == "mclust" and count is None:
        raise InputError("mclust needs a number of domains: give n (--domains)")
    if method == "mclust" and shutil.which("Rscript") is None:
        raise InputError(
            "method='mclust' runs R, but there is no Rscript: install R and its package mclust, or "
            "use method='mixture', which fits the same model"
        )


def _check(rows: np.ndarray) -> None:
    if rows.ndim != 2 or not rows.size:
        raise InputError(f"an embedding is [spots, width], found shape {list(rows.shape)}")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        raise InputError(f"{bad:,} of {len(rows):,} spots have embeddings that are not finite")


def whiten(rows: np.ndarray) -> np.ndarray:
    """Rows with mean 0, variance 1 and no correlations; directions without variance left out."""
    centred = rows - rows.mean(axis=0)
    variances, vectors = np.linalg.eigh(centred.T @ centred / max(1, len(rows) - 1))
    kept = variances > SMALLEST_VARIANCE * max(variances[-1], 1e-300)
    white: np.ndarray = centred @ (vectors[:, kept] / np.sqrt(variances[kept]))
    return white


class Start(NamedTuple):
    """One of a mixture's starts, fitted."""

    log_likelihood: float  # per spot
    bic: float
    labels: np.ndarray  # int64 [spots]


def fit_starts(
    rows: np.ndarray, count: int, *, starts: int, seed: int, progress: bool | None = None
) -> list[Start]:
    """Mixtures fitted from different starts, the most likely first.

    Parameters
    ----------
    rows
        float64 [spots, width].
    count
        Number of domains.
    starts, seed
        As of `find_domains`.
    """
    white = whiten(rows)
    sample = _sample(len(rows), seed)
    distinct = _distinct(rows[sample])
    if distinct < max(count, 2):  # k-means has no more groups than that
        raise InputError(
            f"the embedding has {distinct:,} different row{'s' * (distinct > 1)}, too few for so "
            f"many domains: found n={count}"
        )
    fitted = []
    with progress_bar(starts * len(white), f"{count} domains", progress) as bar:
        for start in range(starts):
            begun_from = (rows, white)[start % 2]
            mixture = _fit(white[sample], begun_from[sample], count, seed + start)
            likelihood, bic = mixture.score(white[sample]), mixture.bic(white[sample])
            fitted.append(Start(float(likelihood), float(bic), mixture.predict(white)))
            bar.update(len(white))
    return sorted(fitted, key=lambda start: -start.log_likelihood)


def _mixture(
    rows: np.ndarray, count: int, starts: int, seed: int, progress: bool | None
) -> tuple[Domains, float]:
    """The most likely of so many mixtures, and its Bayesian information criterion."""
    from sklearn.metrics import adjusted_rand_score

    fitted = fit_starts(rows, count, starts=starts, seed=seed, progress=progress)
    best = fitted[0].labels
    agreements = [float(adjusted_rand_score(best, start.labels)) for start in fitted]
    likelihoods = [start.log_likelihood for start in fitted]
    table = pd.DataFrame({"log_likelihood": likelihoods, "agreement": agreements})
    shares = np.mean([aligned(start.labels, best) == best for start in fitted], axis=0)
    domains = Domains(by_size(best), "mixture", shares.astype(np.float32), table)
    return domains, fitted[0].bic


def _sample(spots: int, seed: int) -> np.ndarray:
    """The spots that mixtures are fitted to, ascending."""
    if spots <= SAMPLE:
        return np.arange(spots)
    return np.sort(np.random.default_rng(seed).choice(spots, SAMPLE, replace=False))


def _distinct(rows: np.ndarray) -> int:
    """Number of different rows."""
    return len(np.unique(rows, axis=0))


def _fit(white: np.ndarray, begun_from: np.ndarray, count: int, seed: int) -> GaussianMixture:
    """A tied mixture of whitened rows that starts from the k-means of ``begun_from``."""
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    labels = KMeans(count, n_init=1, random_state=seed).fit(begun_from).labels_
    means = np.stack([white[labels == label].mean(axis=0) for label in range(count)])
    within = white - means[labels]
    covariance = within.T @ within / len(white) + COVARIANCE_ADDED * np.eye(white.shape[1])
    return GaussianMixture(
        count, covariance_type="tied", max_iter=300, random_state=seed,
        means_init=means, precisions_init=np.linalg.inv(covariance),
        weights_init=np.bincount(labels, minlength=count) / len(labels),
    ).fit(white)  # fmt: skip


def aligned(labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Labels renamed such that most spots have the same as in ``reference`` (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    size = int(max(labels.max(), reference.max())) + 1
    shared = np.zeros((size, size), np.int64)
    np.add.at(shared, (labels, reference), 1)
    rows, columns = linear_sum_assignment(-shared)
    renamed = np.empty(size, np.int64)
    renamed[rows] = columns
    return renamed[labels]


def by_size(labels: np.ndarray) -> np.ndarray:
    """Labels from 0, the most frequent first."""
    _, codes = np.unique(labels, return_inverse=True)
    order = np.argsort(-np.bincount(codes), kind="stable")
    renamed = np.empty(len(order), np.int64)
    renamed[order] = np.arange(len(order))
    return renamed[codes]


def _leiden(rows: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Communities; with ``count``, at the resolution that gives so many."""
    import scanpy
    from anndata import AnnData

    adata = AnnData(rows.astype(np.float32))
    scanpy.pp.neighbors(adata, use_rep="X", random_state=seed)

    def communities(resolution: float) -> np.ndarray:
        scanpy.tl.leiden(
            adata, resolution=resolution, random_state=seed, flavor="igraph", n_iterations=2,
            directed=False,
        )  # fmt: skip
        return adata.obs["leiden"].to_numpy().astype(np.int64)

    if count is None:
        return communities(1.0)
    low, high = 1e-3, 8.0
    for _ in range(40):
        middle = float(np.sqrt(low * high))
        labels = communities(middle)
        found = len(np.unique(labels))
        if found == count:
            return labels
        low, high = (middle, high) if found < count else (low, middle)
    raise InputError(
        f"no resolution gives {count} communities, the nearest gives {found}: use "
        f"method='mixture', or n={found}"
    )


MCLUST = """
library(mclust)
arguments <- commandArgs(trailingOnly = TRUE)
set.seed(as.integer(arguments[3]))
rows <- as.matrix(read.csv(arguments[1], header = FALSE))
fit <- Mclust(rows, G = as.integer(arguments[4]), modelNames = "EEE", verbose = FALSE)
if (is.null(fit)) stop("mclust found no model EEE with so many domains")
write.table(fit$classification, arguments[2], row.names = FALSE, col.names = FALSE)
"""


def _mclust(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Labels by R's mclust."""
    with tempfile.TemporaryDirectory() as folder:
        script, table, labels = (Path(folder, name) for name in ("mclust.R", "rows", "labels"))
        script.write_text(MCLUST)
        np.savetxt(table, rows, delimiter=",")
        run = subprocess.run(
            ["Rscript", str(script), str(table), str(labels), str(seed), str(count)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if run.returncode:
            raise InputError(f"R's mclust failed: {run.stderr.strip()[-500:]}")
        return np.loadtxt(labels, dtype=np.int64)


def refine(labels: np.ndarray, places: np.ndarray, graph: SpatialGraph) -> np.ndarray:
    """Each spot gets the label that most of its 50 nearest spots of its slice have.

    Parameters
    ----------
    labels
        int64 [spots].
    places
        [spots, axes].
    graph
        Whose slices are used.
    """
    from sklearn.neighbors import NearestNeighbors

    refined = labels.copy()
    for code in np.unique(graph.slices):
        spots = np.flatnonzero(graph.slices == code)
        count = min(REFINING, len(spots) - 1)
        if count < 1:
            continue
        nearest = NearestNeighbors(n_neighbors=count).fit(places[spots]).kneighbors()[1]
        votes = np.zeros((len(spots), int(labels.max()) + 1), np.int64)
        np.add.at(votes, (np.arange(len(spots))[:, None], labels[spots][nearest]), 1)
        most = votes.max(axis=1)
        tied = votes[np.arange(len(spots)), labels[spots]] == most  # a tie changes nothing
        refined[spots] = np.where(tied, labels[spots], votes.argmax(axis=1))
    return refined
