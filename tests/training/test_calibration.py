"""Temperature and shares: what was known is found again, and nothing is made of no cells."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from cellpatch_fast.training.calibration import PRIOR_CELLS, mixture_shares, temperature

CELLS = 20_011
ERRORS = 5  # standard errors that an estimate may be away from what it estimates


def drawn(probabilities: np.ndarray, seed: int) -> np.ndarray:
    """A class of each row, by its probabilities."""
    random = np.random.default_rng(seed).random((len(probabilities), 1))
    return (probabilities.cumsum(axis=1) < random).sum(axis=1).clip(max=probabilities.shape[1] - 1)


@pytest.mark.parametrize("known", [0.37, 1.0, 2.3, 11.0])
def test_temperature_is_that_by_which_logits_were_exaggerated(known: float) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (CELLS, 7))
    probabilities = softmax(logits, axis=1)
    # Fisher's information on log T of a cell: the variance of the logits by their probabilities
    mean = (probabilities * logits).sum(axis=1, keepdims=True)
    information = (probabilities * (logits - mean) ** 2).sum()
    found = temperature(logits * known, drawn(probabilities, seed=1))
    error = ERRORS / np.sqrt(information)
    prior = abs(np.log(known)) / 0.25 / information  # pulls towards 1 by that
    assert abs(np.log(found / known)) <= error + prior + 1e-5  # that of the search


def test_temperature_of_no_cells_is_1() -> None:
    assert temperature(np.zeros((0, 3)), np.zeros(0, int)) == 1.0


def test_temperature_of_few_cells_is_near_1_however_sure_the_network_is() -> None:
    """Three cells, all right or all wrong."""
    logits = 30.0 * np.eye(5)[[0, 1, 2]]
    assert 0.5 < temperature(logits, np.array([0, 1, 2])) <= 1.001
    assert 1.0 < temperature(logits, np.array([1, 2, 3])) < 55


@given(st.integers(0, 99), st.integers(1, 23), st.floats(0.1, 100))
def test_temperature_is_the_likeliest(seed: int, cells: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    logits, codes = random.normal(0, scale, (cells, 3)), random.integers(0, 3, cells)

    def surprise(log_temperature: float) -> float:
        found = log_softmax(logits / np.exp(log_temperature), axis=1)
        return -found[np.arange(cells), codes].sum() + 2 * log_temperature**2

    found = np.log(temperature(logits, codes))
    tried = np.linspace(-3.9, 3.9, 79)
    least = min(map(surprise, tried))
    assert abs(found) <= 4
    assert surprise(found) <= least + 1e-6 * max(1, abs(least))


def test_shares_are_those_of_the_mixture_that_cells_were_drawn_from() -> None:
    known = np.array([0.53, 0.18, 0.29])
    random = np.random.default_rng(0)
    members = softmax(random.normal(0, 2, (3, CELLS, 5)), axis=2)
    codes = drawn(np.einsum("m,mck->ck", known, members), seed=1)
    likely = members[:, np.arange(CELLS), codes]  # [members, cells]
    found = mixture_shares(likely)
    # Fisher's information on the first two shares, the third being what is left
    scores = (likely[:2] - likely[2]) / (known @ likely)
    errors = np.sqrt(np.diag(np.linalg.inv(scores @ scores.T)))
    prior = 3 * PRIOR_CELLS / CELLS
    assert (abs(found[:2] - known[:2]) <= ERRORS * errors + prior).all()


@pytest.mark.parametrize("number", [2, 3])
def test_shares_without_cells_or_without_differences_are_equal(number: int) -> None:
    assert mixture_shares(np.zeros((number, 0))) == pytest.approx(np.full(number, 1 / number))
    alike = np.tile(np.random.default_rng(0).random(17), (number, 1))
    assert mixture_shares(alike) == pytest.approx(np.full(number, 1 / number))


@given(st.integers(0, 99), st.integers(2, 4), st.integers(0, 29))
def test_shares_are_positive_of_sum_1_and_follow_their_members(
    seed: int, number: int, cells: int
) -> None:
    """Whatever is certain or impossible; the member that is always likelier has the most."""
    random = np.random.default_rng(seed)
    members = random.choice([0.0, 1e-300, 0.2, 0.7, 1.0], (number, cells))
    shares = mixture_shares(members)
    assert (shares > 0).all()
    assert shares.sum() == pytest.approx(1, abs=1e-12)
    assert shares.min() >= PRIOR_CELLS / (cells + number * PRIOR_CELLS) * (1 - 1e-12)
    order = random.permutation(number)
    assert mixture_shares(members[order]) == pytest.approx(shares[order], abs=1e-12)
    members[0] = members.max(axis=0)
    assert mixture_shares(members).argmax() == 0 or cells == 0 or np.ptp(members, axis=0).max() == 0
