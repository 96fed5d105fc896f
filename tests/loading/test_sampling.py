"""The order of an epoch: exact sets of cells, whatever the sizes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellpatch_fast.loading import Epoch, Sampling, Window
from cellpatch_fast.loading.sampler import checked_windows
from cellpatch_fast.loading.sampling import warn_of_unequal_batches


def windows_of(
    sampling: Sampling,
    lengths: np.ndarray,
    number: int = 0,
    window_entries: int = 1 << 20,
    first_batch: int = 0,
) -> list[Window]:
    epoch = Epoch(number, len(lengths), lambda positions: lengths[positions], window_entries)
    return list(checked_windows(sampling.windows(epoch), epoch.cells, first_batch))


def batches_of(windows: list[Window]) -> list[np.ndarray]:
    return [batch for window in windows for batch in window.batches()]


samplings = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 40),
        "shuffle": st.booleans(),
        "block_size": st.integers(1, 30),
        "buffer_size": st.integers(1, 100),
        "seed": st.integers(0, 5),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    options=samplings,
    cells=st.integers(1, 300),
    world_size=st.integers(1, 5),
    drop_last=st.booleans(),
    window_entries=st.integers(1, 3_000),
)
def test_every_cell_comes_once_per_epoch_over_all_ranks(
    options: dict[str, Any], cells: int, world_size: int, drop_last: bool, window_entries: int
) -> None:
    lengths = np.random.default_rng(cells).integers(0, 50, cells)
    seen, counts = [], []
    for rank in range(world_size):
        sampling = Sampling(**options, rank=rank, world_size=world_size, drop_last=drop_last)
        batches = batches_of(windows_of(sampling, lengths, window_entries=window_entries))
        assert len(batches) == sampling.batches_per_epoch(cells)
        sizes = [len(batch) for batch in batches]
        assert all(size == sampling.batch_size for size in sizes[: None if drop_last else -1])
        seen += batches
        counts.append(sum(sizes))
    cells_seen = np.sort(np.concatenate(seen)) if seen else np.empty(0, int)
    if drop_last:
        assert len(set(counts)) == 1
        assert len(np.unique(cells_seen)) == len(cells_seen) == sum(counts)
        assert cells - len(cells_seen) < world_size * options["batch_size"]
    else:
        np.testing.assert_array_equal(cells_seen, np.arange(cells))
        assert max(counts) - min(counts) <= 1


@settings(max_examples=150, deadline=None)
@given(
    options=samplings,
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=200),
    max_entries=st.integers(1, 150),
    world_size=st.integers(1, 5),
    window_entries=st.integers(1, 1_000),
)
def test_batches_by_entries_stay_within_the_budget_unless_one_cell_is_longer(
    options: dict[str, Any],
    lengths: list[int],
    max_entries: int,
    world_size: int,
    window_entries: int,
) -> None:
    given_lengths = np.array(lengths)
    seen = []
    for rank in range(world_size):
        sampling = Sampling(**options, max_entries=max_entries, rank=rank, world_size=world_size)
        for batch in batches_of(windows_of(sampling, given_lengths, window_entries=window_entries)):
            assert 1 <= len(batch) <= sampling.batch_size
            assert given_lengths[batch].sum() <= max_entries or len(batch) == 1
            seen.append(batch)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(len(lengths)))


@settings(max_examples=100, deadline=None)
@given(
    options=samplings,
    cells=st.integers(1, 200),
    world_size=st.integers(1, 5),
    numbers=st.randoms(use_true_random=False),
)
def test_weighted_epochs_have_as_many_cells_each_within_one_of_its_share(
    options: dict[str, Any], cells: int, world_size: int, numbers: np.random.Generator
) -> None:
    weights = np.array([max(numbers.random() - 0.3, 0.0) for _ in range(cells)])
    weights[0] += 0.1
    options = {**options, "shuffle": True}
    lengths = np.ones(cells, int)
    batches = [
        batch
        for rank in range(world_size)
        for batch in batches_of(
            windows_of(
                Sampling(**options, rank=rank, world_size=world_size, weights=weights), lengths
            )
        )
    ]
    counts = np.bincount(np.concatenate(batches), minlength=cells)
    assert counts.sum() == cells
    share = weights * cells / weights.sum()
    assert (counts >= np.floor(share - 1e-9)).all()
    assert (counts <= np.ceil(share + 1e-9)).all()


def test_weights_hold_on_average() -> None:
    weights = np.array([1.0, 2.0, 0.0, 0.5, 4.0] * 7)
    lengths = np.ones(len(weights), int)
    sampling = Sampling(batch_size=5, shuffle=True, block_size=3, buffer_size=10, weights=weights)
    counts = np.zeros(len(weights))
    for number in range(400):
        for batch in batches_of(windows_of(sampling, lengths, number)):
            counts += np.bincount(batch, minlength=len(weights))
    # systematic sampling: a cell's count per epoch varies by less than one, s.d. at most 0.5
    np.testing.assert_allclose(counts / 400, weights * 35 / weights.sum(), atol=4 * 0.5 / 20)


@settings(max_examples=100, deadline=None)
@given(
    options=samplings,
    cells=st.integers(1, 300),
    world_size=st.integers(1, 5),
    first_batch=st.integers(0, 12),
    window_entries=st.integers(1, 3_000),
)
def test_ranks_that_share_batches_have_those_of_one_process(
    options: dict[str, Any], cells: int, world_size: int, first_batch: int, window_entries: int
) -> None:
    """Also when an epoch is begun in its middle."""
    lengths = np.random.default_rng(cells).integers(0, 50, cells)
    whole = batches_of(windows_of(Sampling(**options), lengths))[first_batch:]
    parts = []
    for rank in range(world_size):
        sampling = Sampling(**options, rank=rank, world_size=world_size, share_batches=True)
        windows = windows_of(
            sampling, lengths, window_entries=window_entries, first_batch=first_batch
        )
        parts.append(batches_of(windows))
        assert len(parts[-1]) == max(0, sampling.batches_per_epoch(cells) - first_batch)
    for batch, *shares in zip(whole, *parts, strict=True):
        assert np.array_equal(batch, np.concatenate(shares))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_file_order_is_file_order() -> None:
    sampling = Sampling(batch_size=7)
    windows = windows_of(sampling, np.full(101, 13), window_entries=13 * 14)
    np.testing.assert_array_equal(
        np.concatenate([window.positions for window in windows]), np.arange(101)
    )
    assert {len(window.cuts) - 1 for window in windows[:-1]} == {2}


def test_windows_in_file_order_change_no_batch() -> None:
    lengths = np.random.default_rng(3).integers(0, 900, 500)
    sampling = Sampling(batch_size=17, max_entries=5_000)
    few = batches_of(windows_of(sampling, lengths, window_entries=1))
    many = batches_of(windows_of(sampling, lengths, window_entries=100_000))
    for batch, other in zip(few, many, strict=True):
        np.testing.assert_array_equal(batch, other)


def test_epochs_differ_and_repeat() -> None:
    sampling = Sampling(batch_size=11, shuffle=True, block_size=4, buffer_size=33, seed=2)
    lengths = np.ones(211, int)
    first, again, second = (
        np.concatenate(batches_of(windows_of(sampling, lengths, number))) for number in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != second).mean() > 0.9


def test_shuffled_cells_stay_in_blocks_only_until_they_are_in_memory() -> None:
    sampling = Sampling(batch_size=8, shuffle=True, block_size=8, buffer_size=64)
    (window, *_) = windows_of(sampling, np.ones(1_024, int))
    blocks = set(window.positions // 8)
    assert len(blocks) == 8  # whole blocks, from all over the data
    assert len({int(position) // 8 for position in window.positions[:8]}) > 2  # mixed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not within 0 to 1"),
        ({"drop_last": True, "max_entries": 5}, "exclude each other"),
        ({"seed": -1}, "must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_the_number_of_batches_is_unknown_with_a_budget_of_entries() -> None:
    with pytest.raises(TypeError, match="depends on the cells"):
        Sampling(max_entries=7).batches_per_epoch(10)


@pytest.mark.parametrize(
    ("options", "cells", "numbers"),
    [
        ({"batch_size": 7, "world_size": 3}, 43, "1 of them 3 per epoch, 2 2"),
        ({"batch_size": 7, "world_size": 5, "drop_last": True}, 43, None),
        ({"batch_size": 7, "world_size": 3, "share_batches": True}, 43, None),
        ({"batch_size": 7, "world_size": 3}, 41, None),
        ({"batch_size": 7}, 43, None),
        ({"batch_size": 7, "world_size": 3, "max_entries": 11}, 41, "depend on their cells"),
        ({"batch_size": 7, "world_size": 3, "rank": 1}, 43, None),  # the first rank says it
    ],
)
def test_ranks_with_unequal_numbers_of_batches_are_warned_of(
    options: dict[str, Any], cells: int, numbers: str | None
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_unequal_batches(Sampling(**options), cells)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (numbers is not None)
    for message in messages:
        assert str(numbers) in message
        assert "share_batches=True" in message
