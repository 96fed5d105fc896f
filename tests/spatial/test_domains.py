"""Domains: separated groups are found, chance is told from structure, bad input is refused."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.metrics import adjusted_rand_score

from cellpatch_fast.errors import InputError
from cellpatch_fast.spatial.domains import aligned, find_domains, refine, whiten
from cellpatch_fast.spatial.graphs import spatial_graph

from ..examples import examples

WIDTH = 5


def groups(*sizes: int, apart: float = 12.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of Gaussian groups of unit variance, shuffled, and the group of each."""
    generator = np.random.default_rng(seed)
    truth = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = apart * np.eye(max(WIDTH, len(sizes)))[:, :WIDTH]
    return centres[truth] + generator.standard_normal((len(truth), WIDTH)), truth


def noise(spots: int = 211) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((spots, WIDTH))


def test_a_mixture_finds_separated_groups_the_largest_first() -> None:
    rows, truth = groups(61, 43, 29)
    domains = find_domains(rows, 3, starts=6)
    assert np.array_equal(domains.labels, truth)
    assert domains.count == 3
    assert domains.agreement == pytest.approx(1)
    assert domains.spot_agreement is not None
    np.testing.assert_array_equal(domains.spot_agreement, np.ones(len(rows), np.float32))
    assert str(domains) == "3 domains of 29 to 61 spots, starts agree to 1.00"


def test_groups_that_only_a_common_covariance_tells_apart_are_found() -> None:
    """Long, flat groups beside each other: distances between spots say nothing of them."""
    generator = np.random.default_rng(0)
    truth = np.repeat([0, 1], [71, 67])
    rows = np.stack([30 * generator.standard_normal(138), generator.standard_normal(138)], 1)
    rows[:, 1] += 8 * truth
    rotation = np.linalg.qr(generator.standard_normal((2, 2)))[0]
    assert np.array_equal(find_domains(rows @ rotation, 2, starts=6).labels, truth)


def test_the_most_likely_start_is_kept_and_compared_with_the_others() -> None:
    domains = find_domains(noise(), 4, starts=7)
    assert domains.starts is not None
    assert domains.spot_agreement is not None
    likelihood = domains.starts["log_likelihood"].to_numpy()
    assert len(likelihood) == 7
    assert (np.diff(likelihood) <= 0).all()
    assert domains.starts["agreement"][0] == 1
    assert domains.agreement == pytest.approx(domains.starts["agreement"][1:].mean())
    assert ((domains.spot_agreement >= 1 / 7 - 1e-6) & (domains.spot_agreement <= 1)).all()


def test_starts_agree_on_groups_and_not_on_noise() -> None:
    rows, _ = groups(61, 43, 29, 23)
    together, apart = find_domains(rows, 4), find_domains(noise(), 4)
    assert together.agreement is not None
    assert apart.agreement is not None
    assert together.agreement > 0.9
    assert apart.agreement < 0.5
    assert apart.spot_agreement is not None
    assert apart.spot_agreement.mean() < 0.8


def test_one_seed_gives_one_result_and_another_seed_other_starts() -> None:
    one, two = (find_domains(noise(), 5, starts=4, seed=3) for _ in range(2))
    other = find_domains(noise(), 5, starts=4, seed=97)
    assert np.array_equal(one.labels, two.labels)
    assert one.starts is not None
    assert two.starts is not None
    assert other.starts is not None
    assert one.starts.equals(two.starts)
    assert not one.starts.equals(other.starts)


def test_a_sample_of_many_spots_gives_domains_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, truth = groups(61, 43, 29)
    monkeypatch.setattr("cellpatch_fast.spatial.domains.SAMPLE", 53)
    assert np.array_equal(find_domains(rows, 3, starts=4).labels, truth)


def test_the_number_of_domains_is_found() -> None:
    rows, truth = groups(61, 43, 37, 31, 29)
    domains = find_domains(rows, None, starts=4)
    assert np.array_equal(domains.labels, truth)
    assert domains.numbers is not None
    assert domains.numbers["domains"].tolist() == list(range(3, 16))
    assert domains.numbers["bic"].idxmin() == domains.numbers["agreement"].idxmax() == 2


@pytest.mark.parametrize(
    ("rows", "starts"), [(noise(3), 4), (noise(61), 1), (np.repeat(noise(3), 9, axis=0), 4)]
)
def test_a_number_that_cannot_be_found_is_asked_for(rows: np.ndarray, starts: int) -> None:
    with pytest.raises(InputError, match=r"give n"):
        find_domains(rows, None, starts=starts)


def test_no_more_domains_are_tried_than_there_are_different_rows() -> None:
    numbers = find_domains(np.repeat(noise(7), 9, axis=0), None, starts=2).numbers
    assert numbers is not None
    assert numbers["domains"].tolist() == [3, 4, 5, 6]


def test_one_domain_is_all_spots() -> None:
    domains = find_domains(noise(31), 1, starts=2)
    assert not domains.labels.any()
    assert domains.agreement == 1


def test_as_many_domains_as_spots_are_one_each() -> None:
    labels = find_domains(noise(7), 7, starts=2).labels
    assert sorted(labels) == list(range(7))


@pytest.mark.parametrize("count", [None, 3])
def test_leiden_finds_separated_groups(count: int | None) -> None:
    rows, truth = groups(61, 43, 29)
    domains = find_domains(rows, count, method="leiden")
    assert domains.starts is None
    assert domains.agreement is None
    if count is None:  # at its own resolution, groups may be split, but not mixed
        assert all(len(set(truth[domains.labels == d])) == 1 for d in range(domains.count))
    else:
        assert np.array_equal(domains.labels, truth)


def test_leiden_says_which_number_it_can_give() -> None:
    rows, _ = groups(61, 43, 29)
    with pytest.raises(InputError, match=r"no resolution gives 2 communities, .* or n=3"):
        find_domains(rows, 2, method="leiden")


def test_whitened_rows_have_no_correlations_and_no_empty_directions() -> None:
    generator = np.random.default_rng(0)
    rows = noise() @ generator.standard_normal((WIDTH, WIDTH))
    rows = np.column_stack([rows, rows @ generator.standard_normal(WIDTH), np.full(211, 7.0)])
    white = whiten(rows)
    assert white.shape == (211, WIDTH)
    np.testing.assert_allclose(np.cov(white.T), np.eye(WIDTH), atol=1e-9)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-9)


@examples(40)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=23),
    reference=st.lists(st.integers(0, 3), min_size=23, max_size=23),
)
def test_aligned_labels_agree_with_the_reference_as_well_as_any_renaming(
    labels: list[int], reference: list[int]
) -> None:
    one, other = np.array(labels), np.array(reference[: len(labels)])
    renamed = aligned(one, other)
    best = max((np.array(names)[one] == other).sum() for names in permutations(range(4)))
    assert (renamed == other).sum() == best
    assert adjusted_rand_score(renamed, one) == 1  # renamed, and nothing else


def test_refining_gives_strays_the_domain_around_them() -> None:
    generator = np.random.default_rng(0)
    places = generator.random((307, 2))
    truth = (places[:, 0] > 0.5).astype(np.int64)
    strays = generator.choice(307, 13, replace=False)
    labels = truth.copy()
    labels[strays] = 1 - labels[strays]
    refined = refine(labels, places, spatial_graph(places))
    far = np.abs(places[:, 0] - 0.5) > 0.3
    assert np.array_equal(refined[far], truth[far])
    assert not np.array_equal(labels[far], truth[far])
    nearest = np.argsort(cdist(places, places), axis=1)[:, 1:51]
    of_ones = labels[nearest].sum(axis=1)
    expected = np.where(of_ones == 25, labels, of_ones > 25)  # a tie changes nothing
    assert np.array_equal(refined, expected)


def test_slices_are_refined_by_themselves() -> None:
    places = np.random.default_rng(0).random((83, 2))
    doubled, slices = np.concatenate([places, places]), np.repeat(["a", "b"], 83)
    labels = np.repeat([0, 1], 83)
    graph = spatial_graph(doubled, slices=slices)
    assert np.array_equal(refine(labels, doubled, graph), labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding": noise(7), "count": 8}, r"1 to 7 domains, one per spot; found n=8"),
        ({"count": 0}, "found n=0"),
        ({"embedding": np.where(noise() > 2, np.nan, noise())}, "of 211 spots have embeddings th"),
        ({"embedding": noise()[:, 0]}, r"\[spots, width\], found shape \[211\]"),
        ({"embedding": np.zeros((0, 5))}, r"found shape \[0, 5\]"),
        ({"method": "kmeans"}, "unknown method 'kmeans': choose mixture, leiden, mclust"),
        ({"starts": 0}, "at least 1 start, found 0"),
        ({"method": "mclust", "count": None}, "mclust needs a number of domains"),
        ({"embedding": np.ones((31, 5)), "count": 2}, "has 1 different row.*found n=2"),
        ({"embedding": np.repeat(noise(3), 9, axis=0)}, "has 3 different rows.*found n=4"),
    ],
)
def test_what_has_no_domains_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"embedding": noise(), "count": 4, "starts": 2} | changes
    with pytest.raises(InputError, match=message):
        find_domains(**arguments)


def test_mclust_without_r_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no Rscript: install R and its package mclust, or use"):
        find_domains(noise(), 3, method="mclust")


def test_what_r_says_when_it_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "Rscript"
    script.write_text("#!/bin/sh\necho 'there is no package called mclust' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(InputError, match="R's mclust failed: there is no package called mclust"):
        find_domains(noise(), 3, method="mclust")
