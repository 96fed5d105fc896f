"""The few vector instructions the CPU kernels are made of, as Numba intrinsics.

Numba vectorises simple loops well, but it cannot keep a tile of accumulators in registers,
which is what separates a matrix product that runs near the machine's peak from one bound by
stores. `multiply_add` therefore emits LLVM vector code directly. LLVM lowers it to whatever
the machine has: AVX-512, AVX2, NEON.

Every element of a product is one chain of fused multiply-adds in the order of the summed index,
whatever the tile shape and vector width, so results are the same on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 16  # floats per vector: one AVX-512 register, two AVX2 ones, four NEON ones
_FLOAT, _INT, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)

# A tile of 6 x 4 vectors uses 24 of AVX-512's 32 registers for sums; with 16 registers of half
# the width only 6 x 1 fits.
_WIDE = 4 if llvm.get_host_cpu_features().get("avx512f") else 1


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` with one rounding (float32)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def power_of_two(typing_context: Any, exponent: Any) -> Any:
    """``2 ** exponent`` for a float32 that holds an integer from -127 (gives 0) to 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integer = builder.fptosi(arguments[0], _INT)
        biased = builder.add(integer, ir.Constant(_INT, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_INT, 23)), _FLOAT)

    return types.float32(types.float32), generate


def _make_tile(rows: int, vectors: int) -> Any:
    """An intrinsic that adds a product to ``rows`` x (``vectors`` · LANES) of ``c``.

    c[i, j] += sum over k of a[a_start + i·a_row + k·a_column] · b[b_start + k·b_row + j]
    """

    @intrinsic
    def tile(
        typing_context: Any,
        c: Any,
        c_start: Any,
        c_row: Any,
        a: Any,
        a_start: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        b_start: Any,
        b_row: Any,
        count: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def data(index: int) -> Any:  # pointer to the first element of an array argument
                array = context.make_array(signature.args[index])(
                    context, builder, arguments[index]
                )
                return array.data

            def at(pointer: Any, index: Any) -> Any:
                return builder.gep(pointer, [index])

            def at_vector(pointer: Any, index: Any) -> Any:
                return builder.bitcast(at(pointer, index), _VECTOR.as_pointer())

            c_data, a_data, b_data = data(0), data(3), data(7)
            _, c_start, c_row, _, a_start, a_row, a_column, _, b_start, b_row, count = arguments
            targets = [
                at_vector(
                    c_data,
                    builder.add(
                        builder.add(c_start, builder.mul(c_row, ir.Constant(_INDEX, i))),
                        ir.Constant(_INDEX, j * LANES),
                    ),
                )
                for i in range(rows)
                for j in range(vectors)
            ]
            initial = [builder.load(target, align=4) for target in targets]
            a_rows = [
                builder.add(a_start, builder.mul(a_row, ir.Constant(_INDEX, i)))
                for i in range(rows)
            ]

            before = builder.block
            loop = builder.append_basic_block("sum")
            body = builder.append_basic_block("step")
            after = builder.append_basic_block("store")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(_INDEX)
            sums = [builder.phi(_VECTOR) for _ in targets]
            builder.cbranch(builder.icmp_signed("<", k, count), body, after)

            builder.position_at_end(body)
            b_at = builder.add(b_start, builder.mul(k, b_row))
            columns = [
                builder.load(
                    at_vector(b_data, builder.add(b_at, ir.Constant(_INDEX, j * LANES))), align=4
                )
                for j in range(vectors)
            ]
            a_at = builder.mul(k, a_column)
            updated = []
            for i in range(rows):
                factor = builder.load(at(a_data, builder.add(a_rows[i], a_at)), align=4)
                lane = builder.insert_element(
                    ir.Constant(_VECTOR, ir.Undefined), factor, ir.Constant(_INT, 0)
                )
                zeros = ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES)
                spread = builder.shuffle_vector(lane, ir.Constant(_VECTOR, ir.Undefined), zeros)
                updated += [
                    builder.fma(spread, columns[j], sums[i * vectors + j]) for j in range(vectors)
                ]
            k_next = builder.add(k, ir.Constant(_INDEX, 1))
            builder.branch(loop)
            k.add_incoming(ir.Constant(_INDEX, 0), before)
            k.add_incoming(k_next, body)
            for phi, first, following in zip(sums, initial, updated, strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(following, body)

            builder.position_at_end(after)
            for target, value in zip(targets, sums, strict=True):
                builder.store(value, target, align=4)
            return context.get_dummy_value()

        index = types.int64
        signature = types.none(c, index, index, a, index, index, index, b, index, index, index)
        return signature, generate

    return tile


_tile_6_wide, _tile_2_wide, _tile_1_wide = (_make_tile(rows, _WIDE) for rows in (6, 2, 1))
_tile_6, _tile_2, _tile_1 = (_make_tile(rows, 1) for rows in (6, 2, 1))
_WIDE_COLUMNS = _WIDE * LANES

Inline: Callable[..., Any] = njit(inline="never", nogil=True)


@njit(nogil=True)
def multiply_add(
    c, c_start, c_row, rows, columns, a, a_start, a_row, a_column, b, b_start, b_row, count
):  # type: ignore[no-untyped-def]
    """c[rows, columns] += a[rows, count] · b[count, columns], all inside flat float32 arrays.

    ``*_start`` and ``*_row`` say where a matrix begins and how far its rows are apart;
    ``a_column`` is the distance of a's columns (so that a may be transposed). ``columns`` must
    be a multiple of `LANES`.
    """
    j = 0
    while j < columns:
        wide = columns - j >= _WIDE_COLUMNS
        i = 0
        while i < rows:
            left = rows - i
            c_at, a_at, b_at = c_start + i * c_row + j, a_start + i * a_row, b_start + j
            if left >= 6:
                if wide:
                    _tile_6_wide(c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, count)
                else:
                    _tile_6(c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, count)
                i += 6
            elif left >= 2:
                if wide:
                    _tile_2_wide(c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, count)
                else:
                    _tile_2(c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, count)
                i += 2
            else:
                if wide:
                    _tile_1_wide(c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, count)
                else:
                    _tile_1(c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, count)
                i += 1
        j += _WIDE_COLUMNS if wide else LANES
