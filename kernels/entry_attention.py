"""Attention of a cell's entries: to each other, or to entries of another kind of the same cell.

CellPatch's decoder uses both: the genes to predict of one cell, 1,000 prompts at most, attend to
the cell's patches and then to each other. Queries and keys have offsets of their own; where both
have the same, it is self-attention. Others have built good kernels for GPUs, so none is written
for them here. One function hides which of them computes:

- flash-attn, where it is installed, else the FlashAttention inside PyTorch
  (`torch.nn.attention.varlen`), for half precision on CUDA;
- PyTorch's memory-efficient attention for float32 on CUDA: the kernel that nested jagged tensors
  call, called directly, because those take a dense way out where a cell is empty, and torch.compile
  cannot trace their backward;
- `cpu/entry_attention.py` on a CPU, in float32 where the tensors are in half precision;
- the reference for float64.

All of them keep the log-sum-exp and compute scores again in the backward: memory grows with the
entries, never with their square. FLOP for n entries of a cell, h heads of d: 4·h·d·n² forward
(two products), 10·h·d·n² backward (five).
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .checks import ATTENTION_DTYPES, check_offsets, listed, longest, looks_at_contents
from .entry_attention_ops import attend, check_contents

EntryAttentionBackend = Literal["reference", "numba", "memory_efficient", "varlen", "flash_attn"]

FLASH_ATTN_INSTALLED = importlib.util.find_spec("flash_attn") is not None
OLDEST_GPU = (8, 0)  # compute capability that FlashAttention needs
LARGEST_HEAD_DIM = 256  # of FlashAttention
ALIGNMENT = 8  # head_dim of CUDA's kernels is a multiple of it


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    *,
    scale: float | None = None,
    max_query_length: int | None = None,
    max_key_length: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Queries attend to the keys of their own cell, forward and backward.

    Parameters
    ----------
    query
        [queries, heads, head_dim], one of float16, bfloat16, float32, float64. `torch.autocast`
        casts all but float64.
    key, value
        [keys, heads, head_dim], of the dtype of ``query``.
    query_offsets, key_offsets
        int32 or int64 [cells + 1]; cell ``c`` owns the queries ``query_offsets[c] :
        query_offsets[c + 1]``, and the keys likewise. A cell may have no queries, or no keys: then
        its queries attend to nothing, which is 0.
    scale
        Factor of ``query · key``; None for 1 / sqrt(head_dim).
    max_query_length, max_key_length
        Queries (keys) of the cell that has most, or more. None reads it from the offsets, for
        which a GPU is waited for; where torch.compile traces for CUDA, it must be given. A GPU is
        not asked whether it is right, but one that is too small ends in a device-side assertion.
    backend
        ``"reference"``; ``"numba"`` on a CPU; on CUDA ``"memory_efficient"`` (PyTorch's own), and
        for half precision ``"varlen"`` (PyTorch's FlashAttention) and ``"flash_attn"`` (the
        package). None chooses the fastest that can compute, for float64 the reference;
        CELLPATCH_BACKEND=reference makes that the reference.

    Returns
    -------
    Tensor
        [queries, heads, head_dim], of the dtype of ``query``, or autocast's.

    Raises
    ------
    ValueError
        If shapes, dtypes, devices, offsets, lengths or the backend do not fit. On a GPU the
        contents of offsets are looked at only where CELLPATCH_CHECK=1 is set.

    Notes
    -----
    A cell's result by the backend numba is the same, bit for bit, whatever batch it is in, and so
    are its gradients; by others (the reference, which computes float64, too) it is to rounding. On
    CUDA, gradients are deterministic under
    ``torch.use_deterministic_algorithms(True)``.

    Examples
    --------
    Entries of a cell ask what its patches know. Here 3, no and 2 entries, and 4 patches of a cell:

    >>> entries, patches = torch.randn(5, 2, 16), torch.randn(3 * 4, 2, 16)
    >>> offsets, every_4 = torch.tensor([0, 3, 3, 5]), torch.tensor([0, 4, 8, 12])
    >>> ragged_attention(entries, patches, patches, offsets, every_4).shape
    torch.Size([5, 2, 16])
    """
    query, key, value = _cast(query, key, value)
    _check(query, key, value, query_offsets, key_offsets)
    chosen = _choose(query, backend)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    lengths = max_query_length, max_key_length
    if chosen == "numba":  # checks contents itself
        return attend(query, key, value, query_offsets, key_offsets, *lengths, scale)
    if looks_at_contents(query.device):
        check_contents(query, key, query_offsets, key_offsets, *lengths)
    if chosen == "reference":
        with torch.autocast(query.device.type, enabled=False):
            return reference.entry_attention(query, key, value, query_offsets, key_offsets, scale)
    if len(query) == 0 or len(key) == 0:
        return _nothing(query, key, value)
    spans = _Span.of(query_offsets, max_query_length, "query")
    if key_offsets is query_offsets and max_key_length == max_query_length:
        return _on_cuda(chosen, query, key, value, spans, spans, scale)
    keys = _Span.of(key_offsets, max_key_length, "key")
    alone = _without_keys(len(query), query_offsets, key_offsets)  # kernels differ in these
    output = _on_cuda(chosen, query.masked_fill(alone, 0), key, value, spans, keys, scale)
    return output.masked_fill(alone, 0)


def ragged_self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    max_length: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Entries attend to the entries of their own cell, forward and backward.

    Parameters
    ----------
    query, key, value
        [entries, heads, head_dim], as of `ragged_attention`.
    offsets
        int32 or int64 [cells + 1]; cell ``c`` owns the entries ``offsets[c] : offsets[c + 1]``. A
        cell may be empty.
    scale, backend
        As of `ragged_attention`.
    max_length
        Entries of the longest cell, or more; see ``max_query_length`` of `ragged_attention`.

    Returns
    -------
    Tensor
        [entries, heads, head_dim], of the dtype of ``query``, or autocast's.

    Raises
    ------
    ValueError
        As `ragged_attention`.

    Examples
    --------
    The decoder of masked gene modelling: what is known of the masked genes of a cell, its prompts,
    is mixed before their values are predicted. Here cells with 3, none and 2 prompts:

    >>> prompts = torch.randn(5, 32)  # [entries, dim]
    >>> offsets = torch.tensor([0, 3, 3, 5])
    >>> query, key, value = torch.nn.Linear(32, 96)(prompts).unflatten(1, (3, 2, 16)).unbind(1)
    >>> mixed = prompts + ragged_self_attention(query, key, value, offsets).flatten(1)
    >>> mixed.shape
    torch.Size([5, 32])
    """
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[:1] != query.shape[:1]:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but query has {list(query.shape)}: they "
                "must be alike"
            )
    return ragged_attention(
        query, key, value, offsets, offsets,
        scale=scale, max_query_length=max_length, max_key_length=max_length, backend=backend,
    )  # fmt: skip


def _nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Zeros like the queries, in which all three have a part, as autograd wants it."""
    return torch.where(query.new_zeros((), dtype=torch.bool), query, key.sum() + value.sum())


def _without_keys(queries: int, query_offsets: Tensor, key_offsets: Tensor) -> Tensor:
    """Which queries are of cells that have no keys: bool [queries, 1, 1]."""
    row = torch.arange(queries, device=query_offsets.device, dtype=query_offsets.dtype)
    ends = query_offsets.narrow(0, 1, len(query_offsets) - 1)
    cell = torch.searchsorted(ends, row, right=True)  # [n]
    return (key_offsets.diff() == 0).index_select(0, cell).view(-1, 1, 1)


class _Span(NamedTuple):
    """Where the queries, or keys, of each cell are, as CUDA's kernels want it."""

    offsets: Tensor  # int32 [c + 1]
    longest: int

    @classmethod
    def of(cls, offsets: Tensor, max_length: int | None, name: str) -> _Span:
        if max_length is None:
            max_length = longest(offsets)
        else:  # kernels would leave the rest of a longer cell as they found it
            fits = offsets.diff().max() <= max_length
            torch._assert_async(fits, f"a cell is longer than max_{name}_length")
        return cls(offsets.int(), max_length)


def _on_cuda(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: _Span,
    keys: _Span,
    scale: float,
) -> Tensor:
    """One of the kernels of CUDA, with head_dim as they need it."""
    head_dim = query.shape[-1]
    padding = -head_dim % ALIGNMENT
    if padding:  # zeros add nothing to scores
        query, key, value = (F.pad(x, (0, padding)) for x in (query, key, value))
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    spans = queries.offsets, keys.offsets, queries.longest, keys.longest
    if backend == "memory_efficient":
        output = attend(query, key, value, *spans, scale)
    elif backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        output = flash_attn_varlen_func(
            query, key, value, *spans,
            softmax_scale=scale, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    else:
        from torch.nn.attention.varlen import varlen_attn

        # in PyTorch 2.10 its scale is fixed: queries take what is missing, nothing by default
        missing = scale * math.sqrt(query.shape[-1])
        if not math.isclose(missing, 1.0):
            query = query * missing
        attended = varlen_attn(query, key, value, *spans)
        assert isinstance(attended, Tensor)  # and no log-sum-exp, which was not asked for
        output = attended
    return output.narrow(-1, 0, head_dim)


def _cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In autocast's dtype, where it is on; it leaves float64 alone."""
    device_type = query.device.type
    if not torch.is_autocast_enabled(device_type):
        return query, key, value
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(query), cast(key), cast(value)


def _check(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor
) -> None:
    """Refuse shapes, dtypes and devices that do not fit. Looks at no element."""
    if query.ndim != 3:
        raise ValueError(
            f"query must be [entries, heads, head_dim], found shape {list(query.shape)}"
        )
    if query.dtype not in ATTENTION_DTYPES:
        raise ValueError(f"query must be {listed(ATTENTION_DTYPES)}; found {query.dtype}")
    if 0 in query.shape[1:]:
        raise ValueError(f"query has no heads or no head_dim: its shape is {list(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.ndim != 3 or tensor.shape[1:] != query.shape[1:] or len(tensor) != len(key):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but query has {list(query.shape)}: heads "
                "and head_dim must be alike, and keys as many as values"
            )
        if tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, but query is {query.dtype}: they need one dtype "
                "(torch.autocast converts them)"
            )
    check_offsets(query_offsets)
    check_offsets(key_offsets)
    if len(query_offsets) != len(key_offsets):
        raise ValueError(
            f"query_offsets are those of {len(query_offsets) - 1} cells, but key_offsets of "
            f"{len(key_offsets) - 1}"
        )
    offsets = (("query_offsets", query_offsets), ("key_offsets", key_offsets))
    for name, tensor in (("key", key), ("value", value), *offsets):
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, but query is on {query.device}")


def _choose(query: Tensor, backend: str | None) -> str:
    """The backend that is asked for, if it can compute here; else the fastest that can."""
    if backend is None:
        if os.environ.get("CELLPATCH_BACKEND") == "reference":
            return "reference"
        candidates = ["flash_attn", "varlen", "memory_efficient", "numba", "reference"]
        return next(name for name in candidates if _unfit(name, query) is None)
    if backend not in get_args(EntryAttentionBackend):
        raise ValueError(
            f"unknown backend {backend!r} of attention: choose from "
            f"{', '.join(get_args(EntryAttentionBackend))}"
        )
    if (reason := _unfit(backend, query)) is not None:
        raise ValueError(f"the backend {backend} {reason}; backend=None chooses one that can")
    return backend


def _unfit(backend: str, query: Tensor) -> str | None:
    """Why a backend cannot compute; None if it can."""
    if backend == "reference":
        return None
    place = "a CPU" if backend == "numba" else "a CUDA GPU"
    if query.device.type != ("cpu" if backend == "numba" else "cuda"):
        return f"runs on {place}, but query is on {query.device}"
    if backend in ("numba", "memory_efficient"):
        return f"has no float64 on {place}" if query.dtype == torch.float64 else None
    if backend == "flash_attn" and not FLASH_ATTN_INSTALLED:
        return "needs the package flash-attn: pip install 'cellpatch-fast[flash]'"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 and bfloat16, but query is {query.dtype}"
    if query.shape[-1] > LARGEST_HEAD_DIM:
        return f"takes a head_dim of at most {LARGEST_HEAD_DIM}, found {query.shape[-1]}"
    if torch.compiler.is_compiling():  # what is asked here cannot be traced
        return None
    found = torch.cuda.get_device_capability(query.device)
    if found < OLDEST_GPU:
        least, has = (".".join(map(str, version)) for version in (OLDEST_GPU, found))
        return f"needs a GPU of compute capability {least}, and {query.device} has {has}"
    return None
