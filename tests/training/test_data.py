"""How labelled cells are split, and that a run goes on with the same labels and split only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellpatch_fast import CellPatchConfig, GeneVocabulary, InputError
from cellpatch_fast.training import FinetuningSettings, data, finetune

shares = st.floats(0, 0.95)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), shares, shares, st.integers(0, 9))
def test_every_class_keeps_cells_to_train_on(
    sizes: list[int], test: float, validation: float, seed: int
) -> None:
    """And has some in each other part, if it has three cells and the part is wanted."""
    if test + validation >= 1:
        test, validation = test / 2, validation / 2
    settings = FinetuningSettings(test=test, validation=validation, patience=0, seed=seed)
    codes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    names = tuple(map(str, range(len(sizes))))
    split = data.split_labelled(data.Labels(names, codes, 0, {}), settings)
    counts = {part: np.bincount(codes[rows], minlength=len(sizes)) for part, rows in split.items()}
    assert counts["training"].all()
    for part, share in (("test", test), ("validation", validation)):
        assert ((counts[part] > 0) == ((share > 0) & (np.array(sizes) >= 3))).all()
    assert sorted(np.concatenate(list(split.values()))) == list(range(len(codes)))


def test_runs_with_other_labels_or_another_split_do_not_go_on(
    finetuning: Callable[..., FinetuningSettings], labelled: anndata.AnnData,
    config: CellPatchConfig, small_vocabulary: GeneVocabulary, tmp_path: Path,
) -> None:  # fmt: skip
    """Of an object in memory, whose matrix is the same."""

    def start(adata: anndata.AnnData) -> None:
        options: dict[str, Any] = {"config": config, "vocabulary": small_vocabulary}
        options |= {"label": "type", "split_column": "part", "settings": finetuning(epochs=1)}
        finetune(adata, tmp_path / "run", **options)

    adata = labelled.copy()
    adata.obs["part"] = ["train"] * 100 + ["val"] * 20 + ["test"] * 27
    start(adata)
    start(adata)  # the same: nothing to do
    for column, values in (("type", adata.obs["type"][::-1]), ("part", adata.obs["part"][::-1])):
        other = adata.copy()
        other.obs[column] = np.asarray(values)
        with pytest.raises(InputError, match=r"other settings.*\n  cells: was"):
            start(other)
