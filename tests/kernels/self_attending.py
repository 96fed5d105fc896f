"""What tests of self-attention share: random inputs, gradients, and what is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from cellpatch_fast.kernels.entry_attention import ragged_self_attention
from torch import Tensor

TOLERANCE = 1e-5
# What half precision costs in any case, in units of its rounding: each result is rounded once; for
# gradients the output, rounded too, is multiplied by its gradient and that is taken away from what
# may be of the same size. (Of 2,863 draws of small shapes the most was 0.8 and 2.8.)
ROUNDINGS = 1, 4
LENGTHS = [5, 0, 19, 1]
HEADS, HEAD_DIM = 3, 7
HALF = [torch.float16, torch.bfloat16]


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    offsets: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [*self[:3]]

    def having(self, leaves: Iterable[Tensor]) -> Inputs:
        return Inputs._make([*leaves, self.offsets])


def draw(
    lengths: Sequence[int] = LENGTHS,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    factor: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Random queries times ``factor``, keys, values, all three leaves, and offsets."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    entries = int(offsets[-1])
    query, key, value = torch.randn(3, entries, heads, head_dim, generator=generator)
    leaves = (x.to(device, dtype).requires_grad_() for x in (factor * query, key, value))
    return Inputs._make([*leaves, offsets.to(device)])


def with_gradients(inputs: Inputs, **options: Any) -> list[Tensor]:
    """Output and gradients of query, key and value, for one random gradient of the output."""
    output = ragged_self_attention(*inputs, **options)
    gradients = torch.autograd.grad(output, inputs.leaves, gradient_of(output))
    return [output.detach(), *gradients]


def gradient_of(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(output)


def exact(inputs: Inputs, **options: Any) -> list[Tensor]:
    """The same from the reference in float64, on the CPU."""
    there = Inputs._make(x.detach().cpu() for x in inputs)
    doubled = there.having(x.double().requires_grad_() for x in there.leaves)
    return with_gradients(doubled, backend="reference", **options)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30))


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of the output, and of the gradients together.

    The gradient of a single query or key may be 0 but for terms that cancel.
    """
    together = [torch.cat([x.cpu().double().flatten() for x in xs[1:]]) for xs in (found, expected)]
    return [error(found[0], expected[0]), error(*together)]


def assert_right(found: list[Tensor], inputs: Inputs, **options: Any) -> None:
    """float32 to 1e-5; half precision to twice the error of PyTorch in that precision.

    Of a few numbers PyTorch may round none: then to `ROUNDINGS`.
    """
    expected = exact(inputs, **options)
    dtype = inputs[0].dtype
    assert all(x.dtype == dtype for x in found)
    if dtype.itemsize >= 4:
        assert max(errors(found, expected)) <= TOLERANCE
        return
    rough = errors(with_gradients(inputs, backend="reference", **options), expected)
    unit = torch.finfo(dtype).eps / 2
    limits = [max(2 * e, count * unit) for e, count in zip(rough, ROUNDINGS, strict=True)]
    assert all(e <= limit for e, limit in zip(errors(found, expected), limits, strict=True))


def part(inputs: Inputs, start: int, stop: int) -> Inputs:
    """One cell of a batch."""
    leaves = (x[start:stop].detach().clone().requires_grad_() for x in inputs.leaves)
    offsets = torch.tensor([0, stop - start], device=inputs.query.device)
    return Inputs._make([*leaves, offsets])
