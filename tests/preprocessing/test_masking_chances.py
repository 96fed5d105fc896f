"""Masking: every set that can be chosen is as likely as any other."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from cellpatch_fast.preprocessing.masking import Masked, Masking, Measured

from .masked import VOCABULARY, cells_of, run, tokens_of


class TestChoicesAreUniform:
    """Chi-square over all sets that can be chosen, each as likely as any other.

    With the fixed seeds the outcome is always the same; p below 0.001 would be a fault in all
    likelihood.
    """

    CELLS = 20_000

    def masked(self, row: list[int], masking: Masking, measured: int) -> Masked:
        cells = cells_of([row] * self.CELLS, genes=torch.uint16, values=torch.uint8)
        table = np.arange(VOCABULARY)[None] < measured
        return run(cells, measured=Measured(table), masking=masking)

    def assert_uniform(self, chosen: list[tuple[int, ...]], among: list[int], size: int) -> None:
        times = Counter(chosen)
        possible = list(combinations(among, size))
        assert times.total() == sum(times[sets] for sets in possible)
        assert chisquare([times[sets] for sets in possible]).pvalue > 0.001

    def test_of_what_is_hidden(self) -> None:
        row = [0, 2, 3, 5, 7, 11, 13]
        masked = self.masked(row, Masking(zeros=0), measured=VOCABULARY)
        self.assert_uniform(tokens_of(masked.decoder), row, 2)

    def test_of_what_the_encoder_sees_within_its_cap(self) -> None:
        row = [0, 2, 3, 5, 7, 11, 13]
        masked = self.masked(row, Masking(max_encoder=3), measured=VOCABULARY)
        self.assert_uniform(tokens_of(masked.encoder), row, 3)

    def test_of_what_the_decoder_predicts_within_its_cap(self) -> None:
        row = [0, 2, 3, 5, 7, 11, 13]
        masked = self.masked(row, Masking(0.7, zeros=0, max_decoder=3), measured=VOCABULARY)
        self.assert_uniform(tokens_of(masked.decoder), row, 3)

    @pytest.mark.parametrize(("measured", "method"), [(12, "rejection"), (8, "list")])
    def test_of_zeros(self, measured: int, method: str) -> None:
        row = [0, 3, 7]  # of which one is hidden; two zeros
        assert (2 * (len(row) + 2) <= measured) == (method == "rejection")
        masked = self.masked(row, Masking(zeros=2), measured)
        zeros = [
            tuple(token for token in cell if token not in row) for cell in tokens_of(masked.decoder)
        ]
        self.assert_uniform(zeros, [token for token in range(measured) if token not in row], 2)

    def test_and_independent_between_neighbours(self) -> None:
        """Of cells with consecutive identities, and of what is hidden and the zeros of a cell."""
        row = [0, 3, 5, 7, 9]
        masked = self.masked(row, Masking(0.2, zeros=1), measured=15)
        prompts = tokens_of(masked.decoder)
        hidden = [next(token for token in cell if token in row) for cell in prompts]
        zeros = [next(token for token in cell if token not in row) for cell in prompts]
        others = [token for token in range(15) if token not in row]
        for pairs, possible in (
            (Counter(pairwise(hidden)), [(a, b) for a in row for b in row]),
            (Counter(zip(hidden, zeros, strict=True)), [(a, b) for a in row for b in others]),
        ):
            assert chisquare([pairs[pair] for pair in possible]).pvalue > 0.001
