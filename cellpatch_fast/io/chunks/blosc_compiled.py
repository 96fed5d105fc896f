"""Many Blosc chunks in one compiled loop, which holds the GIL for none of them.

A call of numcodecs costs some 20 µs of Python per chunk, as much as decoding a quarter of a token
store's chunk, and only one thread at a time can spend them: from the third thread on nothing would
be gained. Its extension module contains the C library's function ``blosc_decompress_ctx``, which
compiled code can call at its address. Where a build hides it, `decompressor` is 0 and chunks go
through numcodecs one by one. Checksums behind chunks are compared here too, by Google's C function.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .codecs_compiled import accumulate

CHECKSUM = 4  # bytes behind a chunk
HEADER = 16  # bytes of a Blosc chunk: versions, flags, type size; sizes of content, block, chunk


@cache
def decompressor() -> int:
    """The address of ``blosc_decompress_ctx(source, target, target_size, threads)``, or 0."""
    from numcodecs import blosc

    try:
        function = ctypes.CDLL(blosc.__file__).blosc_decompress_ctx
    except (AttributeError, OSError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def summer() -> int:
    """The address of ``crc32c_value(source, size)``, or 0."""
    try:
        from google_crc32c import _crc32c

        function = ctypes.CDLL(_crc32c.__file__).crc32c_value
    except (ImportError, AttributeError, OSError):  # a build without C, or that hides it
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@intrinsic
def _sum(typing: Any, address: Any, source: Any, size: Any) -> Any:
    """Call the function at ``address``: the checksum of ``size`` bytes."""
    signature = types.uint32(types.intp, types.uintp, types.uintp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        function = ir.FunctionType(ir.IntType(32), [word, word]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], function), arguments[1:])

    return signature, generate


@intrinsic
def _decompress(typing: Any, address: Any, source: Any, target: Any, size: Any) -> Any:
    """Call the function at ``address``; returns the bytes written, or a negative number."""
    signature = types.int32(types.intp, types.uintp, types.uintp, types.uintp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, result = ir.IntType(64), ir.IntType(32)
        function = ir.FunctionType(result, [word, word, word, result]).as_pointer()
        pointer = builder.inttoptr(arguments[0], function)
        return builder.call(pointer, [*arguments[1:], ir.Constant(result, 1)])  # one thread

    return signature, generate


@njit(nogil=True, cache=True)
def unpack_blosc(
    address: int,
    summer: int,
    packed: Any,
    starts: Any,
    stops: Any,
    out: Any,
    chunk: int,
    delta: bool,
) -> int:
    """Decode chunks one behind the other.

    Parameters
    ----------
    address
        See `decompressor`.
    summer
        See the function of that name; 0 where no checksum follows a chunk.
    packed
        uint8: the stored bytes.
    starts, stops
        int64 [chunks]: where each chunk begins and ends in ``packed``.
    out
        Room for what the chunks hold, ``chunk`` elements each; unsigned integers.
    chunk
        Elements of a decoded chunk.
    delta
        Whether they are differences, to be summed up while they are in the cache.

    Returns
    -------
    int
        Which chunk is damaged or of another size, or -1.
    """
    size = chunk * out.itemsize
    for number in range(len(starts)):
        stop = stops[number]
        if summer:
            stop -= CHECKSUM
            if stop < starts[number]:
                return number
            content = packed[starts[number] : stop]
            stored = _little(packed[stop : stops[number]], 0)
            if _sum(summer, content.ctypes.data, len(content)) != stored:
                return number
        header = packed[starts[number] : stop]
        if len(header) < HEADER:
            return number
        # The library trusts what the header says of the size of the chunk.
        if _little(header, 4) != size or _little(header, 12) > len(header):
            return number
        target = out[number * chunk : (number + 1) * chunk]
        if len(target) != chunk:
            return number
        if _decompress(address, header.ctypes.data, target.ctypes.data, size) != size:
            return number
        if delta:
            accumulate(target)
    return -1


@njit(nogil=True, cache=True)
def _little(values: Any, start: int) -> int:
    """An unsigned number of four bytes."""
    total = 0
    for byte in range(4):
        total |= int(values[start + byte]) << (8 * byte)
    return total
