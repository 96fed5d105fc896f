"""Registered operators of ragged attention: ``torch.ops.cellpatch.ragged_attention``, its backward.

Both are functional and opaque to torch.compile, with output shapes that follow from input shapes.
The backward is an operator of its own, so that a compiled training step is one graph; what it
needs of the output, ``delta``, is made of plain PyTorch beside it, which a compiler can fuse.

Arguments are the fields of `ragged.RaggedAttention`, in their order, and the backend.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .checks import check_attention_contents, looks_at_contents
from .ragged import Gradients, RaggedAttention

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor offsets, Tensor? ids, Tensor? amounts, "
    "Tensor? key_part, Tensor? value_part, Tensor? bias, Tensor? seed, float scale, float dropout, "
    "str backend"
)
# define and impl rather than custom_op, whose first call imports torch._dynamo: 2 s of CPU time
torch.library.define("cellpatch::ragged_attention", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "cellpatch::ragged_attention_backward",
    f"(Tensor gradient, Tensor delta, Tensor log_sum_exp, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?)",
)


def attend(problem: RaggedAttention, backend: str) -> tuple[Tensor, Tensor]:
    """Output [c, q, h, d] and log-sum-exp [c, h, q], differentiable; see `reference`."""
    output, log_sum_exp = torch.ops.cellpatch.ragged_attention(*problem, backend)
    return output, log_sum_exp


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":
        from .gpu import ragged_launch

        return ragged_launch
    from .cpu import ragged

    return ragged


@torch.library.impl("cellpatch::ragged_attention", ("CPU", "CUDA"))
def _ragged_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem, backend = RaggedAttention(*arguments[:-1]), arguments[-1]
    if backend == "numba" or looks_at_contents(problem.query.device):
        check_attention_contents(problem)
    output, log_sum_exp = _implementation(backend).forward(problem)
    return output, log_sum_exp


@torch.library.impl("cellpatch::ragged_attention_backward", ("CPU", "CUDA"))
def _ragged_attention_backward(
    gradient: Tensor, delta: Tensor, log_sum_exp: Tensor, *arguments: Any
) -> Gradients:
    problem, backend = RaggedAttention(*arguments[:-1]), arguments[-1]
    found: Gradients = _implementation(backend).backward(
        problem,
        gradient.contiguous(),
        delta.contiguous(),
        log_sum_exp.contiguous(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return found


@torch.library.register_fake("cellpatch::ragged_attention")
def _ragged_attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = RaggedAttention(*arguments[:-1])
    query = problem.query
    shape = (problem.cells, problem.heads, problem.queries)
    return (
        query.new_empty((problem.cells, *query.shape[1:])),
        query.new_empty(shape, dtype=torch.float32),
    )


@torch.library.register_fake("cellpatch::ragged_attention_backward")
def _ragged_attention_backward_fake(
    gradient: Tensor, delta: Tensor, log_sum_exp: Tensor, *arguments: Any
) -> tuple[Tensor | None, ...]:
    problem = RaggedAttention(*arguments[:-1])
    return tuple(
        None if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (getattr(problem, name) for name in Gradients._fields)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    tensors = tuple(value for value in inputs if isinstance(value, Tensor))
    ctx.layout = [None if isinstance(value, Tensor) else (value,) for value in inputs]
    ctx.save_for_backward(*tensors, *output)


def _differentiate(
    ctx: Any, gradient: Tensor | None, log_sum_exp_gradient: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, output, log_sum_exp = ctx.saved_tensors
    rest = iter(tensors)
    inputs = [next(rest) if other is None else other[0] for other in ctx.layout]
    if gradient is None:
        gradient = torch.zeros_like(output)
    # what the softmax takes off the gradient of every score of a (cell, head, query)
    delta = (gradient.float() * output.float()).sum(-1).transpose(1, 2)  # [c, h, q]
    if log_sum_exp_gradient is not None:
        delta = delta - log_sum_exp_gradient
    found = torch.ops.cellpatch.ragged_attention_backward(
        gradient.contiguous(), delta.contiguous(), log_sum_exp, *inputs
    )
    named = dict(zip(Gradients._fields, found, strict=True))
    fields = (*RaggedAttention._fields, "backend")
    return tuple(named.get(field) for field in fields)


def _refuse_second_derivative(ctx: object, *gradients: object) -> None:
    raise RuntimeError(
        "ragged attention has first derivatives only: use backend='reference', which PyTorch "
        "differentiates any number of times"
    )


torch.library.register_autograd("cellpatch::ragged_attention", _differentiate, setup_context=_setup)
torch.library.register_autograd("cellpatch::ragged_attention_backward", _refuse_second_derivative)
