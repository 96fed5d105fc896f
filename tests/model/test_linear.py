"""The linear path of an annotator: what it computes, and that it is stored with the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cellpatch_fast import (
    CellPatch,
    CellPatchAnnotator,
    CellPatchConfig,
    GeneVocabulary,
    RaggedCells,
    cli,
)
from cellpatch_fast.model import fingerprint
from cellpatch_fast.model.linear import LinearPath

GENES, CLASSES = 43, 5
ROUNDING = 2.0**-23  # of a float32 operation, relative

lengths_of = st.lists(st.integers(0, 37), min_size=1, max_size=11)


def path_of(seed: int, classes: int = CLASSES) -> LinearPath:
    random = np.random.default_rng(seed)
    path = LinearPath(GENES, classes)
    path.values.copy_(torch.from_numpy(random.normal(size=(GENES, classes))))
    path.seen.copy_(torch.from_numpy(random.normal(size=(GENES, classes))))
    path.bias.copy_(torch.from_numpy(random.normal(size=(2, classes))))
    path.shares.copy_(torch.tensor([0.2, 0.3, 0.5]))
    return path


def cells_of(seed: int, lengths: list[int], dtype: torch.dtype = torch.float32) -> RaggedCells:
    """Genes may be there twice in a cell."""
    random = np.random.default_rng(seed)
    offsets = torch.from_numpy(np.cumsum([0, *lengths]))
    genes = torch.from_numpy(random.integers(1, GENES, sum(lengths)).astype(np.uint16))
    values = torch.from_numpy(random.integers(1, 8, sum(lengths))).to(dtype)
    if dtype.is_floating_point:
        values = values + torch.from_numpy(random.random(sum(lengths))).to(dtype)
    return RaggedCells(offsets, genes, values)


@given(
    st.integers(0, 99), lengths_of, st.sampled_from([torch.float32, torch.float16, torch.uint8]),
    st.sampled_from([1, 2, CLASSES]),
)  # fmt: skip
def test_logits_are_products_with_the_tables(
    seed: int, lengths: list[int], dtype: torch.dtype, classes: int
) -> None:
    """To float32 rounding: of each entry's product, and of every sum."""
    path, cells = path_of(seed, classes), cells_of(seed, lengths, dtype)
    found = path.logits(cells)
    assert (found.dtype, found.shape) == (torch.float32, (2, len(lengths), classes))
    matrix, powers = np.zeros((2, len(lengths), GENES))
    cell = np.repeat(np.arange(len(lengths)), lengths)
    values = cells.values.double().numpy()
    np.add.at(matrix, (cell, cells.genes.numpy()), values)
    np.add.at(powers, (cell, cells.genes.numpy()), np.exp(values / 2))
    powers /= np.maximum(powers.sum(axis=1, keepdims=True), 1e-300)
    for logits, features, table, bias in zip(
        found.double().numpy(), (matrix, powers), (path.values, path.seen), path.bias, strict=True
    ):
        weights = table.double().numpy()
        expected = features @ weights + bias.double().numpy()
        size = features @ abs(weights) + abs(bias.double().numpy())
        steps = 2 * np.array(lengths)[:, None] + 10  # two sums over the entries, and some more
        assert (abs(logits - expected) <= steps * ROUNDING * size).all()


@given(st.integers(0, 99), lengths_of, st.integers(0, 10), st.integers(0, 10))
def test_bits_of_a_cell_do_not_depend_on_its_batch(
    seed: int, lengths: list[int], one: int, other: int
) -> None:
    path, cells = path_of(seed), cells_of(seed, lengths)
    start, stop = sorted((one % len(lengths), other % len(lengths)))
    whole = path.logits(cells)
    assert torch.equal(path.logits(cells.slice(start, stop + 1)), whole[:, start : stop + 1])
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(lengths)))
    assert torch.equal(path.logits(cells.take(order)), whole[:, order])


def test_an_empty_cell_has_the_bias() -> None:
    path = path_of(0)
    found = path.logits(cells_of(0, [0, 7, 0]))
    for cell in (0, 2):
        assert torch.equal(found[:, cell], path.bias)
    assert torch.equal(path.logits(cells_of(0, [0]))[:, 0], path.bias)
    assert path.logits(cells_of(0, [])).shape == (2, 0, CLASSES)


def test_probabilities_are_mixed_by_shares() -> None:
    path, cells = path_of(0), cells_of(0, [5, 0, 19])
    network = torch.softmax(torch.randn(3, CLASSES), 1)
    values, seen = torch.softmax(path.logits(cells), 2)
    expected = 0.2 * values + 0.3 * seen + 0.5 * network
    found = path.mixture(cells, network)
    assert (found - expected).abs().max() <= 4 * ROUNDING
    assert torch.equal(LinearPath(GENES, CLASSES).mixture(cells, network), network)  # as it begins


# --- in an annotator ----------------------------------------------------------------------------


Make = Callable[..., CellPatchAnnotator]


@pytest.fixture
def make() -> Make:
    """``make(linear)``: a small annotator."""

    def make(linear: bool) -> CellPatchAnnotator:
        vocabulary = GeneVocabulary([""] * (GENES - 1), [f"gene{i}" for i in range(1, GENES)])
        config = CellPatchConfig(
            max_genes=GENES, patches=3, dim=6, mlp_dim=7, self_attention_blocks=1,
            projection_dim=None, temperature=1.7,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = CellPatchAnnotator(config, vocabulary, list("abcde"), linear).eval()
        if model.linear is not None:
            model.linear = path_of(3)
        return model

    return make


def probabilities(model: CellPatchAnnotator, cells: RaggedCells) -> torch.Tensor:
    with torch.inference_mode():
        return model.probabilities(cells, model.encode(cells))


@pytest.mark.parametrize("linear", [True, False])
def test_what_is_loaded_has_the_bits_of_what_was_saved(
    make: Make, tmp_path: Path, linear: bool
) -> None:
    model, cells = make(linear), cells_of(1, [5, 0, 19])
    model.save_pretrained(tmp_path / "model")
    loaded = CellPatchAnnotator.from_pretrained(tmp_path / "model")
    assert (loaded.linear is not None) == linear
    assert loaded.config == model.config
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert any(name.startswith("linear.") for name in state) == linear
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(probabilities(loaded, cells), probabilities(model, cells))


def test_probabilities_are_a_mixture_with_the_tempered_network(make: Make) -> None:
    cells = cells_of(1, [5, 0, 19])
    model, plain = make(True), make(False)
    with torch.inference_mode():
        network = torch.softmax(plain.logits(cells) / 1.7, 1)
        assert (probabilities(plain, cells) - network).abs().max() <= 4 * ROUNDING
        assert model.linear is not None
        expected = model.linear.mixture(cells, probabilities(plain, cells))
    assert torch.equal(probabilities(model, cells), expected)
    assert expected.sum(1).numpy() == pytest.approx(1, abs=8 * ROUNDING)


def test_an_annotator_with_a_linear_path_is_an_encoder_like_any_other(
    make: Make, tmp_path: Path
) -> None:
    """It is also one to make another annotator from, which begins without a temperature."""
    model, plain, cells = make(True), make(False), cells_of(1, [5, 19])
    model.save_pretrained(tmp_path / "model")
    encoder = CellPatch.from_pretrained(tmp_path / "model")
    with torch.inference_mode():
        assert torch.equal(encoder.encode(cells), model.encode(cells))
    assert fingerprint(model) == fingerprint(plain) == fingerprint(encoder)
    for start in (encoder, model):
        further = CellPatchAnnotator.from_encoder(start, ["x", "y"], linear=True)
        assert further.config.temperature == 1.0
        assert further.linear is not None
        assert further.linear.shares.tolist() == [0.0, 0.0, 1.0]
        assert torch.equal(further.gene_embedding.weight, model.gene_embedding.weight)


@pytest.mark.parametrize("linear", [True, False])
def test_annotators_are_inspected(
    make: Make, tmp_path: Path, linear: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    make(linear).save_pretrained(tmp_path / "model")
    assert cli.main(["inspect", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    facts: dict[str, Any] = dict(line.split(": ", 1) for line in out.splitlines())
    assert facts["kind"] == "CellPatchAnnotator model"
    assert facts["classes"] == "a, b, c, d, e"
    assert facts["temperature"] == "1.7"
