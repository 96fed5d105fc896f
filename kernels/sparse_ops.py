"""Registered operators of sparse products: ``torch.ops.cellpatch.sparse_product``, its backward.

Both are functional and opaque to torch.compile, with output shapes that follow from input shapes.
The backward computes only the gradients that are asked for; the others are empty.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .sparse import SparsePattern

_INPUTS = (
    "Tensor offsets, Tensor columns, Tensor column_offsets, Tensor rows, Tensor order, "
    "Tensor entries, Tensor dense, str backend"
)
# define and impl rather than custom_op, whose first call imports torch._dynamo: 2 s of CPU time
torch.library.define("cellpatch::sparse_product", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "cellpatch::sparse_product_backward",
    f"(Tensor gradient, bool of_entries, bool of_dense, {_INPUTS}) -> (Tensor, Tensor)",
)


def multiply(pattern: SparsePattern, entries: Tensor, dense: Tensor, backend: str) -> Tensor:
    """The product [rows, d] of float32, differentiable."""
    product: Tensor = torch.ops.cellpatch.sparse_product(
        *pattern, entries.contiguous(), dense.contiguous(), backend
    )
    return product


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":
        from .gpu import sparse as gpu

        return gpu
    from .cpu import sparse as cpu

    return cpu


@torch.library.impl("cellpatch::sparse_product", ("CPU", "CUDA"))
def _sparse_product(
    offsets: Tensor,
    columns: Tensor,
    column_offsets: Tensor,
    rows: Tensor,
    order: Tensor,
    entries: Tensor,
    dense: Tensor,
    backend: str,
) -> Tensor:
    product: Tensor = _implementation(backend).multiply(offsets, columns, entries, dense)
    return product


@torch.library.impl("cellpatch::sparse_product_backward", ("CPU", "CUDA"))
def _sparse_product_backward(
    gradient: Tensor,
    of_entries: bool,
    of_dense: bool,
    offsets: Tensor,
    columns: Tensor,
    column_offsets: Tensor,
    rows: Tensor,
    order: Tensor,
    entries: Tensor,
    dense: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    computing = _implementation(backend)
    nothing = entries.new_empty(0)
    return (
        computing.inner_products(offsets, columns, gradient, dense) if of_entries else nothing,
        computing.multiply(column_offsets, rows, entries[order], gradient)
        if of_dense
        else nothing.new_empty((0, 0)),
    )


@torch.library.register_fake("cellpatch::sparse_product")
def _sparse_product_fake(*arguments: Any) -> Tensor:
    offsets, *_, dense, _ = arguments
    shape = (offsets.shape[0] - 1, dense.shape[1])
    product: Tensor = dense.new_empty(shape)
    return product


@torch.library.register_fake("cellpatch::sparse_product_backward")
def _sparse_product_backward_fake(
    gradient: Tensor, of_entries: bool, of_dense: bool, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *_, entries, dense, _ = arguments
    return (
        entries.new_empty(entries.shape if of_entries else (0,)),
        dense.new_empty(dense.shape if of_dense else (0, 0)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_entries, of_dense = ctx.needs_input_grad[5:7]
    of_both = torch.ops.cellpatch.sparse_product_backward(
        gradient.contiguous(), of_entries, of_dense, *ctx.saved_tensors, ctx.backend
    )
    return (
        *(None, None, None, None, None),
        of_both[0] if of_entries else None,
        of_both[1] if of_dense else None,
        None,
    )


def _refuse_second_derivative(ctx: object, *gradients: object) -> None:
    raise RuntimeError(
        "sparse products have first derivatives only: use backend='reference', which PyTorch "
        "differentiates any number of times"
    )


torch.library.register_autograd("cellpatch::sparse_product", _differentiate, setup_context=_setup)
torch.library.register_autograd("cellpatch::sparse_product_backward", _refuse_second_derivative)
