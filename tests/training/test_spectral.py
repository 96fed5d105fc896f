"""The spectral start of a new model: what gene rows span, and how patches look at values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from cellpatch_fast.kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from cellpatch_fast import CellLoader, CellPatchConfig, GeneVocabulary, InputError, MaskedGeneModel
from cellpatch_fast.training import PretrainingSettings, pretrain
from cellpatch_fast.training.distributed import Processes
from cellpatch_fast.training.expression import gene_weights, seen
from cellpatch_fast.training.spectral import start_from_data
from cellpatch_fast.training.starting import begin

from ..conftest import write_zarr
from .conftest import stream_of, weights

GENES = 41  # tokens, padding included
HALF_ULP = 2.0**-24  # of float32, relative


@pytest.fixture(scope="session")
def genes() -> GeneVocabulary:
    return GeneVocabulary([""] * (GENES - 1), [f"gene{i}" for i in range(1, GENES)])


def new_model(genes: GeneVocabulary, **changes: Any) -> MaskedGeneModel:
    fields: dict[str, Any] = {"max_genes": GENES, "patches": 5, "dim": 14, "heads": 2}
    fields |= {"mlp_dim": 11, "self_attention_blocks": 1, "value_rounding": "none"}
    if changes.get("value_embedding") == "binned":
        fields |= {"value_rounding": "round"}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MaskedGeneModel(CellPatchConfig(**fields | {"value_clip": 5.0} | changes), genes)


def random_values(seed: int, cells: int = 67) -> csr_array:
    """Whole numbers; genes are in few to all cells, gene 0 in none."""
    random = np.random.default_rng(seed)
    present = random.random((cells, GENES)) < random.random(GENES)
    found = np.where(present, random.integers(1, 6, (cells, GENES)), 0)
    found[:, 0] = 0
    return csr_array(found.astype(np.float32))


def rows_of(model: MaskedGeneModel) -> np.ndarray:
    return model.gene_embedding.weight.detach().double().numpy()


def slopes(model: MaskedGeneModel, genes: torch.Tensor) -> torch.Tensor:
    """How a score before the softmax grows with the value: float64 [values, genes, h, p]."""
    model = model.double()
    queries, gene_keys, _ = reference.project_tables(model.encoder_weights())
    values = torch.arange(6, dtype=torch.float64)
    value_keys, _ = reference.project_values(model.encoder_weights(), values)
    keys = gene_keys[genes] + value_keys[:, None]  # [v, g, h, d]
    return torch.einsum("phd,vghd->vghp", queries, keys).diff(dim=0)


# --- gene rows ----------------------------------------------------------------------------------


def test_gene_rows_span_the_directions_in_which_kinds_of_cells_differ(
    genes: GeneVocabulary,
) -> None:
    """Three kinds, of equal cells: what attention sees of them spans two known directions."""
    kinds = random_values(1, cells=3).toarray()
    values = csr_array(np.repeat(kinds, [11, 23, 7], axis=0))
    model = new_model(genes, dim=14)
    start_from_data(model, values, seed=0)
    rows = rows_of(model)
    matrix, _ = seen(values)
    _, weight = gene_weights(matrix)
    first, second, third = matrix.toarray()[[0, 11, 34]]
    known = np.stack([second - first, third - first], axis=1) * weight[:, None] ** 2
    assert np.linalg.matrix_rank(known) == 2
    assert not rows[:, 2:].any()
    for found, within in ((rows[:, :2], known), (known, rows[:, :2])):
        left = found - within @ np.linalg.lstsq(within, found, rcond=None)[0]
        # float32 rounds each number of a row: 2^-24 of it, and of those it is combined from
        assert np.abs(left).max() <= 100 * HALF_ULP * np.abs(found).max()


def test_what_a_dimension_tells_of_cells_is_as_much_as_any_other(genes: GeneVocabulary) -> None:
    """Means of gene rows, weighted as attention sees genes, are uncorrelated, of one variance."""
    values = random_values(2)
    model = new_model(genes, dim=6)
    start_from_data(model, values, seed=0)
    matrix, _ = seen(values)
    found = np.cov((matrix @ rows_of(model)[:, :5]).T, bias=True)
    np.testing.assert_allclose(found, found[0, 0] * np.eye(5), atol=1e-6 * found[0, 0])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.integers(1, 29), st.sampled_from([(2, 1), (6, 3), (14, 2), (13, 13)]))
def test_rank_size_and_zeros_of_gene_rows(
    genes: GeneVocabulary, seed: int, cells: int, sizes: tuple[int, int]
) -> None:
    """Also of fewer cells than dimensions."""
    dim, heads = sizes
    values = random_values(seed, cells)
    model = new_model(genes, dim=dim, heads=heads)
    start_from_data(model, values, seed=0)
    rows = rows_of(model)
    expressed = np.bincount(values.indices, minlength=GENES)
    matrix, _ = seen(values)
    _, weight = gene_weights(matrix)
    varying = np.count_nonzero(weight)
    rank = max(0, min(dim - 1, cells - 1, varying - 1))
    assert np.isfinite(rows).all()
    assert np.linalg.matrix_rank(rows, tol=1e-5 * np.abs(rows).max()) == rank
    assert not rows[0].any()
    assert not rows[:, rank:].any()  # the last carries the value
    assert not rows[expressed < 3].any()
    if rank:
        assert rows[weight > 0].any(axis=1).all()
        square = np.square(rows[values.indices, :rank]).mean()
        assert square == pytest.approx(1, rel=2 * HALF_ULP)


def test_cells_without_differences_leave_gene_rows_of_0(genes: GeneVocabulary) -> None:
    one = random_values(0, cells=1).toarray()
    for cells in (np.repeat(one, 7, axis=0), np.zeros_like(one)):
        model = new_model(genes)
        start_from_data(model, csr_array(cells), seed=0)
        assert not rows_of(model).any()
        assert all(x.isfinite().all() for x in model.state_dict().values())


# --- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", ["affine", "binned"])
@pytest.mark.parametrize(("dim", "heads"), [(2, 1), (6, 3), (14, 2), (35, 5), (13, 13)])
@pytest.mark.parametrize("patches", [1, 7])
def test_scores_grow_by_half_of_the_value_for_every_patch_and_head(
    genes: GeneVocabulary, embedding: str, dim: int, heads: int, patches: int
) -> None:
    changes: dict[str, Any] = {"value_embedding": embedding, "patches": patches}
    model = new_model(genes, dim=dim, heads=heads, **changes)
    with torch.no_grad():  # also where biases are not the 0 that they are drawn as
        model.cross_block.attention.in_proj_bias.normal_()
    start_from_data(model, random_values(5), seed=0)
    found = slopes(model, torch.arange(GENES))
    assert found.shape == (5, GENES, heads, patches)
    # ½ √d, as float32 holds it, over √d; and float64's rounding of scores of some size
    assert (found - 0.5).abs().max() <= 0.5 * HALF_ULP + 1e-12


def test_weights_of_attention_grow_with_the_root_of_counts(
    genes: GeneVocabulary,
) -> None:
    """As the encoder computes them: of two values of one gene, by e^½ for a unit."""
    model = new_model(genes)
    start_from_data(model, random_values(5), seed=0)
    model = model.double()
    values = torch.tensor([0.5, 1.7, 3.0, 4.9], dtype=torch.float64)
    cell = torch.tensor([0, 4]), torch.full((4,), 11), values
    found = reference.patch_cross_attention(model.encoder_weights(), *cell).weights
    expected = torch.softmax(values / 2, 0)[:, None, None].expand_as(found)
    assert (found - expected).abs().max() <= 8 * HALF_ULP  # scores of up to 2.45 of a float32 slope


def test_values_and_all_but_genes_values_and_queries_stay_as_drawn(genes: GeneVocabulary) -> None:
    model = new_model(genes)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    start_from_data(model, random_values(5), seed=0)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    attention = "cross_block.attention.in_proj_"
    assert changed == {
        *("gene_embedding.weight", "value_embedding.weight", "value_embedding.bias"),
        *(attention + "weight", attention + "bias"),
    }
    found, drawn = (x[attention + "weight"] for x in (model.state_dict(), before))
    assert torch.equal(found[28:], drawn[28:])  # what patches find
    others = [row for row in range(28) if row % 7]
    assert torch.equal(found[others][:, :-1], drawn[others][:, :-1])


# --- which cells, and from where ----------------------------------------------------------------


def test_starts_are_repeatable_whatever_the_random_state(genes: GeneVocabulary) -> None:
    found = []
    for state in (0, 1):
        torch.manual_seed(state)
        np.random.seed(state)  # noqa: NPY002  (what a global state would be)
        model = new_model(genes)
        start_from_data(model, random_values(5), seed=7)
        found.append(model.state_dict())
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_starts_are_those_of_the_training_cells_in_any_format(
    file: Path, labelled: anndata.AnnData, unrounded: CellPatchConfig, tmp_path: Path,
    small_vocabulary: GeneVocabulary,
) -> None:  # fmt: skip
    """Of rows, and of ranges; other cells have no part in it."""
    store = write_zarr(labelled, tmp_path / "cells.zarr")
    others = labelled.copy()
    others.X[101:] = others.X[101:][::-1, ::-1]
    found = []
    for data in (file, store, labelled, others):
        model = MaskedGeneModel(unrounded, small_vocabulary)
        rows = np.arange(101) if data is not file else np.array([[0, 37], [37, 101]])
        wanted = PretrainingSettings.for_few_cells(101, whitened=False)
        with (
            stream_of(data, small_vocabulary, unrounded) as stream,
            Processes.join("cpu", None) as processes,
        ):
            loader = CellLoader([stream], rows=rows, batch_size=wanted.batch_size)
            begin(model, loader, rows, wanted, processes)
        found.append(model.gene_embedding.weight.detach())
    assert all(torch.equal(x, found[0]) for x in found[1:])


def test_a_token_store_starts_as_its_rounded_values_do(
    file: Path, unrounded: CellPatchConfig, tmp_path: Path, small_vocabulary: GeneVocabulary
) -> None:
    """Its float16 change a value by 2^-11 at most; what that does to a gene row is bounded."""
    from cellpatch_fast import atlas
    from cellpatch_fast.training.expression import components, gather

    atlas.tokenize(
        file, tmp_path / "tokens.zarr", vocabulary=small_vocabulary, config=unrounded, shuffle=False
    )
    config = replace(unrounded, dim=4, heads=2)  # three components, as there are three types
    rows, found, spaces = np.arange(147), [], []
    for data in (file, tmp_path / "tokens.zarr"):
        with stream_of(data, small_vocabulary, config) as stream:
            values = gather([stream], rows, small_vocabulary.size, 0).values
        found.append(values.toarray())
        model = MaskedGeneModel(config, small_vocabulary)
        start_from_data(model, values, seed=0)
        matrix, _ = seen(values)
        spaces.append((matrix, components(matrix, 4, seed=0), rows_of(model)))
    exact, rounded = found
    assert (abs(rounded - exact) <= 2.0**-11 * exact).all()
    # Wedin: the spanned space turns by no more than the change over the gap that follows
    (matrix, known, start), (other, _, changed) = spaces
    mean, weight = gene_weights(matrix)
    other_mean, other_weight = gene_weights(other)
    change = (matrix.toarray() - mean) * weight - (other.toarray() - other_mean) * other_weight
    gap = known.singular_values[1] - known.singular_values[2]
    angle = np.linalg.norm(change, 2) / gap
    bases = [np.linalg.svd(known_rows[:, :2] / np.where(w > 0, w, 1)[:, None], False)[0]
             for known_rows, w in ((start, weight), (changed, other_weight))]  # fmt: skip
    turned = np.linalg.norm(bases[0] - bases[1] @ (bases[1].T @ bases[0]), 2)
    assert turned <= 2 * angle < 0.05


def test_a_model_of_one_dimension_is_refused(genes: GeneVocabulary) -> None:
    with pytest.raises(InputError, match=r"needs a dim of at least 2 .*, found 1"):
        start_from_data(new_model(genes, dim=1, heads=1), random_values(0), seed=0)


def test_rounded_values_are_said_to_be_coarse(
    genes: GeneVocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "cellpatch_fast"):
        start_from_data(new_model(genes), random_values(0), seed=0)
        assert not caplog.text
        start_from_data(new_model(genes, value_embedding="binned"), random_values(0), seed=0)
    assert "values are whole numbers here" in caplog.text


def test_runs_start_from_their_data_and_are_repeatable(
    pretraining: Callable[..., PretrainingSettings], file: Path, unrounded: CellPatchConfig,
    tmp_path: Path, small_vocabulary: GeneVocabulary,
) -> None:  # fmt: skip
    """A learning rate of nearly 0 leaves the start as it was."""
    common: dict[str, Any] = {"config": unrounded, "vocabulary": small_vocabulary}
    wanted = pretraining(epochs=1, spectral=True, learning_rate=1e-12)
    found = []
    for name in ("one", "two"):
        pretrain(file, tmp_path / name, settings=wanted, **common)
        found.append(weights(tmp_path / name)["gene_embedding.weight"])
    assert torch.equal(*found)
    assert not found[0][0].any()
    assert found[0][:, -1].abs().max() < 1e-9
    # a given model is not started again
    pretrain(file, tmp_path / "further", settings=wanted, model=tmp_path / "one")
    again = weights(tmp_path / "further")["gene_embedding.weight"]
    assert (again - found[0]).abs().max() < 1e-9
