"""Users hand samplers of their own to the loader, which follows them and checks what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

from cellpatch_fast import CellPatch, RaggedCells
from cellpatch_fast.loading import CellLoader, Epoch, Sampler, Window
from cellpatch_fast.preprocessing.masking import Masking

from .batches import CELLS, assert_same, assert_same_batches, load, loading_threads


class ByClass:
    """As many cells of each class in every batch, drawn with replacement; windows of batches."""

    def __init__(self, classes: np.ndarray, of_each: int, batches: int) -> None:
        self.members = [np.flatnonzero(classes == name) for name in np.unique(classes)]
        self.of_each, self.batches = of_each, batches

    def batches_per_epoch(self, cells: int) -> int:
        return self.batches

    def windows(self, epoch: Epoch) -> Iterator[Window]:
        random = np.random.default_rng(epoch.number)
        for start in range(0, self.batches, 3):
            yield Window.of(
                [
                    np.concatenate([random.choice(cells, self.of_each) for cells in self.members])
                    for _ in range(start, min(start + 3, self.batches))
                ]
            )


class Fixed:
    """The windows it was given."""

    def __init__(self, *windows: Window) -> None:
        self.given = windows

    def batches_per_epoch(self, cells: int) -> int:
        raise TypeError("nobody knows")

    def windows(self, epoch: Epoch) -> Iterator[Window]:
        yield from self.given


@pytest.fixture(scope="module")
def path(adata: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampled") / "cells.h5ad"
    adata.write_h5ad(path, compression="gzip")
    return path


def test_classes_come_as_often_as_the_sampler_says(
    path: Path, adata: anndata.AnnData, small_model: CellPatch, tokens: RaggedCells
) -> None:
    classes = np.where(np.arange(CELLS) < 17, "rare", "common")
    sampler: Sampler = ByClass(classes, of_each=5, batches=7)
    with CellLoader(path, small_model.vocabulary, small_model.config, sampler=sampler) as loader:
        assert len(loader) == 7
        first, second = list(loader), list(loader)
    for batch in first:
        assert (classes[batch.rows] == "rare").sum() == 5
        assert (classes[batch.rows] == "common").sum() == 5
        assert_same(batch.cells, tokens.take(torch.from_numpy(batch.rows)))
    assert [len(batches) for batches in (first, second)] == [7, 7]
    assert any((a.rows != b.rows).any() for a, b in zip(first, second, strict=True))


def test_an_epoch_goes_on_from_any_batch_whatever_the_threads(
    path: Path, small_model: CellPatch
) -> None:
    """With masks too, of the seed that was given."""
    options: dict[str, Any] = {
        "sampler": ByClass(np.arange(CELLS) % 3, of_each=2, batches=10),
        "masking": Masking(),
        "seed": 3,
    }
    whole = load(path, small_model, threads=1, **options)
    model: dict[str, Any] = {"vocabulary": small_model.vocabulary, "config": small_model.config}
    for first in (0, 4, 9):
        with CellLoader(path, **model, threads=3, **options) as loader:
            loader.first_batch = first
            assert_same_batches(list(loader), whole[first:])
    other = load(path, small_model, **options | {"seed": 4})
    assert any(
        not torch.equal(a.cells.genes, b.cells.genes) for a, b in zip(whole, other, strict=True)
    )


def test_positions_count_the_cells_that_take_part(path: Path, small_model: CellPatch) -> None:
    sampler = Fixed(Window.of([np.array([3, 0]), np.array([], np.int64), np.array([4])]))
    batches = load(path, small_model, sampler=sampler, rows=[(7, 10), (50, 52)])
    assert [batch.rows.tolist() for batch in batches] == [[50, 7], [], [51]]


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Window.of([np.array([0, CELLS])]), "positions 0 to 211, which are not within 0 to 210"),
        (Window.of([np.array([-1, 3])]), "positions -1 to 3, which are not within 0 to 210"),
        (Window.of([np.array([0.5])]), "positions of type float64"),
        (Window(np.arange(5), np.array([0, 3])), "make it with Window.of"),
        (Window(np.arange(5), np.array([0, 4, 2, 5])), "make it with Window.of"),
    ],
    ids=["beyond", "negative", "fractions", "cut short", "cut backwards"],
)
def test_what_is_no_window_of_the_cells_is_refused(
    path: Path, small_model: CellPatch, window: Window, message: str
) -> None:
    sampler = Fixed(Window.of([np.arange(2)]), window)
    with pytest.raises(ValueError, match=rf"window 1 of the sampler has .*{message}"):
        load(path, small_model, sampler=sampler)
    assert loading_threads() == []


def test_options_that_the_sampler_would_not_see_are_refused(
    path: Path, small_model: CellPatch
) -> None:
    options: dict[str, Any] = {"shuffle": True, "batch_size": 7, "weights": np.ones(CELLS)}
    with pytest.raises(ValueError, match="leave out batch_size, shuffle, weights"):
        load(path, small_model, sampler=Fixed(), **options)
