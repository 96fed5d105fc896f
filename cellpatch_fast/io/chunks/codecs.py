"""What chunks are compressed with, undone straight into memory that the caller owns.

The libraries' own calls are used (numcodecs' Blosc, Zstd and LZ4, ISA-L's inflate) and three
loops in `codecs_compiled`, none of which holds the GIL; only Google's CRC-32C does, which takes
10 µs for 128 KiB. What they do not check is checked here: that a chunk holds exactly as many
bytes as it should, and that Blosc's header, which its decoder believes, does not promise more
than there is.

ISA-L inflates gzip chunks of gene indices at 270 MB/s and of values at 680 MB/s, where zlib
manages 97 and 239 (65,536 entries per chunk, level 4, one core; zlib-ng 215 and 439).
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numcodecs import blosc, lz4, zstd

from .codecs_compiled import accumulate, unpack_lzf, unshuffle

try:
    from isal import igzip, isal_zlib
except ImportError:  # no wheel for this kind of machine: slower, the same bytes
    import gzip as igzip  # type: ignore[no-redef]
    import zlib as isal_zlib  # type: ignore[no-redef]

Packed = bytes | memoryview


class Codec(Protocol):
    """One step from what is stored to numbers."""

    def unpack(self, packed: Packed, size: int) -> Packed:
        """The decoded bytes. ``size`` is that of the chunk's numbers."""

    def unpack_into(self, packed: Packed, out: np.ndarray) -> None:
        """Decode into ``out``, uint8, which it fills exactly. Raises if it does not."""


class Pipeline:
    """All steps from a stored chunk to its numbers.

    Parameters
    ----------
    codecs
        Of bytes, the outermost (undone first) in front.
    delta
        Whether the numbers are differences, to be summed up (modulo their type's range).

    Attributes
    ----------
    only_blosc
        Whether Blosc is all there is, but for a checksum behind it (``checked``).
    plain
        Whether what is stored is the numbers themselves.
    """

    def __init__(self, codecs: Sequence[Codec], delta: bool = False) -> None:
        *self._outer, self._last = [*codecs] or [Copy()]
        self.delta = delta
        self.checked = [type(codec) for codec in self._outer] == [Crc32c]
        self.only_blosc = isinstance(self._last, Blosc) and (self.checked or not self._outer)
        self.plain = not codecs and not delta

    def decode(self, packed: Packed, out: np.ndarray) -> None:
        """Decode a whole chunk into ``out``, one-dimensional and contiguous."""
        for codec in self._outer:
            packed = codec.unpack(packed, out.nbytes)
        self._last.unpack_into(packed, out.view(np.uint8))
        if self.delta:
            accumulate(out.view(f"u{out.itemsize}"))


class Copy:
    def unpack(self, packed: Packed, size: int) -> Packed:
        return packed

    def unpack_into(self, packed: Packed, out: np.ndarray) -> None:
        _expect(len(packed), len(out))
        out[:] = np.frombuffer(packed, np.uint8)


class Blosc:
    """Blosc 1, with any of its compressors and shuffles.

    In the main thread numcodecs lets Blosc use threads of its own, under a lock of Blosc's; in
    others it decodes in the calling thread. Neither holds the GIL.
    """

    def unpack(self, packed: Packed, size: int) -> Packed:
        self._check(packed)
        return blosc.decompress(packed)

    def unpack_into(self, packed: Packed, out: np.ndarray) -> None:
        _expect(self._check(packed), len(out))
        blosc.decompress(packed, out)

    def _check(self, packed: Packed) -> int:
        """The size of the content, according to the header."""
        if len(packed) < 16:
            raise ValueError(f"{len(packed)} bytes are too few for Blosc")
        size, _, packed_size = struct.unpack_from("<III", packed, 4)
        if packed_size > len(packed):
            raise ValueError(f"{len(packed)} bytes of {packed_size}")
        return int(size)


class Zstd:
    def unpack(self, packed: Packed, size: int) -> Packed:
        return zstd.decompress(packed)

    def unpack_into(self, packed: Packed, out: np.ndarray) -> None:
        size = _zstd_size(packed)
        if size is None or size == len(out):  # else it would leave the rest of out as it is
            zstd.decompress(packed, out)
        else:  # several frames, or damage
            COPY.unpack_into(self.unpack(packed, len(out)), out)


def _zstd_size(packed: Packed) -> int | None:
    """The content size that the first frame's header states, if it does (RFC 8878, 3.1.1)."""
    if len(packed) < 18:
        packed = bytes(packed).ljust(18, b"\0")
    descriptor = packed[4]
    single = descriptor >> 5 & 1
    kind = descriptor >> 6
    if kind == 0 and not single:
        return None
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    form, extra = (("<B", 0), ("<H", 256), ("<I", 0), ("<Q", 0))[kind]
    return int(struct.unpack_from(form, packed, start)[0]) + extra


class Lz4:
    """LZ4 as numcodecs stores it: the size, then one block."""

    def unpack(self, packed: Packed, size: int) -> Packed:
        return lz4.decompress(packed)

    def unpack_into(self, packed: Packed, out: np.ndarray) -> None:
        _expect(int.from_bytes(packed[:4], "little"), len(out))
        lz4.decompress(packed, out)


class Zlib:
    def unpack(self, packed: Packed, size: int) -> Packed:
        return isal_zlib.decompress(packed, bufsize=size)

    def unpack_into(self, packed: Packed, out: np.ndarray) -> None:
        COPY.unpack_into(self.unpack(packed, len(out)), out)


class Gzip(Zlib):
    def unpack(self, packed: Packed, size: int) -> Packed:
        return igzip.decompress(packed)


class Crc32c:
    """Four bytes behind the content."""

    def unpack(self, packed: Packed, size: int) -> Packed:
        content = memoryview(packed)[:-4]
        stored = int.from_bytes(packed[-4:], "little")
        computed = google_crc32c.value(np.frombuffer(content, np.uint8))
        if len(packed) < 4 or computed != stored:
            raise ValueError(f"its checksum is {stored:08x}, but its content has {computed:08x}")
        return content

    def unpack_into(self, packed: Packed, out: np.ndarray) -> None:
        COPY.unpack_into(self.unpack(packed, len(out)), out)


class Shuffle:
    """All first bytes of the elements, then all second bytes, ..."""

    def __init__(self, element: int) -> None:
        self._element = element

    def unpack(self, packed: Packed, size: int) -> Packed:
        out = np.empty(len(packed), np.uint8)
        self.unpack_into(packed, out)
        return out.data

    def unpack_into(self, packed: Packed, out: np.ndarray) -> None:
        _expect(len(packed), len(out))
        unshuffle(_constant(packed), out, self._element)


class Lzf:
    """LibLZF, as h5py stores it: one block."""

    def unpack(self, packed: Packed, size: int) -> Packed:
        out = np.empty(size, np.uint8)
        self.unpack_into(packed, out)
        return out.data

    def unpack_into(self, packed: Packed, out: np.ndarray) -> None:
        size = int(unpack_lzf(_constant(packed), out))
        if size < 0:
            raise ValueError("it is no whole LZF block")
        _expect(size, len(out))


COPY = Copy()


def zarr_pipeline(codecs: Sequence[Mapping[str, Any]], dtype: np.dtype[Any]) -> Pipeline | None:
    """What undoes ``codecs``, in the order of encoding, each ``{"name": ..., settings}``.

    Both versions of Zarr come here. Returns None if there is one that zarr-python has to undo.
    """
    steps: list[Codec] = []
    delta = False
    for codec in codecs:
        name = codec["name"]
        if name == "delta" and not delta and not steps:
            kinds = {np.dtype(codec.get(key) or codec["dtype"]) for key in ("dtype", "astype")}
            if kinds != {dtype} or dtype.kind not in "iu":
                return None
            delta = True
        elif name == "bytes":
            if dtype.itemsize > 1 and codec.get("endian") != sys.byteorder:
                return None
        elif name == "shuffle":
            steps.insert(0, Shuffle(codec["elementsize"]))
        elif name in STEPS:
            steps.insert(0, STEPS[name]())
        else:
            return None
    return Pipeline(steps, delta)


STEPS: Mapping[str, type[Codec]] = {
    "blosc": Blosc,
    "zstd": Zstd,
    "gzip": Gzip,
    "zlib": Zlib,
    "lz4": Lz4,
    "crc32c": Crc32c,
}


def _expect(held: int, size: int) -> None:
    if held != size:
        raise ValueError(f"it holds {held} bytes instead of {size}")


def _constant(packed: Packed) -> np.ndarray:
    """``packed`` as an array, read-only whatever it was: one type for the compiler."""
    return np.frombuffer(memoryview(packed).toreadonly(), np.uint8)
