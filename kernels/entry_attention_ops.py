"""Registered operator of attention between entries, ``torch.ops.cellpatch.entry_attention``.

Two kernels of PyTorch under one operator with a backward of its own, both of bounded memory; see
`entry_attention.py` for which of them computes when, and why.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .checks import check_span

# define and impl rather than custom_op, whose first call imports torch._dynamo: 2 s of CPU time
torch.library.define(
    "cellpatch::entry_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor query_offsets, Tensor key_offsets, "
    "SymInt? max_query_length, SymInt? max_key_length, float scale) -> (Tensor, Tensor)",
)
torch.library.define(
    "cellpatch::entry_attention_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor query_offsets, "
    "Tensor key_offsets, SymInt? max_query_length, SymInt? max_key_length, float scale, "
    "Tensor output, Tensor log_sum_exp) -> (Tensor, Tensor, Tensor)",
)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query_length: int | None,
    max_key_length: int | None,
    scale: float,
) -> Tensor:
    """Output [n, h, d], differentiable; on CUDA with offsets of int32 and both lengths."""
    output, _ = torch.ops.cellpatch.entry_attention(
        query, key, value, query_offsets, key_offsets, max_query_length, max_key_length, scale
    )
    return output


def check_contents(
    query: Tensor,
    key: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query_length: int | None,
    max_key_length: int | None,
) -> None:
    """Refuse offsets, or lengths, that do not fit the queries or the keys.

    Raises
    ------
    ValueError
        Naming what does not fit.
    """
    check_span(query_offsets, len(query), max_query_length)
    if key_offsets is not query_offsets or len(key) != len(query):
        check_span(key_offsets, len(key), max_key_length)


def _cells(query_offsets: Tensor, key_offsets: Tensor) -> Iterator[tuple[slice, slice]]:
    """The queries and the keys of each cell that has both."""
    spans = (itertools.pairwise(offsets.tolist()) for offsets in (query_offsets, key_offsets))
    for queries, keys in zip(*spans, strict=True):
        if queries[0] < queries[1] and keys[0] < keys[1]:
            yield slice(*queries), slice(*keys)


def _own(tensor: Tensor, rows: slice) -> Tensor:
    """A cell's rows [1, h, n, d] in memory of their own, float32 where in half precision."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    own = tensor[rows].transpose(0, 1)
    return own.to(dtype, copy=True, memory_format=torch.contiguous_format)[None]


def _on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query_length: int | None,
    max_key_length: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [n, h, d] and log-sum-exp [n, h]; 0 and -inf for queries without keys."""
    check_contents(query, key, query_offsets, key_offsets, max_query_length, max_key_length)
    output, log_sum_exp = _of_nothing(query)
    for queries, keys in _cells(query_offsets, key_offsets):
        own = (_own(query, queries), _own(key, keys), _own(value, keys))
        found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*own, scale=scale)
        output[queries] = found[0].transpose(0, 1)
        log_sum_exp[queries] = sums[0].transpose(0, 1)
    return output, log_sum_exp


def _of_nothing(query: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    log_sum_exp = query.new_full(query.shape[:2], -math.inf, dtype=dtype)
    return query.new_zeros(query.shape), log_sum_exp


def _on_cpu_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query_length: int | None,
    max_key_length: int | None,
    scale: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped as they are."""
    of_query, of_key, of_value = (x.new_zeros(x.shape) for x in (query, key, value))
    for queries, keys in _cells(query_offsets, key_offsets):
        own = (
            _own(gradient, queries), _own(query, queries), _own(key, keys), _own(value, keys),
            _own(output, queries),
        )  # fmt: skip
        sums = log_sum_exp[queries].transpose(0, 1)[None]  # [1, h, n]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *own, sums, 0.0, False, scale=scale
        )
        for whole, rows, part in zip(
            (of_query, of_key, of_value), (queries, keys, keys), found, strict=True
        ):
            whole[rows] = part[0].transpose(0, 1)
    return of_query, of_key, of_value


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query_length: int | None,
    max_key_length: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [n, h, d] and log-sum-exp [c, h, longest]."""
    batch = (x.unsqueeze(0) for x in (query, key, value))  # [1, n, h, d]
    output, log_sum_exp, *_ = torch.ops.aten._efficient_attention_forward(
        *batch, None, query_offsets, key_offsets, max_query_length, max_key_length,
        0.0, 0, True, scale=scale,
    )  # fmt: skip
    return output.squeeze(0), log_sum_exp


def _on_cuda_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_query_length: int | None,
    max_key_length: int | None,
    scale: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, shaped as they are."""
    assert max_query_length is not None
    assert max_key_length is not None
    unused = torch.zeros((), dtype=torch.int64, device=query.device)  # the state of dropout
    batch = (x.unsqueeze(0) for x in (gradient.contiguous(), query, key, value))  # [1, n, h, d]
    of_query, of_key, of_value, _ = torch.ops.aten._efficient_attention_backward(
        *batch, None, output.unsqueeze(0), query_offsets, key_offsets, max_query_length,
        max_key_length, log_sum_exp, 0.0, unused, unused, 0, False, scale=scale,
    )  # fmt: skip
    return of_query.squeeze(0), of_key.squeeze(0), of_value.squeeze(0)


@torch.library.register_fake("cellpatch::entry_attention")
def _fake(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    if query.device.type == "cuda":
        return _on_cuda(query, *others)
    return _of_nothing(query)


@torch.library.register_fake("cellpatch::entry_attention_backward")
def _fake_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_query_length, ctx.max_key_length, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, output, log_sum_exp = ctx.saved_tensors
    gradients = torch.ops.cellpatch.entry_attention_backward(
        gradient, *tensors, ctx.max_query_length, ctx.max_key_length, ctx.scale,
        output, log_sum_exp,
    )  # fmt: skip
    return (*gradients, None, None, None, None, None)


def _refuse_second_derivative(ctx: object, *gradients: object) -> None:
    raise RuntimeError(
        "ragged attention of entries has first derivatives only: use backend='reference', which "
        "PyTorch differentiates any number of times"
    )


torch.library.impl("cellpatch::entry_attention", "CPU", _on_cpu)
torch.library.impl("cellpatch::entry_attention", "CUDA", _on_cuda)
torch.library.impl("cellpatch::entry_attention_backward", "CPU", _on_cpu_backward)
torch.library.impl("cellpatch::entry_attention_backward", "CUDA", _on_cuda_backward)
torch.library.register_autograd("cellpatch::entry_attention", _differentiate, setup_context=_setup)
torch.library.register_autograd("cellpatch::entry_attention_backward", _refuse_second_derivative)
