"""Registered operator of ragged self-attention, ``torch.ops.cellpatch.ragged_self_attention``.

Two kernels of PyTorch under one operator with a backward of its own, both of bounded memory; see
`self_attention.py` for which of them computes when, and why.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .checks import check_offsets_contents

# define and impl rather than custom_op, whose first call imports torch._dynamo: 2 s of CPU time
torch.library.define(
    "cellpatch::ragged_self_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor offsets, SymInt? max_length, float scale) "
    "-> (Tensor, Tensor)",
)
torch.library.define(
    "cellpatch::ragged_self_attention_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor offsets, SymInt? max_length, "
    "float scale, Tensor output, Tensor log_sum_exp) -> (Tensor, Tensor, Tensor)",
)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    max_length: int | None,
    scale: float,
) -> Tensor:
    """Output [n, h, d], differentiable; on CUDA with offsets of int32 and a ``max_length``."""
    output, _ = torch.ops.cellpatch.ragged_self_attention(
        query, key, value, offsets, max_length, scale
    )
    return output


def check_contents(query: Tensor, offsets: Tensor, max_length: int | None) -> None:
    """Refuse offsets, or a longest cell, that do not fit the entries.

    Raises
    ------
    ValueError
        Naming what does not fit.
    """
    check_offsets_contents(offsets, len(query))
    if max_length is not None and max_length < (found := longest(offsets)):
        raise ValueError(f"max_length is {max_length}, but a cell has {found} entries")


def longest(offsets: Tensor) -> int:
    """Entries of the longest cell; 0 without cells."""
    return int(offsets.diff().max()) if len(offsets) > 1 else 0


def _cells(offsets: Tensor) -> Iterator[tuple[int, int]]:
    """Where each cell that has entries starts and stops."""
    for start, stop in itertools.pairwise(offsets.tolist()):
        if start < stop:
            yield start, stop


def _own(tensor: Tensor, start: int, stop: int) -> Tensor:
    """A cell's rows [1, h, n, d] in memory of their own, float32 where in half precision."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    rows = tensor[start:stop].transpose(0, 1)
    return rows.to(dtype, copy=True, memory_format=torch.contiguous_format)[None]


def _on_cpu(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_length: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [n, h, d] and log-sum-exp [n, h]."""
    check_contents(query, offsets, max_length)
    output, log_sum_exp = _empty_results(query)
    for start, stop in _cells(offsets):
        own = (_own(x, start, stop) for x in (query, key, value))
        found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*own, scale=scale)
        output[start:stop] = found[0].transpose(0, 1)
        log_sum_exp[start:stop] = sums[0].transpose(0, 1)
    return output, log_sum_exp


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=dtype)


def _on_cpu_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    max_length: int | None,
    scale: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, [n, h, d] each."""
    gradients = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    for start, stop in _cells(offsets):
        own = (_own(x, start, stop) for x in (gradient, query, key, value, output))
        sums = log_sum_exp[start:stop].transpose(0, 1)[None]  # [1, h, n]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *own, sums, 0.0, False, scale=scale
        )
        for whole, part in zip(gradients, found, strict=True):
            whole[start:stop] = part[0].transpose(0, 1)
    return gradients


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_length: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [n, h, d] and log-sum-exp [c, h, longest]."""
    batch = (x.unsqueeze(0) for x in (query, key, value))  # [1, n, h, d]
    output, log_sum_exp, *_ = torch.ops.aten._efficient_attention_forward(
        *batch, None, offsets, offsets, max_length, max_length, 0.0, 0, True, scale=scale
    )
    return output.squeeze(0), log_sum_exp


def _on_cuda_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    max_length: int | None,
    scale: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, [n, h, d] each."""
    assert max_length is not None
    unused = torch.zeros((), dtype=torch.int64, device=query.device)  # the state of dropout
    batch = (x.unsqueeze(0) for x in (gradient.contiguous(), query, key, value))  # [1, n, h, d]
    of_query, of_key, of_value, _ = torch.ops.aten._efficient_attention_backward(
        *batch, None, output.unsqueeze(0), offsets, offsets, max_length, max_length, log_sum_exp,
        0.0, unused, unused, 0, False, scale=scale,
    )  # fmt: skip
    return of_query.squeeze(0), of_key.squeeze(0), of_value.squeeze(0)


@torch.library.register_fake("cellpatch::ragged_self_attention")
def _fake(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_length: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    if query.device.type == "cuda":
        return _on_cuda(query, key, value, offsets, max_length, scale)
    return _empty_results(query)


@torch.library.register_fake("cellpatch::ragged_self_attention_backward")
def _fake_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, offsets, ctx.max_length, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, offsets, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, offsets, output, log_sum_exp = ctx.saved_tensors
    gradients = torch.ops.cellpatch.ragged_self_attention_backward(
        gradient, query, key, value, offsets, ctx.max_length, ctx.scale, output, log_sum_exp
    )
    return (*gradients, None, None, None)


def _refuse_second_derivative(ctx: object, *gradients: object) -> None:
    raise RuntimeError(
        "ragged_self_attention has first derivatives only: use backend='reference', which PyTorch "
        "differentiates any number of times"
    )


torch.library.impl("cellpatch::ragged_self_attention", "CPU", _on_cpu)
torch.library.impl("cellpatch::ragged_self_attention", "CUDA", _on_cuda)
torch.library.impl("cellpatch::ragged_self_attention_backward", "CPU", _on_cpu_backward)
torch.library.impl("cellpatch::ragged_self_attention_backward", "CUDA", _on_cuda_backward)
torch.library.register_autograd(
    "cellpatch::ragged_self_attention", _differentiate, setup_context=_setup
)
torch.library.register_autograd(
    "cellpatch::ragged_self_attention_backward", _refuse_second_derivative
)
