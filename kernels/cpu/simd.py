"""The vector code the CPU kernels are made of, as Numba intrinsics.

Numba leaves vectorising to LLVM, which gives up on loops over several arrays that might overlap
and cannot keep a tile of accumulators in registers. So the inner loops are emitted as LLVM
vector code directly, and LLVM lowers them to whatever the machine has: AVX-512, AVX2, NEON.
Two kinds suffice:

- `multiply_add`, a matrix product on register tiles, and `multiply_exactly`, the same in float64;
- `elementwise`, a decorator that turns an expression over `Vector` into a loop over arrays.

Nothing is reassociated, and multiply-adds are fused where written and nowhere else. A product's
element is one chain of fused multiply-adds from zero in the order of the summed index, whatever
the tile shape. So results have the same bits on every machine with fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # floats per vector: one AVX-512 register, two AVX2 ones, four NEON ones
_FLOAT, _DOUBLE, _INT, _INDEX = ir.FloatType(), ir.DoubleType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_DOUBLES = ir.VectorType(_DOUBLE, LANES)
_index = types.int64

TILE_ROWS = 6
# A tile of 6 x 4 vectors keeps 24 of AVX-512's 32 registers as sums; with 16 registers of half
# the width only 6 x 1 fits.
_WIDE = 4 if llvm.get_host_cpu_features().get("avx512f") else 1


class Vector:
    """LANES float32 values while an expression is being compiled."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def _with(self, operation: str, other: Vector | float) -> Vector:
        value = getattr(self.builder, operation)(self.value, self.like(other).value)
        return Vector(self.builder, value)

    def like(self, other: Vector | float) -> Vector:
        """``other`` itself, or a constant in all lanes."""
        if isinstance(other, Vector):
            return other
        return Vector(self.builder, ir.Constant(_FLOATS, [float(other)] * LANES))

    def __add__(self, other: Vector | float) -> Vector:
        return self._with("fadd", other)

    def __sub__(self, other: Vector | float) -> Vector:
        return self._with("fsub", other)

    def __mul__(self, other: Vector | float) -> Vector:
        return self._with("fmul", other)

    def __truediv__(self, other: Vector | float) -> Vector:
        return self._with("fdiv", other)

    def __neg__(self) -> Vector:
        return Vector(self.builder, self.builder.fneg(self.value))

    def __abs__(self) -> Vector:
        return _call("fabs", self)


def fma(a: Vector, b: Vector | float, c: Vector | float) -> Vector:
    """a · b + c, rounded once."""
    return _call("fma", a, a.like(b), a.like(c))


def maximum(a: Vector, b: Vector | float) -> Vector:
    return _select(">", a, a.like(b), a, a.like(b))


def where_positive(condition: Vector, value: Vector) -> Vector:
    """``value`` where ``condition`` > 0, else 0."""
    return _select(">", condition, condition.like(0.0), value, condition.like(0.0))


def square_root(a: Vector) -> Vector:
    return _call("sqrt", a)


def power_of_two(exponent: Vector) -> Vector:
    """2 ** exponent for integers from -127 (which gives 0) to 127."""
    builder = exponent.builder
    integer = builder.fptosi(exponent.value, _INTS)
    biased = builder.add(integer, ir.Constant(_INTS, [127] * LANES))
    bits = builder.shl(biased, ir.Constant(_INTS, [23] * LANES))
    return Vector(builder, builder.bitcast(bits, _FLOATS))


def _call(name: str, *arguments: Vector) -> Vector:
    builder, vector = arguments[0].builder, arguments[0].value.type
    kind = ir.FunctionType(vector, [vector] * len(arguments))
    bits = 64 if vector == _DOUBLES else 32
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f{bits}")
    return Vector(builder, builder.call(function, [argument.value for argument in arguments]))


def _select(comparison: str, a: Vector, b: Vector, then: Vector, otherwise: Vector) -> Vector:
    builder = a.builder
    chosen = builder.fcmp_ordered(comparison, a.value, b.value)
    return Vector(builder, builder.select(chosen, then.value, otherwise.value))


def spread(builder: Any, scalar: Any) -> Any:
    """A number in all lanes."""
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    lane = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(_INTS, [0] * LANES))


def aligned(count: int) -> np.ndarray:
    """Zeros, float32 [count], that begin at a cache line (and a pair of them).

    NumPy promises 16 bytes. A vector of 64 bytes that lies across two lines takes two loads.
    """
    memory = np.zeros(count + 32, np.float32)
    start = -memory.ctypes.data % 128 // memory.itemsize
    return memory[start : start + count]


@intrinsic
def borrow(typing_context: Any, arrays: Any) -> Any:
    """A named tuple with each array replaced by the pointer to its first element.

    Numba counts references whenever it takes an array from a tuple, and an atomic increment
    costs more than a vector instruction: measured, staging an entry took 249 ns with arrays.
    The caller keeps the arrays alive.
    """

    def pointer(kind: Any) -> Any:
        return types.CPointer(kind.dtype) if isinstance(kind, types.Array) else kind

    result = types.NamedTuple([pointer(kind) for kind in arrays], arrays.instance_class)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        fields = []
        for i, kind in enumerate(arrays):
            field = builder.extract_value(arguments[0], i)
            if isinstance(kind, types.Array):
                field = context.make_array(kind)(context, builder, field).data
            fields.append(field)
        return context.make_tuple(builder, result, fields)

    return result(arrays), generate


@intrinsic
def prefetch(typing_context: Any, pointer: Any, index: Any) -> Any:
    """Ask for the cache line of ``pointer[index]``, which will be read soon."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        address = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), byte)
        read, keep, data = (ir.Constant(_INT, number) for number in (0, 3, 1))
        builder.call(function, [address, read, keep, data])
        return context.get_dummy_value()

    return types.none(pointer, _index), generate


@intrinsic
def never_inline(typing_context: Any) -> Any:
    """Keep the calling function out of line: one copy of its code instead of one per call."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.none(), generate


def vector_at(builder: Any, data: Any, index: Any, kind: Any = _FLOATS) -> Any:
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _one_array(generate: Any) -> Any:
    def call(typing_context, scalars, out, out_at, a, a_at, count):
        return types.none(scalars, out, _index, a, _index, _index), generate

    return call


def _two_arrays(generate: Any) -> Any:
    def call(typing_context, scalars, out, out_at, a, a_at, b, b_at, count):
        return types.none(scalars, out, _index, a, _index, b, _index, _index), generate

    return call


def _three_arrays(generate: Any) -> Any:
    def call(typing_context, scalars, out, out_at, a, a_at, b, b_at, c, c_at, count):
        return types.none(scalars, out, _index, a, _index, b, _index, c, _index, _index), generate

    return call


_SHAPES = {1: _one_array, 2: _two_arrays, 3: _three_arrays}


def elementwise(
    arrays: int, scalars: int = 0, unroll: int = 4
) -> Callable[[Callable[..., Vector]], Any]:
    """Make a vector expression callable from compiled code.

    The decorated function takes ``scalars`` vectors that hold a scalar each, then one vector for
    each of ``arrays``. The result is called as ``f(scalars, out, out_at, a, a_at, ..., count)``
    and computes ``out[out_at + j] = expression(scalars, a[a_at + j], ...)`` for ``count``
    elements (rounded up to whole vectors); ``scalars`` is a tuple of float32. Arrays are
    pointers to float32 (see `borrow`); an input may be the output itself, at the same position.
    ``unroll``, a power of two, is for expressions of a few instructions.
    """

    def decorate(expression: Callable[..., Vector]) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            constants = [
                Vector(builder, spread(builder, builder.extract_value(arguments[0], i)))
                for i in range(scalars)
            ]
            data = [arguments[1 + 2 * i] for i in range(arrays + 1)]
            starts = [arguments[2 + 2 * i] for i in range(arrays + 1)]

            def apply(j: Any) -> None:
                out, *inputs = (
                    vector_at(builder, pointer, builder.add(start, j))
                    for pointer, start in zip(data, starts, strict=True)
                )
                loaded = [Vector(builder, builder.load(pointer, align=4)) for pointer in inputs]
                builder.store(expression(*constants, *loaded).value, out, align=4)

            def loop(start: Any, stop: Any, vectors: int) -> None:
                step = ir.Constant(_INDEX, vectors * LANES)
                with cgutils.for_range_slice(builder, start, stop, step, _INDEX) as (j, _):
                    for i in range(vectors):
                        apply(builder.add(j, ir.Constant(_INDEX, i * LANES)))

            count, whole = arguments[-1], ir.Constant(_INDEX, 0)
            if unroll > 1:  # as many vectors as are a multiple of it; then one at a time
                whole = builder.and_(count, ir.Constant(_INDEX, -unroll * LANES))
                loop(ir.Constant(_INDEX, 0), whole, unroll)
            loop(whole, count, 1)
            return context.get_dummy_value()

        return intrinsic(_SHAPES[arrays](generate))

    return decorate


def _make_tile(rows: int, vectors: int, kind: Any = _FLOATS) -> Any:
    """An intrinsic that adds a product to ``rows`` x (``vectors`` · LANES) elements of c.

    c[c_at + i·c_row + j] += sum_k a[a_at + i·a_row + k·a_column] · b[b_at + k·b_row + j]

    Where ``kind`` is doubles, a and b are, and c, of floats, is replaced.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, count = arguments

        def offset(start: Any, *terms: tuple[Any, Any]) -> Any:
            for factor, stride in terms:
                start = builder.add(start, builder.mul(factor, stride))
            return start

        def number(n: int) -> Any:
            return ir.Constant(_INDEX, n)

        columns = [number(j * LANES) for j in range(vectors)]
        a_rows = [offset(a_at, (number(i), a_row)) for i in range(rows)]
        targets = [
            vector_at(builder, c, builder.add(offset(c_at, (number(i), c_row)), column))
            for i in range(rows)
            for column in columns
        ]
        zero = ir.Constant(kind, [0.0] * LANES)

        before = builder.block
        head, body, after = (builder.append_basic_block(name) for name in ("sum", "step", "store"))
        builder.branch(head)
        builder.position_at_end(head)
        k = builder.phi(_INDEX)
        sums = [builder.phi(kind) for _ in targets]
        builder.cbranch(builder.icmp_signed("<", k, count), body, after)

        builder.position_at_end(body)
        b_start = offset(b_at, (k, b_row))
        b_row_k = [
            Vector(builder, builder.load(vector_at(builder, b, offset, kind), align=4))
            for offset in (builder.add(b_start, column) for column in columns)
        ]
        updated = []
        for i in range(rows):
            scalar = builder.load(builder.gep(a, [offset(a_rows[i], (k, a_column))]), align=4)
            factor = Vector(builder, spread(builder, scalar))
            updated += [
                fma(factor, b_row_k[j], Vector(builder, sums[i * vectors + j])).value
                for j in range(vectors)
            ]
        following = builder.add(k, number(1))
        builder.branch(head)
        for phi, first, later in zip(
            [k, *sums], [number(0), *[zero for _ in targets]], [following, *updated], strict=True
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(later, body)

        builder.position_at_end(after)
        for target, value in zip(targets, sums, strict=True):
            if kind == _DOUBLES:
                total = builder.fptrunc(value, _FLOATS)
            else:
                total = builder.fadd(builder.load(target, align=4), value)
            builder.store(total, target, align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, count):
        i = _index
        return types.none(c, i, i, a, i, i, i, b, i, i, i), generate

    return tile


_tile_6_wide, _tile_2_wide, _tile_1_wide = (_make_tile(rows, _WIDE) for rows in (6, 2, 1))
_tile_6, _tile_2, _tile_1 = (_make_tile(rows, 1) for rows in (6, 2, 1))
_WIDE_COLUMNS = _WIDE * LANES
EXACT_ROWS = 4 if _WIDE > 1 else 2  # a vector of doubles takes two registers, or four
_tile_exact = _make_tile(EXACT_ROWS, 1, _DOUBLES)


@njit(nogil=True)
def multiply_add(c, c_at, c_row, rows, columns, a, a_at, a_row, a_column, b, b_at, b_row, count):
    """c[rows, columns] += a[rows, count] · b[count, columns], behind float32 pointers.

    ``*_at`` and ``*_row`` say where a matrix begins and how far apart its rows are;
    ``a_column`` is the distance of a's columns, so that a may be transposed. ``columns`` must be
    a multiple of `LANES`.
    """
    never_inline()
    j = 0
    while j < columns:
        wide = columns - j >= _WIDE_COLUMNS
        i = 0
        while i < rows:
            c_ij, a_i, b_j = c_at + i * c_row + j, a_at + i * a_row, b_at + j
            if rows - i >= 6:
                if wide:
                    _tile_6_wide(c, c_ij, c_row, a, a_i, a_row, a_column, b, b_j, b_row, count)
                else:
                    _tile_6(c, c_ij, c_row, a, a_i, a_row, a_column, b, b_j, b_row, count)
                i += 6
            elif rows - i >= 2:
                if wide:
                    _tile_2_wide(c, c_ij, c_row, a, a_i, a_row, a_column, b, b_j, b_row, count)
                else:
                    _tile_2(c, c_ij, c_row, a, a_i, a_row, a_column, b, b_j, b_row, count)
                i += 2
            else:
                if wide:
                    _tile_1_wide(c, c_ij, c_row, a, a_i, a_row, a_column, b, b_j, b_row, count)
                else:
                    _tile_1(c, c_ij, c_row, a, a_i, a_row, a_column, b, b_j, b_row, count)
                i += 1
        j += _WIDE_COLUMNS if wide else LANES


@njit(nogil=True)
def multiply_exactly(c, c_at, c_row, rows, columns, a, a_at, a_row, b, b_at, b_row, count):
    """c[rows, columns] = a[rows, count] · b[count, columns], summed in float64, c of float32.

    For scores, whose rounding errors are relative errors of their exponentials. Rows are filled
    up to a multiple of `EXACT_ROWS` (of c and of a, where any number will do).
    """
    never_inline()
    for j in range(0, columns, LANES):
        for i in range(0, rows, EXACT_ROWS):
            _tile_exact(
                c, c_at + i * c_row + j, c_row, a, a_at + i * a_row, a_row, 1,
                b, b_at + j, b_row, count,
            )  # fmt: skip
