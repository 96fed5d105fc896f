"""Ragged self-attention: the entries of a cell attend to each other, and to no other cell's.

CellPatch's decoder uses it: the genes to predict of one cell are 1,000 prompts at most. Others have
built good kernels for this, so none is written here. One function hides which of them computes:

- flash-attn, where it is installed, else the FlashAttention inside PyTorch
  (`torch.nn.attention.varlen`), for half precision on CUDA;
- PyTorch's memory-efficient attention for float32 on CUDA: the kernel that nested jagged tensors
  call, called directly, because those take a dense way out where a cell is empty, and torch.compile
  cannot trace their backward;
- PyTorch's CPU flash attention, cell by cell. A cell of 1,000 entries with 2 heads of 16 takes
  2.6 ms forward and 5.1 ms backward on 2 cores, a call 0.03 ms: putting cells of equal length
  together would save nothing. It computes in float32 where the tensors are in half precision,
  whose backward took 12 ms there, and whose blocks may depend on the number of threads.
  Each cell is first copied to memory of its own, because matrix products may round by alignment,
  and a cell's bits shall depend on that cell alone.

All of them keep the log-sum-exp and compute scores again in the backward: memory grows with the
entries, never with their square. FLOP for n entries of a cell, h heads of d: 4·h·d·n² forward
(two products), 10·h·d·n² backward (five).
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .checks import ATTENTION_DTYPES, check_offsets, listed, looks_at_contents
from .self_attention_ops import attend, check_contents, longest

SelfAttentionBackend = Literal["reference", "memory_efficient", "varlen", "flash_attn"]

FLASH_ATTN_INSTALLED = importlib.util.find_spec("flash_attn") is not None
OLDEST_GPU = (8, 0)  # compute capability that FlashAttention needs
LARGEST_HEAD_DIM = 256  # of FlashAttention
ALIGNMENT = 8  # head_dim of CUDA's kernels is a multiple of it


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
        [entries, heads, head_dim], one of float16, bfloat16, float32, float64. `torch.autocast`
        casts all but float64.
    offsets
        int32 or int64 [cells + 1]; cell ``c`` owns the entries ``offsets[c] : offsets[c + 1]``. A
        cell may be empty.
    scale
        Factor of ``query · key``; None for 1 / sqrt(head_dim).
    max_length
        Entries of the longest cell, or more. None reads it from the offsets, for which a GPU is
        waited for; where torch.compile traces for CUDA, it must be given. A GPU is not asked
        whether it is right, but one that is too small ends in a device-side assertion.
    backend
        ``"reference"``, ``"memory_efficient"`` (PyTorch's own, on CPU and CUDA), ``"varlen"``
        (PyTorch's FlashAttention) or ``"flash_attn"`` (the package), the last two for half
        precision on CUDA. None chooses the fastest that can compute; CELLPATCH_BACKEND=reference
        makes that the reference.

    Returns
    -------
    Tensor
        [entries, heads, head_dim], of the dtype of ``query``, or autocast's.

    Raises
    ------
    ValueError
        If shapes, dtypes, devices, offsets, ``max_length`` or the backend do not fit. On a GPU the
        contents of offsets are looked at only where CELLPATCH_CHECK=1 is set.

    Notes
    -----
    A cell's result on the CPU is the same, bit for bit, whatever batch it is in, and so are its
    gradients. On CUDA, gradients are deterministic under
    ``torch.use_deterministic_algorithms(True)``.

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
    query, key, value = _cast(query, key, value)
    _check(query, key, value, offsets)
    chosen = _choose(query, backend)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    if chosen == "memory_efficient" and query.device.type == "cpu":
        return attend(query, key, value, offsets, max_length, scale)  # checks contents itself
    if looks_at_contents(query.device):
        check_contents(query, offsets, max_length)
    if chosen == "reference":
        with torch.autocast(query.device.type, enabled=False):
            return reference.ragged_self_attention(query, key, value, offsets, scale)
    if len(query) == 0:
        return query + key + value  # as empty, and differentiable
    if max_length is None:
        max_length = longest(offsets)
    else:  # kernels would leave the rest of a longer cell as they found it
        torch._assert_async(offsets.diff().max() <= max_length, "a cell is longer than max_length")
    return _on_cuda(chosen, query, key, value, offsets.int(), max_length, scale)


def _on_cuda(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    max_length: int,
    scale: float,
) -> Tensor:
    """One of the kernels of CUDA, with head_dim as they need it."""
    head_dim = query.shape[-1]
    padding = -head_dim % ALIGNMENT
    if padding:  # zeros add nothing to scores
        query, key, value = (F.pad(x, (0, padding)) for x in (query, key, value))
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if backend == "memory_efficient":
        output = attend(query, key, value, offsets, max_length, scale)
    elif backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        output = flash_attn_varlen_func(
            query, key, value, offsets, offsets, max_length, max_length,
            softmax_scale=scale, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    else:
        from torch.nn.attention.varlen import varlen_attn

        # in PyTorch 2.10 its scale is fixed: queries take what is missing, nothing by default
        missing = scale * math.sqrt(query.shape[-1])
        if not math.isclose(missing, 1.0):
            query = query * missing
        attended = varlen_attn(query, key, value, offsets, offsets, max_length, max_length)
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


def _check(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> None:
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
        if tensor.shape != query.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but query has {list(query.shape)}: they "
                "must be alike"
            )
        if tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, but query is {query.dtype}: they need one dtype "
                "(torch.autocast converts them)"
            )
    check_offsets(offsets)
    for name, tensor in (("key", key), ("value", value), ("offsets", offsets)):
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, but query is on {query.device}")


def _choose(query: Tensor, backend: str | None) -> str:
    """The backend that is asked for, if it can compute here; else the fastest that can."""
    flash = _without_flash(query)
    if backend is None:
        if os.environ.get("CELLPATCH_BACKEND") == "reference":
            return "reference"
        if flash is None:
            return "flash_attn" if FLASH_ATTN_INSTALLED else "varlen"
        return "memory_efficient" if _without_efficient(query) is None else "reference"
    if backend not in get_args(SelfAttentionBackend):
        raise ValueError(
            f"unknown backend {backend!r} of self-attention: choose from "
            f"{', '.join(get_args(SelfAttentionBackend))}"
        )
    reason = None
    if backend in ("flash_attn", "varlen"):
        reason = flash
    elif backend == "memory_efficient":
        reason = _without_efficient(query)
    if reason is None and backend == "flash_attn" and not FLASH_ATTN_INSTALLED:
        reason = "needs the package flash-attn: pip install 'cellpatch-fast[flash]'"
    if reason is not None:
        raise ValueError(f"the backend {backend} {reason}; backend=None chooses one that can")
    return backend


def _without_flash(query: Tensor) -> str | None:
    """Why FlashAttention cannot compute; None if it can."""
    if query.device.type != "cuda":
        return f"runs on a CUDA GPU, but query is on {query.device}"
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


def _without_efficient(query: Tensor) -> str | None:
    """Why PyTorch's memory-efficient kernels cannot compute; None if they can."""
    if query.device.type not in ("cpu", "cuda"):
        return f"runs on a CPU or a CUDA GPU, but query is on {query.device}"
    if query.device.type == "cuda" and query.dtype == torch.float64:
        return "has no float64 on a GPU"
    return None
