"""The reference computes what the design says, checked against loops in float64 NumPy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cellpatch_fast.kernels import EncoderWeights, encode, reference
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]

LENGTHS = [3, 0, 19, 1, 0, 11]
PADS = [2, 0, 0, 5, 3, 1]
DIMENSIONS: dict[str, Any] = {
    "heads": 3,
    "head_dim": 5,
    "patches": 7,
    "genes": 43,
    "mlp_dim": 11,
    "projection": 2,
    "dtype": torch.float64,
}
TOLERANCE = 1e-12  # float64


# --- the definition ----------------------------------------------------------------------------


class Cell(NamedTuple):
    """What one cell gives: features [p, E] and attention weights."""

    features: np.ndarray
    cross: np.ndarray  # [entries + pads, h, p]
    blocks: list[np.ndarray]  # [h, p, p] of each self-attention block
    attended: np.ndarray  # [p, D]: the cross-attention's


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda number: number * (1 + math.erf(number / math.sqrt(2))) / 2)(x)


def attend(block: Any, x: np.ndarray, to: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of x attend to rows of ``to``: values [rows, D] and weights [to, h, rows]."""
    queries, keys, values = (
        rows @ weight.T + bias
        for rows, weight, bias in zip(
            (x, to, to), np.split(block.in_weight, 3), np.split(block.in_bias, 3), strict=True
        )
    )
    head_dim = x.shape[1] // heads
    attended, attention = np.zeros_like(x), np.zeros((len(to), heads, len(x)))
    for h, p in itertools.product(range(heads), range(len(x))):
        part = slice(h * head_dim, (h + 1) * head_dim)
        scores = [query_key / math.sqrt(head_dim) for query_key in keys[:, part] @ queries[p, part]]
        exps = [math.exp(score - max(scores)) for score in scores]
        for i, exp in enumerate(exps):
            attention[i, h, p] = exp / sum(exps)
            attended[p, part] += attention[i, h, p] * values[i, part]
    return attended, attention


def finish(block: Any, x: np.ndarray, attended: np.ndarray) -> np.ndarray:
    x = x + attended @ block.out_weight.T + block.out_bias
    x = layer_norm(x, block.attention_norm_weight, block.attention_norm_bias)
    inner = gelu(x @ block.up_weight.T + block.up_bias)
    x = x + inner @ block.down_weight.T + block.down_bias
    return layer_norm(x, block.mlp_norm_weight, block.mlp_norm_bias)


def define(weights: EncoderWeights, genes: Tensor, values: Tensor, pads: int) -> Cell:
    """One cell; its pads are written out as so many entries of gene 0 and value 0."""
    tensors, structure = weights.flatten()
    w: Any = EncoderWeights.unflatten([t.numpy() for t in tensors], structure)  # type: ignore[misc]
    entries = [*zip(genes.tolist(), values.tolist(), strict=True), *[(0, 0)] * pads]
    rows = np.zeros((len(entries), w.genes.shape[1]))
    for i, (gene, value) in enumerate(entries):
        rows[i] = w.genes[gene]
        if w.value_bins is None:
            rows[i] += value * w.value_weight + w.value_bias
        else:
            rows[i] += w.value_bins[value]
    attended, cross = attend(w.cross, w.patches, rows, w.heads)
    x, blocks = finish(w.cross, w.patches, attended), []
    for block in w.self_blocks:
        among, attention = attend(block, x, x, w.heads)
        blocks.append(attention.transpose(1, 2, 0))
        x = finish(block, x, among)
    if w.projection_weight is not None:
        x = x @ w.projection_weight.T + w.projection_bias
    return Cell(x, cross, blocks, attended)


# --- right -------------------------------------------------------------------------------------


def assert_equal(found: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("pads", [None, PADS], ids=["alone", "pads"])
@pytest.mark.parametrize("projection", [2, None])
@pytest.mark.parametrize("self_blocks", [0, 1, 3])
@pytest.mark.parametrize("values", ["integers", "continuous", "binned"])
def test_every_output_is_the_definition_s(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    values: str,
    self_blocks: int,
    projection: int | None,
    pads: list[int] | None,
) -> None:
    bins = 5 if values == "binned" else None
    weights = random_weights(
        **DIMENSIONS | {"bins": bins, "self_blocks": self_blocks, "projection": projection}
    )
    cells = random_cells(
        LENGTHS, genes=43, bins=None if values == "continuous" else 5, dtype=torch.float64
    )
    encoded = encode(
        weights, cells.offsets, cells.genes, cells.values,
        pads=None if pads is None else torch.tensor(pads), attention=True, backend="reference",
    )  # fmt: skip
    assert encoded.features.dtype == torch.float64
    assert encoded.cross_attention is not None
    assert encoded.pad_attention is not None
    assert encoded.self_attention is not None
    assert len(encoded.self_attention) == self_blocks
    for cell, length in enumerate(LENGTHS):
        first, last = cells.offsets[cell : cell + 2]
        expected = define(
            weights, cells.genes[first:last], cells.values[first:last], pads[cell] if pads else 0
        )
        assert_equal(encoded.features[cell], expected.features)
        assert_equal(encoded.cross_attention[first:last], expected.cross[:length])
        assert_equal(encoded.pad_attention[cell], expected.cross[length:].sum(0))
        for found, block in zip(encoded.self_attention, expected.blocks, strict=True):
            assert_equal(found[cell], block)


@pytest.mark.parametrize("bins", [None, 5])
def test_cross_attention_alone_is_the_definition_s(
    random_weights: MakeWeights, random_cells: MakeCells, bins: int | None
) -> None:
    weights = random_weights(**DIMENSIONS, bins=bins)
    cells = random_cells(LENGTHS, genes=43, bins=5)
    crossed = reference.patch_cross_attention(
        weights, cells.offsets, cells.genes, cells.values, pads=torch.tensor(PADS)
    )
    for cell, pads in enumerate(PADS):
        first, last = cells.offsets[cell : cell + 2]
        expected = define(weights, cells.genes[first:last], cells.values[first:last], pads)
        assert_equal(crossed.attended[cell], expected.attended)
        assert_equal(crossed.weights[first:last], expected.cross[: last - first])


def test_scores_of_hundreds_are_right(random_weights: MakeWeights, random_cells: MakeCells) -> None:
    weights = random_weights(**DIMENSIONS, gene_scores=200.0, value_scores=200.0)
    cells = random_cells([23, 31], genes=43)
    features = reference.encode(weights, cells.offsets, cells.genes, cells.values).features
    for cell in range(2):
        first, last = cells.offsets[cell : cell + 2]
        expected = define(weights, cells.genes[first:last], cells.values[first:last], 0)
        # scores of 400 have an error of 400 units of 2e-16
        np.testing.assert_allclose(features[cell], expected.features, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("genes", [torch.uint16, torch.uint32, torch.int64])
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
def test_integer_types_do_not_matter(
    random_weights: MakeWeights, random_cells: MakeCells, genes: torch.dtype, offsets: torch.dtype
) -> None:
    weights, cells = random_weights(**DIMENSIONS), random_cells(LENGTHS, genes=43)
    expected = reference.encode(weights, cells.offsets, cells.genes, cells.values).features
    found = reference.encode(
        weights, cells.offsets.to(offsets), cells.genes.to(genes), cells.values
    ).features
    assert torch.equal(found, expected)


# --- an empty cell attends to nothing ----------------------------------------------------------


def test_attended_value_of_an_empty_cell_is_zero(
    random_weights: MakeWeights, random_cells: MakeCells
) -> None:
    weights, cells = random_weights(**DIMENSIONS), random_cells(LENGTHS, genes=43)
    attended = reference.patch_cross_attention(
        weights, cells.offsets, cells.genes, cells.values
    ).attended
    empty = torch.tensor(LENGTHS) == 0
    assert (attended[empty] == 0).all()
    assert (attended[~empty] != 0).all()


def test_dropping_all_attention_is_attending_to_nothing(
    random_weights: MakeWeights, random_cells: MakeCells
) -> None:
    weights, cells = random_weights(**DIMENSIONS, self_blocks=0), random_cells([5, 0], genes=43)
    batch = weights, cells.offsets, cells.genes, cells.values
    assert not reference.patch_cross_attention(*batch, dropout=1.0).attended.any()
    full, empty = reference.encode(*batch, dropout=1.0).features
    # equal rows of a product of PyTorch's need not be equal: some libraries round each as it comes
    assert_equal(full, empty.numpy())


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["continuous", "binned"])
def test_gradients_of_every_weight(
    random_weights: MakeWeights, random_cells: MakeCells, values: str
) -> None:
    """Of features and attention weights, with an empty cell, a duplicated gene and pads."""
    bins = 3 if values == "binned" else None
    weights = random_weights(
        heads=2, head_dim=3, patches=5, genes=7, mlp_dim=2, projection=1, bins=bins,
        dtype=torch.float64,
    )  # fmt: skip
    cells = random_cells([2, 0, 3], genes=7, bins=bins, dtype=torch.float64)
    cells.genes[-1] = cells.genes[-2]
    tensors, structure = weights.flatten()
    differentiable = [cells.values] if cells.values.is_floating_point() else []

    def loss(*inputs: Tensor) -> Tensor:
        """All outputs in one number, each element with its own random factor."""
        encoded = reference.encode(
            EncoderWeights.unflatten(list(inputs[: len(tensors)]), structure),
            cells.offsets,
            cells.genes,
            inputs[-1] if differentiable else cells.values,
            pads=torch.tensor([1, 0, 0]),
            attention=True,
        )
        assert encoded.cross_attention is not None
        assert encoded.pad_attention is not None
        assert encoded.self_attention is not None
        generator = torch.Generator().manual_seed(5)
        return sum(
            (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
            for output in (
                encoded.features,
                encoded.cross_attention,
                encoded.pad_attention,
                *encoded.self_attention,
            )
        )  # type: ignore[return-value]

    inputs = [tensor.clone().requires_grad_() for tensor in (*tensors, *differentiable)]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_gradients_of_a_batch_of_empty_cells_are_finite(random_weights: MakeWeights) -> None:
    weights = random_weights(**DIMENSIONS)
    tensors, structure = weights.flatten()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    none = torch.zeros(0, dtype=torch.int64)
    features = encode(
        EncoderWeights.unflatten(leaves, structure),
        torch.zeros(4, dtype=torch.int64),
        none,
        none.to(torch.uint8),
    ).features
    features.square().sum().backward()
    used = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(used) > 12
    assert all(grad.isfinite().all() for grad in used)


def test_deterministic_gradients_are_the_same_every_time(
    random_weights: MakeWeights, random_cells: MakeCells, two_threads: None
) -> None:
    """Genes that thousands of entries share, where atomics would add up in any order."""
    cells = random_cells([3000] * 5, genes=43)
    gradients = []
    torch.use_deterministic_algorithms(True)
    for _ in range(3):
        weights = random_weights(**DIMENSIONS | {"dtype": torch.float32})
        weights.genes.requires_grad_()
        features = encode(weights, cells.offsets, cells.genes, cells.values).features
        features.pow(3).sum().backward()
        gradients.append(weights.genes.grad)
    torch.use_deterministic_algorithms(False)
    first, *others = gradients
    assert first is not None
    assert all(other is not None and torch.equal(other, first) for other in others)
