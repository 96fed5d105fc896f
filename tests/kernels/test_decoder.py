"""The decoder: right, forward and backward, ragged, and the same for a cell in any batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cellpatch_fast.kernels import BlockWeights, DecoderWeights, decode
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..examples import examples

TOLERANCE = 1e-5
GENES, PATCHES, PROJECTION = 101, 13, 5
LENGTHS = [7, 0, 23, 1, 0, 3]


def make_weights(
    *,
    heads: int = 2,
    head_dim: int = 7,
    mlp_dim: int = 17,
    projection: int | None = PROJECTION,
    self_blocks: int = 1,
    dtype: torch.dtype = torch.float32,
) -> DecoderWeights:
    """Random weights; every dimension is another prime, so that a swapped axis fails."""
    generator = torch.Generator().manual_seed(0)
    dim = heads * head_dim

    def normal(*shape: int, around: float = 0.0) -> Tensor:
        return around + torch.randn(*shape, generator=generator, dtype=torch.float64) / 3

    def block() -> BlockWeights:
        return BlockWeights(
            normal(3 * dim, dim), normal(3 * dim), normal(dim, dim), normal(dim),
            normal(dim, around=1), normal(dim),
            normal(mlp_dim, dim), normal(mlp_dim), normal(dim, mlp_dim), normal(dim),
            normal(dim, around=1), normal(dim),
        )  # fmt: skip

    weights = DecoderWeights(
        heads,
        normal(GENES, dim),
        None if projection is None else normal(dim, projection),
        None if projection is None else normal(dim),
        block(),
        tuple(block() for _ in range(self_blocks)),
        normal(1, dim),
        normal(1),
    )
    return convert(weights, dtype)


def convert(weights: DecoderWeights, dtype: torch.dtype) -> DecoderWeights:
    """New parameters of that type."""
    leaves, structure = tree_flatten(weights)
    converted = [
        torch.nn.Parameter(x.detach().to(dtype, copy=True)) if isinstance(x, Tensor) else x
        for x in leaves
    ]
    return tree_unflatten(converted, structure)


def tensors_of(weights: DecoderWeights) -> list[Tensor]:
    return [x for x in tree_flatten(weights)[0] if isinstance(x, Tensor)]


class Prompts(NamedTuple):
    features: Tensor  # [c, p, E]
    offsets: Tensor
    genes: Tensor

    def cell(self, index: int) -> Prompts:
        start, stop = self.offsets[index : index + 2].tolist()
        offsets = torch.tensor([0, stop - start])
        return Prompts(self.features[index : index + 1], offsets, self.genes[start:stop])


def make_prompts(
    lengths: Sequence[int] = LENGTHS, *, patches: int = PATCHES, width: int = PROJECTION
) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    genes = torch.randint(0, GENES, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
    return Prompts(torch.randn(len(lengths), patches, width, generator=generator), offsets, genes)


def with_gradients(weights: DecoderWeights, prompts: Prompts, **options: Any) -> list[Tensor]:
    """Predictions, and gradients of features and all weights; every prediction weighs another."""
    features = prompts.features.to(weights.genes.dtype).clone().requires_grad_()
    predicted = decode(weights, features, *prompts[1:], **options)
    generator = torch.Generator().manual_seed(2)
    factors = torch.randn(predicted.shape, generator=generator, dtype=torch.float64)
    loss = (predicted.double() * factors).sum()
    return [predicted.detach(), *torch.autograd.grad(loss, [features, *tensors_of(weights)])]


def assert_right(weights: DecoderWeights, prompts: Prompts, **options: Any) -> None:
    """Predictions and every gradient, against the reference in float64."""
    found = with_gradients(weights, prompts, **options)
    exact = with_gradients(convert(weights, torch.float64), prompts, backend="reference")
    largest = max(float(right.norm()) for right in exact[1:])
    for one, right in zip(found, exact, strict=True):
        # the gradient of key biases is 0, but for rounding in the others' units
        scale = max(float(right.norm()), TOLERANCE * largest)
        assert one.shape == right.shape
        assert float((one - right).norm()) <= TOLERANCE * scale


# --- right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("cell", range(4))
def test_the_original_s_predictions(cell: int, backend: str) -> None:
    path = Path(__file__).parents[1] / "data" / "original_outputs.npz"
    with np.load(path) as file:
        arrays = {
            name.removeprefix("pretrain/"): torch.from_numpy(file[name])
            for name in file
            if name.startswith("pretrain/")
        }
    state = {n.removeprefix("state/"): t for n, t in arrays.items() if n.startswith("state/")}
    weights = original_weights(state)
    length = int(arrays["prompt_lengths"][cell])
    found = decode(
        weights, arrays[f"alone{cell}/embedding"].reshape(1, 64, 10), torch.tensor([0, length]),
        arrays["prompt_genes"][cell, :length], backend=backend,
    )  # fmt: skip
    expected = arrays[f"alone{cell}/prediction"].flatten()
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


def original_weights(state: dict[str, Tensor]) -> DecoderWeights:
    def block(name: str, index: str = "") -> BlockWeights:
        names = (
            "attn{}.in_proj_weight", "attn{}.in_proj_bias", "attn{}.out_proj.weight",
            "attn{}.out_proj.bias", "attn_norm{}.weight", "attn_norm{}.bias", "mlp{}.0.weight",
            "mlp{}.0.bias", "mlp{}.2.weight", "mlp{}.2.bias", "mlp_norm{}.weight",
            "mlp_norm{}.bias",
        )  # fmt: skip
        return BlockWeights(*(state[f"{name}_{part.format(index)}"] for part in names))

    return DecoderWeights(
        2,
        state["gene2vector.weight"],
        state["decoder_reverse_projection.weight"],
        state["decoder_reverse_projection.bias"],
        block("decoder_extract_blocks"),
        (block("decoder_selfattn_blocks", ".0"),),
        state["decoder_projection.weight"],
        state["decoder_projection.bias"],
    )


@pytest.mark.parametrize("self_blocks", [0, 1, 2])
@pytest.mark.parametrize("projection", [None, PROJECTION])
def test_values_and_every_gradient(self_blocks: int, projection: int | None) -> None:
    weights = make_weights(self_blocks=self_blocks, projection=projection)
    assert_right(weights, make_prompts(width=projection or 14))


@examples(10)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 17, 67]), min_size=1, max_size=4),
    heads=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([5, 16]),
    patches=st.sampled_from([1, 64, 71]),
)
def test_all_shapes(lengths: list[int], heads: int, head_dim: int, patches: int) -> None:
    weights = make_weights(heads=heads, head_dim=head_dim)
    assert_right(weights, make_prompts(lengths, patches=patches), max_length=67)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_no_prompts(lengths: list[int], backend: str) -> None:
    """Nothing is predicted, and everything has a gradient: 0."""
    predicted, *gradients = with_gradients(make_weights(), make_prompts(lengths), backend=backend)
    assert predicted.shape == (0,)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int64], ids=str)
def test_all_types_of_tokens(dtype: torch.dtype) -> None:
    weights, prompts = make_weights(), make_prompts()
    expected = decode(weights, *prompts)
    assert torch.equal(decode(weights, *prompts[:2], prompts.genes.to(dtype)), expected)


def test_float64_is_computed_in_float64() -> None:
    weights, prompts = make_weights(dtype=torch.float64), make_prompts()
    prompts = prompts._replace(features=prompts.features.double())
    found, expected = (decode(weights, *prompts, backend=name) for name in (None, "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# --- the same, whatever else is computed -------------------------------------------------------


@pytest.mark.parametrize("head_dim", [7, 16])
def test_a_cell_depends_on_itself_alone(head_dim: int, threads: int) -> None:
    """To rounding: either is within 1e-5 of the exact one. Cells of few prompts too."""
    weights, prompts = make_weights(head_dim=head_dim), make_prompts([1, 2, 0, 3, 211, 5, 16, 1])
    together = decode(weights, *prompts)
    for cell, (start, stop) in enumerate(itertools.pairwise(prompts.offsets.tolist())):
        alone = decode(weights, *prompts.cell(cell))
        torch.testing.assert_close(alone, together[start:stop], rtol=2e-5, atol=2e-5)


def test_nothing_of_all_pairs_is_kept() -> None:
    """What autograd holds between forward and backward is of the size of prompts and tables."""
    weights, prompts = make_weights(), make_prompts([2003])
    held: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        decode(weights, *prompts)
    assert max(held) <= 2003 * 3 * 14 < 2003 * PATCHES * 14


# --- training ----------------------------------------------------------------------------------


def test_dropout_drops_elements_of_the_last_product() -> None:
    weights, prompts = make_weights(), make_prompts([199])
    without, bias = decode(weights, *prompts), weights.output_bias
    torch.manual_seed(3)
    samples = [decode(weights, *prompts, dropout=0.5) for _ in range(60)]
    assert not torch.equal(samples[0], samples[1])
    # on the mean nothing changes: of 199 deviations from it no share is far from chance's
    mean, deviation = torch.stack(samples).mean(0), torch.stack(samples).std(0)
    assert ((mean - without).abs() < 4 * deviation / 60**0.5).float().mean() > 0.99
    nearly_all = decode(weights, *prompts, dropout=0.999)
    assert (nearly_all == bias).float().mean() > 0.9


def test_dropout_is_the_reference_s() -> None:
    """The same elements from the same seed."""
    weights, prompts = make_weights(), make_prompts()
    found = []
    for backend in ("reference", "numba"):
        torch.manual_seed(3)
        found.append(with_gradients(weights, prompts, dropout=0.3, backend=backend))
    for one, right in zip(*found, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)


def test_compiled_training_is_equal() -> None:
    """One graph, not compiled again for a batch of another size."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode, fullgraph=True, backend=counter, dynamic=True)
    weights, traced = make_weights(), 0
    for lengths in ([17, 0, 23], [19, 3, 41, 5]):
        prompts = make_prompts(lengths)
        found, expected = (function(weights, *prompts) for function in (compiled, decode))
        assert torch.equal(found, expected)
        gradients = [
            torch.autograd.grad(x.square().sum(), tensors_of(weights)) for x in (found, expected)
        ]
        for one, right in zip(*gradients, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5)
        traced = traced or counter.frame_count
    assert counter.frame_count == traced


def test_autocast_is_left_out_on_a_cpu() -> None:
    weights, prompts = make_weights(), make_prompts()
    with torch.autocast("cpu", torch.bfloat16):
        found = decode(weights, *prompts)
    assert torch.equal(found, decode(weights, *prompts))


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(6, 13, 7)}, r"\[cells, patches, 5\] of 6 cells"),
        ({"features": torch.zeros(5, 13, 5)}, r"found shape \[5, 13, 5\]"),
        ({"features": torch.zeros(6, 13, 5, device="meta")}, "features are on meta"),
        ({"genes": torch.zeros(34)}, "uint16, uint32, int32, int64; found"),
        ({"genes": torch.full((34,), GENES)}, "run from 101 to 101, but the model has tokens 0 to"),
        ({"genes": torch.zeros(33, dtype=torch.int32)}, "to the number of entries, 33"),
        ({"offsets": torch.tensor([0.0])}, "int32 or int64"),
        ({"max_length": 22}, "max_length is 22, but a cell has 23"),
        ({"dropout": 1.0}, "at least 0 and below 1, found 1.0"),
        ({"backend": "nunba"}, "unknown backend 'nunba'"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = make_prompts()._asdict() | change
    with pytest.raises(ValueError, match=message):
        decode(make_weights(), **given_)


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_on_a_gpu(autocast: torch.dtype | None) -> None:
    weights, prompts = make_weights(head_dim=16), make_prompts()
    exact = with_gradients(convert(weights, torch.float64), prompts, backend="reference")
    leaves, structure = tree_flatten(weights)
    there = [x.detach().cuda().requires_grad_() if isinstance(x, Tensor) else x for x in leaves]
    features = prompts.features.cuda().requires_grad_()
    with torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
        found = decode(tree_unflatten(there, structure), features, *(x.cuda() for x in prompts[1:]))
    assert found.dtype == torch.float32
    error = float(F.mse_loss(found.detach().cpu().double(), exact[0]).sqrt() / exact[0].std())
    assert error <= (TOLERANCE if autocast is None else 0.05)
    found.square().sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
