"""Sparse times dense on a CPU: sums of rows in registers, a panel of columns at a time.

A row of the result is a weighted sum of rows of the dense matrix, which its entries name. The sum
of `PANEL` of its columns stays in registers: a piece of at most `PIECE` entries is a chain of fused
multiply-adds, and pieces are added up in order, so that a sum over a million entries is as exact as
one over a thousand. All rows of the result do one panel before the next: the dense matrix's share
of a panel, 256 bytes per row, then stays in a second-level cache up to some 4,000 rows (3,000
genes: 0.8 MB), where whole rows of 512 numbers would come from memory.

Threads share panels and ranges of rows; nobody's sum is split among them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..threads import run_blocks
from .compiled import announce_compilation, digest
from .simd import LANES, Vector, borrow, fma, prefetch, spread, vector_at

VECTORS = 4  # of a panel: 4 registers of AVX-512, 8 of AVX2
PANEL = VECTORS * LANES  # columns
PIECE = 512  # entries
ROWS = 128  # of a task
AHEAD = 6  # entries between asking for a row and using it

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INDEX = ir.IntType(64)
_int64 = types.int64


class Product(NamedTuple):
    """Inputs of a product; entries' columns are rows of ``dense``."""

    offsets: np.ndarray  # int64 [rows + 1]
    columns: np.ndarray  # int64 [n]
    entries: np.ndarray  # float32 [n]
    dense: np.ndarray  # float32 [columns · width]
    result: np.ndarray  # float32 [rows · width], of inner products [n]
    left: np.ndarray  # float32 [rows · width], of inner products alone
    width: int  # a multiple of LANES


def multiply(offsets: Tensor, columns: Tensor, entries: Tensor, dense: Tensor) -> Tensor:
    """The product [rows, d] of float32; see `sparse.sparse_product`."""
    rows, columns_of_dense = len(offsets) - 1, dense.shape[1]
    padded = _padded(dense)
    width = padded.shape[1]
    result = torch.zeros((rows, width))
    product = Product(
        offsets=offsets.numpy(),
        columns=columns.numpy(),
        entries=entries.detach().numpy(),
        dense=padded.numpy().reshape(-1),
        result=result.numpy().reshape(-1),
        left=np.empty(0, np.float32),
        width=width,
    )
    blocks, panels = -(-rows // ROWS), -(-width // PANEL)
    announce_compilation(_sum_rows, 5)

    def task(start: int, stop: int) -> None:
        for turn in range(start, stop):
            first = turn % blocks * ROWS
            _sum_rows(product, turn // blocks * PANEL, first, min(rows, first + ROWS))

    run_blocks(task, blocks * panels, 1)
    return result if width == columns_of_dense else result[:, :columns_of_dense].contiguous()


def inner_products(offsets: Tensor, columns: Tensor, left: Tensor, dense: Tensor) -> Tensor:
    """For each entry, its row of ``left`` [rows, d] times its column's row of ``dense``: [n]."""
    rows, padded, padded_left = len(offsets) - 1, _padded(dense), _padded(left)
    result = torch.empty(len(columns))
    product = Product(
        offsets=offsets.numpy(),
        columns=columns.numpy(),
        entries=np.empty(0, np.float32),
        dense=padded.numpy().reshape(-1),
        result=result.numpy(),
        left=padded_left.numpy().reshape(-1),
        width=padded.shape[1],
    )
    announce_compilation(_multiply_rows, 5)
    run_blocks(lambda start, stop: _multiply_rows(product, start, stop), rows, ROWS)
    return result


def _padded(dense: Tensor) -> Tensor:
    """Filled up with zeros to whole vectors."""
    beyond = -dense.shape[1] % LANES
    dense = dense.detach()
    return torch.nn.functional.pad(dense, (0, beyond)) if beyond else dense.contiguous()


def _make_sum(vectors: int) -> Any:
    """An intrinsic that adds a weighted sum of rows to ``vectors`` · LANES numbers of a result.

    result[at + j] += sum_k entries[k] · dense[columns[k] · width + from + j], k from first to last
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        result, at, columns, entries, dense, width, start, first, last = arguments

        def number(n: int) -> Any:
            return ir.Constant(_INDEX, n)

        places = [number(v * LANES) for v in range(vectors)]
        zero = ir.Constant(_FLOATS, [0.0] * LANES)
        before = builder.block
        head, body, after = (builder.append_basic_block(name) for name in ("sum", "step", "store"))
        builder.branch(head)
        builder.position_at_end(head)
        k = builder.phi(_INDEX)
        sums = [builder.phi(_FLOATS) for _ in places]
        builder.cbranch(builder.icmp_signed("<", k, last), body, after)

        builder.position_at_end(body)
        factor = Vector(builder, spread(builder, builder.load(builder.gep(entries, [k]), align=4)))
        row = builder.mul(builder.load(builder.gep(columns, [k]), align=8), width)
        row = builder.add(row, start)
        updated = []
        for place, total in zip(places, sums, strict=True):
            numbers = builder.load(vector_at(builder, dense, builder.add(row, place)), align=4)
            updated.append(fma(factor, Vector(builder, numbers), Vector(builder, total)).value)
        following = builder.add(k, number(1))
        builder.branch(head)
        for phi, begin, later in zip(
            [k, *sums], [first, *[zero for _ in places]], [following, *updated], strict=True
        ):
            phi.add_incoming(begin, before)
            phi.add_incoming(later, body)

        builder.position_at_end(after)
        for place, total in zip(places, sums, strict=True):
            target = vector_at(builder, result, builder.add(at, place))
            builder.store(builder.fadd(builder.load(target, align=4), total), target, align=4)
        return context.get_dummy_value()

    @intrinsic
    def add_sum(typing_context, result, at, columns, entries, dense, width, start, first, last):
        i = _int64
        return types.none(result, i, columns, entries, dense, i, i, i, i), generate

    return add_sum


_add_sum, _add_narrow_sum = _make_sum(VECTORS), _make_sum(1)


@intrinsic
def _inner_product(typing_context, a, a_at, b, b_at, count):
    """The sum of a[a_at + j] · b[b_at + j] over ``count`` numbers, a multiple of LANES."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, a_at, b, b_at, count = arguments
        sums = cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * LANES))
        step = ir.Constant(_INDEX, LANES)
        with cgutils.for_range_slice(builder, ir.Constant(_INDEX, 0), count, step, _INDEX) as (
            j,
            _,
        ):
            one, other = (
                Vector(builder, builder.load(vector_at(builder, data, builder.add(at, j)), align=4))
                for data, at in ((a, a_at), (b, b_at))
            )
            total = Vector(builder, builder.load(sums))
            builder.store(fma(one, other, total).value, sums)
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
        reduce = cgutils.get_or_insert_function(
            builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32"
        )  # in the order of the lanes
        return builder.call(reduce, [ir.Constant(ir.FloatType(), -0.0), builder.load(sums)])

    return types.float32(a, _int64, b, _int64, _int64), generate


def _compiled(sources: str) -> tuple[Any, Any]:
    """What computes rows of a product, and inner products; kept on disk, see `compiled`."""

    @njit(nogil=True, cache=True)
    def sum_rows(product, start, first, last):
        """Columns ``start`` to ``start`` + `PANEL` of rows ``first`` to ``last``."""
        p = borrow(product)
        width = p.width
        for row in range(first, last if len(sources) else 0):
            piece, stop = p.offsets[row], p.offsets[row + 1]
            while piece < stop:
                end = min(stop, piece + PIECE)
                for k in range(piece, min(end, piece + AHEAD)):
                    prefetch(p.dense, p.columns[k] * width + start)
                at = row * width
                if width - start >= PANEL:
                    _add_sum(p.result, at + start, p.columns, p.entries, p.dense, width, start,
                             piece, end)  # fmt: skip
                else:
                    for column in range(start, width, LANES):
                        _add_narrow_sum(p.result, at + column, p.columns, p.entries, p.dense,
                                        width, column, piece, end)  # fmt: skip
                piece = end

    @njit(nogil=True, cache=True)
    def multiply_rows(product, first, last):
        p = borrow(product)
        width = p.width
        for row in range(first, last if len(sources) else 0):
            for k in range(p.offsets[row], p.offsets[row + 1]):
                p.result[k] = _inner_product(p.left, row * width, p.dense,
                                             p.columns[k] * width, width)  # fmt: skip

    return sum_rows, multiply_rows


_sum_rows, _multiply_rows = _compiled(digest())
