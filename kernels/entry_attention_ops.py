"""Registered operator of attention between entries, ``torch.ops.cellpatch.entry_attention``.

Numba on a CPU and a kernel of PyTorch on CUDA, under one operator with a backward of its own, both
of bounded memory; see `entry_attention.py` for when it computes, and why.
"""

from __future__ import annotations

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
    """Output [n, h, d] and log-sum-exp [n, h]."""
    from .cpu import entry_attention

    check_contents(query, key, query_offsets, key_offsets, max_query_length, max_key_length)
    output, log_sum_exp = entry_attention.forward(
        query.float(), key.float(), value.float(), query_offsets, key_offsets, scale
    )
    return output.to(query.dtype), log_sum_exp


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
    from .cpu import entry_attention

    of_query, of_key, of_value = entry_attention.backward(
        gradient.float(), query.float(), key.float(), value.float(), query_offsets, key_offsets,
        scale, output.float(), log_sum_exp,
    )  # fmt: skip
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


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
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


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
