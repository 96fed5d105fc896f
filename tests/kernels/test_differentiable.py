"""Training: gradients of every weight of the encoder, by the fast backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import (
    EncoderWeights,
    differentiable,
    encode,
    patch_attention,
    reference,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

from ..examples import examples
from .conftest import TOLERANCE, convert, errors_per_cell, make_cells, make_weights, move

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]


def trained(weights: EncoderWeights) -> tuple[EncoderWeights, list[Tensor]]:
    """The same weights, new leaves that need gradients."""
    tensors, structure = weights.flatten()
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return EncoderWeights.unflatten(leaves, structure), leaves


def names_of(weights: EncoderWeights) -> list[str]:
    """What `EncoderWeights.flatten` puts where."""
    tensors, structure = weights.flatten()
    numbered = EncoderWeights.unflatten([torch.tensor(i) for i in range(len(tensors))], structure)
    groups: dict[str, Any] = {"": numbered, "cross.": numbered.cross}
    groups |= {f"self_blocks.{b}.": block for b, block in enumerate(numbered.self_blocks)}
    names = {
        int(tensor): f"{group}{name}"
        for group, fields in groups.items()
        for name, tensor in fields._asdict().items()
        if isinstance(tensor, Tensor)
    }
    return [names[number] for number in range(len(tensors))]


def gradients(
    weights: EncoderWeights, cells: RaggedCells, **options: Any
) -> dict[str, Tensor | None]:
    """Of a loss in which every feature counts differently; in float64 for float64 weights."""
    given, leaves = trained(weights)
    values = cells.values
    if values.is_floating_point():
        values = values.to(weights.patches.dtype)
    features = encode(given, cells.offsets, cells.genes, values, **options).features
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(features.shape, generator=generator).to(features)
    found = torch.autograd.grad((features * weight).sum(), leaves, allow_unused=True)
    return dict(zip(names_of(weights), (g if g is None else g.cpu() for g in found), strict=True))


def assert_gradients(
    weights: EncoderWeights, cells: RaggedCells, backend: str, device: torch.device, **options: Any
) -> None:
    """As near those in float64 as 1e-5, or as the rounding of the largest score.

    An attention weight is the exponential of a score, so an absolute error of the one is a relative
    error of the other; and a score that float32 holds is known to 2^-24 of its size: 800 to 5e-5.
    What is added to all entries alike has the sum of their gradients, in which they cancel: it is
    as near as 1e-5 of the sum of their sizes.
    """
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    found = gradients(move(weights, device), cells.to(device), backend=backend, **there)
    exact = gradients(convert(weights, torch.float64), cells, backend="reference", **options)
    bound = max(TOLERANCE, 2**-24 * highest_score(weights, cells))
    for name, right in exact.items():
        one = found[name]
        if right is None or one is None:  # a weight that has no part in it
            assert right is one, name
            continue
        size = right.norm()
        if name in ("value_bias", "cross.in_bias"):
            assert exact["genes"] is not None
            size = torch.maximum(size, exact["genes"].abs().sum(0).norm())
        assert (one.double() - right).norm() <= bound * size, name


def highest_score(weights: EncoderWeights, cells: RaggedCells) -> float:
    """The largest absolute value of the parts that scores are sums of: of genes, and of values."""
    exact = convert(weights, torch.float64)
    queries, keys, _ = reference.project_tables(exact)
    parts = keys, reference.project_values(exact, cells.values)[0]
    scores = (torch.einsum("phd,nhd->nhp", queries, part).abs() for part in parts if len(part))
    return sum(float(part.max()) for part in scores)


@pytest.mark.parametrize("bins", [None, 6])
@pytest.mark.parametrize("mean", [False, True])
def test_every_weight_has_the_right_gradient(
    backend: str, device: torch.device, bins: int | None, mean: bool
) -> None:
    weights = make_weights(bins=bins, self_blocks=2)
    assert_gradients(weights, make_cells([19, 0, 1, 43]), backend, device, mean=mean)


def test_pads_are_attended_to_in_training_too(backend: str, device: torch.device) -> None:
    pads = torch.tensor([0, 3, 5, 0, 7])
    cells = make_cells([19, 0, 1, 0, 23], bins=None)
    assert_gradients(make_weights(), cells, backend, device, pads=pads)
    with torch.no_grad():
        found = encode_differentiably(move(make_weights(), device), cells, backend, device, pads)
        expected = reference.encode(make_weights(), *batch(cells), pads=pads).features
    assert errors_per_cell(found.cpu(), expected).max() <= 2 * TOLERANCE


def encode_differentiably(
    weights: EncoderWeights,
    cells: RaggedCells,
    backend: str,
    device: torch.device,
    pads: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    there = cells.to(device)
    return differentiable.encode(
        weights, there.offsets, there.genes, there.values,
        pads=None if pads is None else pads.to(device),
        mean=False, dropout=dropout, backend=backend,
    ).features  # fmt: skip


def batch(cells: RaggedCells) -> tuple[Tensor, Tensor, Tensor]:
    return cells.offsets, cells.genes, cells.values


@examples(6)
@given(
    lengths=st.lists(st.integers(0, 37), min_size=1, max_size=5),
    heads=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([3, 7, 11]),
    patches=st.sampled_from([1, 17, 67]),
    bins=st.sampled_from([None, 5]),
)
def test_gradients_for_all_shapes(
    lengths: list[int], heads: int, head_dim: int, patches: int, bins: int | None
) -> None:
    assume(heads * head_dim > 3)  # a layer norm of 3 numbers makes any rounding 100 times larger
    weights = make_weights(heads=heads, head_dim=head_dim, patches=patches, bins=bins)
    cells = make_cells(lengths, bins=bins or 4)
    assert_gradients(weights, cells, "numba", torch.device("cpu"))


@pytest.mark.parametrize("scores", [30.0, 400.0])
def test_any_range_of_scores(backend: str, device: torch.device, scores: float) -> None:
    weights = make_weights(gene_scores=scores, value_scores=scores)
    assert_gradients(weights, make_cells([29, 3, 1]), backend, device)


def test_the_same_weights_are_dropped_on_every_backend(backend: str, device: torch.device) -> None:
    """Forward and backward: gradients are those of the definition with the same mask."""
    if device.type == "cuda":
        pytest.skip("the seed comes from the device's own generator")
    cells = make_cells([19, 0, 5])
    found = []
    for name in ("reference", backend):
        weights, leaves = trained(make_weights(self_blocks=0))
        torch.manual_seed(11)
        features = encode_differentiably(weights, cells, name, device, dropout=0.4)
        loss = features.square().sum()
        found.append((features.detach(), torch.autograd.grad(loss, leaves)))
    (expected, rights), (features, ours) = found
    assert errors_per_cell(features, expected).max() <= TOLERANCE
    for one, right, name in zip(ours, rights, names_of(weights), strict=True):
        assert (one - right).norm() <= 2 * TOLERANCE * right.norm() + 1e-6, name
    with torch.no_grad():
        without = encode_differentiably(weights, cells, backend, device)
    assert errors_per_cell(features[[0, 2]], without[[0, 2]]).min() > 0.01


def test_the_cross_attention_alone_has_gradients(backend: str, device: torch.device) -> None:
    """Those of the attended values and of the log-sum-exp, biases included."""
    weights, cells = make_weights(), make_cells([19, 1, 7])
    results: list[list[Tensor | None]] = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        at = torch.device("cpu") if name == "reference" else device
        given, leaves = trained(move(convert(weights, dtype), at))
        attended, log_sum_exp = patch_attention(given, *batch(cells.to(at)), backend=name)
        loss = attended.square().sum() + (log_sum_exp.cumsum(-1) / 10).sin().sum()
        used = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([None if g is None else g.cpu().double() for g in used])
    assert sum(g is not None for g in results[0]) == 6
    for one, right in zip(*results, strict=True):
        assert (one is None) == (right is None)
        assert one is None or (one - right).norm() <= TOLERANCE * right.norm()


def test_genes_that_no_cell_has_get_no_gradient(backend: str, device: torch.device) -> None:
    cells = make_cells([19, 23])
    found = gradients(move(make_weights(), device), cells.to(device), backend=backend)["genes"]
    assert found is not None
    there = torch.zeros(len(found), dtype=torch.bool)
    there[cells.genes.long()] = True
    assert found[there].any(-1).all()
    assert not found[~there].any()


def test_nothing_of_entries_times_patches_is_kept(backend: str, device: torch.device) -> None:
    """What autograd holds between forward and backward is of the size of tables and cells."""
    if device.type == "cpu" and backend == "triton":
        pytest.skip("too many entries for the interpreter")
    weights, _ = trained(move(make_weights(genes=43), device))
    cells = make_cells([4001, 3001], genes=43).to(device)
    held: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encode(weights, *batch(cells), backend=backend)
    assert max(held) <= 7002
