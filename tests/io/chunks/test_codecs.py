"""The loops of our own among the codecs: right, and within bounds whatever they are given."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from typing import Any

import h5py
import numcodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from cellpatch_fast.io.chunks import codecs
from cellpatch_fast.io.chunks.codecs_compiled import accumulate, unpack_lzf, unshuffle

checked_lzf: Any = njit(boundscheck=True)(unpack_lzf.py_func)


def lzf_block(content: bytes) -> bytes | None:
    """``content`` as h5py compresses it; None if that makes it longer."""
    with h5py.File("block", "w", driver="core", backing_store=False) as file:
        values = np.frombuffer(content, np.uint8)
        dataset = file.create_dataset(
            "x", data=values, chunks=values.shape, compression="lzf", shuffle=False
        )
        skipped, block = dataset.id.read_direct_chunk((0,))
    return None if skipped else bytes(block)


repetitive = st.lists(
    st.tuples(st.binary(min_size=1, max_size=9), st.integers(1, 300)), min_size=1, max_size=30
).map(lambda parts: b"".join(part * times for part, times in parts))


@given(content=repetitive)
@settings(max_examples=80, deadline=None)
def test_lzf_is_h5pys(content: bytes) -> None:
    block = lzf_block(content)
    if block is not None:
        out = np.empty(len(content), np.uint8)
        assert unpack_lzf(np.frombuffer(block, np.uint8), out) == len(content)
        assert out.tobytes() == content


@given(block=st.binary(max_size=200), size=st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_lzf_stays_within_bounds_on_any_bytes(block: bytes, size: int) -> None:
    out = np.full(size, 7, np.uint8)
    count = checked_lzf(np.frombuffer(block, np.uint8), out)  # raises IndexError beyond them
    assert -1 <= count <= size
    assert (out[max(count, 0) :] == 7).all() or count < 0


@given(
    content=repetitive,
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.integers(0, 20),
)
@settings(max_examples=100, deadline=None)
def test_lzf_stays_within_bounds_on_damaged_blocks(
    content: bytes, flips: list[tuple[int, int]], cut: int
) -> None:
    block = bytearray(lzf_block(content) or b"\x00\x00")
    for place, value in flips:
        block[place % len(block)] = value
    damaged = np.frombuffer(bytes(block[: max(1, len(block) - cut)]), np.uint8)
    guarded = np.full(len(content) + 2_000, 7, np.uint8)
    out = guarded[1_000:-1_000]
    assert -1 <= checked_lzf(damaged, np.empty(len(content), np.uint8)) <= len(content)
    assert -1 <= unpack_lzf(damaged, out) <= len(content)
    assert (guarded[:1_000] == 7).all()
    assert (guarded[-1_000:] == 7).all()


@given(
    dtype=st.sampled_from(["uint8", "uint16", "uint32", "int16", "int64"]),
    length=st.integers(1, 300),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_running_sums_wrap_around_as_numcodecs_has_them(dtype: str, length: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**63, length).astype(dtype)
    codec = numcodecs.Delta(dtype)
    decoded = np.asarray(codec.encode(values)).copy()
    accumulate(decoded.view(f"u{decoded.itemsize}"))
    np.testing.assert_array_equal(decoded, values)
    np.testing.assert_array_equal(decoded, codec.decode(codec.encode(values)))


@pytest.mark.parametrize("element", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("left_over", [0, 1])
def test_unshuffle(element: int, left_over: int) -> None:
    content = np.random.default_rng(element).integers(0, 256, 37 * element).astype(np.uint8)
    packed = np.concatenate([content.reshape(-1, element).T.reshape(-1), content[:left_over]])
    out = np.empty_like(packed)
    unshuffle(packed, out, element)
    np.testing.assert_array_equal(out, np.concatenate([content, content[:left_over]]))


@pytest.mark.parametrize("level", [None, 1, 19])
@pytest.mark.parametrize("size", [1, 200, 255, 256, 257, 65_535, 65_792, 70_001])
def test_size_in_a_zstd_header(size: int, level: int | None) -> None:
    content = np.random.default_rng(size).integers(0, 9, size).astype(np.uint8).tobytes()
    packed = numcodecs.Zstd(level or 0, checksum=level is None).encode(content)
    assert codecs._zstd_size(packed) == size


def test_zstd_in_several_frames() -> None:
    content = bytes(range(200))
    packed = b"".join(numcodecs.Zstd().encode(content[part::2]) for part in range(2))
    out = np.empty(200, np.uint8)
    codecs.Zstd().unpack_into(packed, out)
    assert out.tobytes() == content[::2] + content[1::2]


def test_gzip_in_several_members() -> None:
    content = bytes(range(200))
    packed = b"".join(numcodecs.GZip().encode(content[part::2]) for part in range(2))
    out = np.empty(200, np.uint8)
    codecs.Gzip().unpack_into(packed, out)
    assert out.tobytes() == content[::2] + content[1::2]


ENCODERS: dict[type[codecs.Codec], Callable[[bytes], Any]] = {
    codecs.Blosc: lambda content: numcodecs.Blosc().encode(content),
    codecs.Zstd: lambda content: numcodecs.Zstd().encode(content),
    codecs.Gzip: lambda content: numcodecs.GZip().encode(content),
    codecs.Zlib: lambda content: numcodecs.Zlib().encode(content),
    codecs.Lz4: lambda content: numcodecs.LZ4().encode(content),
    codecs.Crc32c: lambda content: numcodecs.CRC32C(location="end").encode(content),
    codecs.Lzf: lzf_block,
    codecs.Shuffle: lambda content: content,
    codecs.Copy: lambda content: content,
}


@pytest.mark.parametrize("codec", ENCODERS, ids=lambda codec: codec.__name__)
@pytest.mark.parametrize("size", [99, 100, 101])
def test_content_of_another_size_is_refused(codec: Any, size: int) -> None:
    """Too short would leave what was in memory before, too long would write beyond its end."""
    content = b"ab" * (size // 2) + b"c" * (size % 2)
    packed, out = bytes(ENCODERS[codec](content)), np.empty(100, np.uint8)
    decoder = codec(2) if codec is codecs.Shuffle else codec()
    if size == 100:
        decoder.unpack_into(packed, out)
        assert sorted(out.tobytes()) == sorted(content)
    else:
        with pytest.raises(ValueError, match=f"{size} bytes instead of 100|no whole LZF block"):
            decoder.unpack_into(packed, out)


@pytest.mark.parametrize("codec", [codecs.Gzip, codecs.Zlib])
def test_inflating_without_isal(monkeypatch: pytest.MonkeyPatch, codec: Any) -> None:
    """Not every kind of machine has it; the standard library gives the same bytes."""
    monkeypatch.setattr(codecs, "isal_zlib", zlib)
    monkeypatch.setattr(codecs, "igzip", gzip)
    test_content_of_another_size_is_refused(codec, 100)
    test_content_of_another_size_is_refused(codec, 99)


@pytest.mark.parametrize("cut", [0, 1, 3, 15, 16, 40])
def test_blosc_header_that_promises_too_much(cut: int) -> None:
    """Blosc believes its header, and would read beyond what there is."""
    packed = bytes(numcodecs.Blosc(shuffle=0).encode(np.arange(1_000, dtype=np.int16)))
    with pytest.raises(ValueError, match="bytes"):
        codecs.Blosc().unpack_into(packed[:cut], np.empty(2_000, np.uint8))
