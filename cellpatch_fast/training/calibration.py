"""What validation cells tell of an annotator's probabilities: temperature, and a mixture's shares.

Both are few numbers found from few cells, so both have a prior worth some cells: without evidence
the temperature is 1 and the shares are those of the prior.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

SPREAD = 0.5  # of log temperature, before any cell is seen
HIGHEST = 4.0  # |log temperature|: e^4 is 55
STEPS, SETTLED = 1_000, 1e-13  # of the iteration, which takes some dozens; of a share
LEAST = 1e-12  # probability


def temperature(logits: np.ndarray, codes: np.ndarray) -> float:
    """What to divide logits by so that their softmax is as likely as can be (Guo et al. 2017).

    Parameters
    ----------
    logits
        float [cells, classes].
    codes
        int [cells]: the true classes.
    """
    cells = np.arange(len(codes))

    def surprise(log_temperature: float) -> float:
        likely = log_softmax(logits / np.exp(log_temperature), axis=1)[cells, codes]
        return float(-likely.sum() + (log_temperature / SPREAD) ** 2 / 2)

    minimum = minimize_scalar(surprise, bounds=(-HIGHEST, HIGHEST), method="bounded")
    return float(np.exp(minimum.x)) if len(codes) else 1.0


def mixture_shares(members: np.ndarray, prior: Sequence[float]) -> np.ndarray:
    """Shares float64 [members], of sum 1, of the most likely mixture.

    Parameters
    ----------
    members
        float [members, cells]: each member's probability of the true class.
    prior
        Cells that speak for each member from the beginning, positive.
    """
    before = np.asarray(prior, np.float64)
    shares = before / before.sum()
    for _ in range(STEPS):  # expectation-maximisation: the likelihood has one maximum
        parts = shares[:, None] * np.maximum(members, LEAST)
        sums = (parts / parts.sum(0)).sum(1) + before
        last, shares = shares, sums / sums.sum()
        if np.abs(shares - last).max() < SETTLED:
            break
    return shares
