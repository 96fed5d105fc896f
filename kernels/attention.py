"""Ragged cross-attention for any code base: the public functions.

Queries attend over the entries of their cell, where "cell" is whatever owns a stretch of entries:
a cell of genes, a document, a set, an image's tokens. Nothing is padded. Two functions, one
operator: keys and values given per entry, or looked up in tables by an id per entry, so that
embedded tokens never exist in memory.

How it relates to what people call it elsewhere:

- Perceiver, Set Transformer (PMA) and patch tokens: learned queries, the same for all cells,
  ``query[None]``.
- Flamingo-style resamplers, decoders: queries of each cell, [cells, queries, heads, head_dim].
- CellPatch's encoder: `ragged_gather_cross_attention` with projected gene embeddings as tables
  and expression values as amounts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attention_ops, reference
from .backends import Backend, resolve_backend
from .checks import check_attention, check_attention_contents, looks_at_contents
from .ragged import RaggedAttention

LARGEST_HEAD_DIM = 128  # of the fast backends


class Attended(NamedTuple):
    """What attention returns."""

    output: Tensor  # [c, q, h, d]
    log_sum_exp: Tensor  # [c, h, q]


def ragged_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Attended:
    """Queries attend over the entries of their cell, forward and backward.

    Parameters
    ----------
    query
        [1 or cells, queries, heads, head_dim]: learned queries that all cells share, or queries
        per cell. float32, bfloat16, float16, or float64 (reference backend).
    key, value
        [entries, heads, head_dim], of the dtype of ``query``.
    offsets
        int32 or int64 [cells + 1]; cell ``c`` owns the entries ``offsets[c] : offsets[c + 1]``.
    bias
        Added to the scaled scores, [entries] or [entries, heads]: a mask (-inf), the logarithm of
        how often an entry counts, a distance.
    scale
        Factor of ``query · key``; None for 1 / sqrt(head_dim).
    dropout
        Probability of dropping an attention weight; drawn from PyTorch's random state.
    backend
        ``"reference"``, ``"numba"`` (CPU) or ``"triton"`` (CUDA); None chooses.

    Returns
    -------
    Attended
        ``output`` [cells, queries, heads, head_dim], in the dtype of ``query``, or autocast's; 0
        for a cell without entries. ``log_sum_exp`` float32 [cells, heads, queries], the logarithm
        of each softmax's denominator, with which results over several sets of keys are combined;
        -inf for a cell without entries. Both are differentiable.

    Raises
    ------
    ValueError
        If shapes, dtypes, devices, offsets or the backend do not fit. On a GPU the contents of
        offsets are not waited for: what is wrong with them is raised by the next call or by
        `synchronize`, unless CELLPATCH_CHECK=1 is set.

    Notes
    -----
    All queries of a cell see all its entries, so no causal order applies. Memory beyond inputs
    and outputs grows with cells and entries, never with entries times queries. A cell's output
    depends on that cell alone, bit for bit. On a GPU float32 gradients of shared table rows are
    summed by atomics, or in a fixed order under ``torch.use_deterministic_algorithms(True)``.

    Examples
    --------
    Pooling by attention (Set Transformer, PMA): ``seeds`` learned vectors summarise each set.

    >>> seeds = torch.nn.Parameter(torch.randn(1, 4, 2, 16))  # [1, queries, heads, head_dim]
    >>> keys, values = torch.randn(2, 7, 2, 16)  # 7 entries in sets of 3, 0 and 4
    >>> offsets = torch.tensor([0, 3, 3, 7])
    >>> ragged_cross_attention(seeds, keys, values, offsets).output.shape
    torch.Size([3, 4, 2, 16])

    Perceiver: ``latents`` [queries, dim] read a ragged batch of ``inputs`` [entries, dim].

    >>> latents, inputs = torch.randn(5, 32), torch.randn(7, 32)
    >>> to_query, to_key, to_value = (torch.nn.Linear(32, 32) for _ in range(3))
    >>> heads = lambda x: x.unflatten(-1, (2, 16))
    >>> read = ragged_cross_attention(
    ...     heads(to_query(latents))[None], heads(to_key(inputs)), heads(to_value(inputs)), offsets
    ... )
    >>> read.output.flatten(2).shape
    torch.Size([3, 5, 32])

    Flamingo-style: the tokens of each text, [cells, queries, ...], look at the text's own images.

    >>> tokens = torch.randn(3, 6, 32)
    >>> seen = ragged_cross_attention(
    ...     heads(to_query(tokens)), heads(to_key(inputs)), heads(to_value(inputs)), offsets
    ... )
    >>> seen.output.flatten(2).shape
    torch.Size([3, 6, 32])
    """
    problem = RaggedAttention(
        query, key, value, offsets, None, None, None, None, bias, None,
        _default(scale, query), dropout,
    )  # fmt: skip
    return attend(problem, backend)


def ragged_gather_cross_attention(
    query: Tensor,
    key_table: Tensor,
    value_table: Tensor,
    ids: Tensor,
    offsets: Tensor,
    *,
    amounts: Tensor | None = None,
    key_part: Tensor | None = None,
    value_part: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Attended:
    """`ragged_cross_attention` with keys and values looked up in tables.

    Entry i has the key ``key_table[ids[i]]``, and its value likewise. Where entries also have an
    amount, ``amounts[i] * key_part`` is added to the key, or ``key_part[amounts[i]]`` where the
    parts have a row for each bin. Project embeddings once (``key_table = embedding @ weight.T``)
    and no embedded token is ever stored: an entry costs its id and its amount.

    Parameters
    ----------
    query
        [1 or cells, queries, heads, head_dim].
    key_table, value_table
        [rows, heads, head_dim], of the dtype of ``query``.
    ids
        [entries], below ``rows``; uint16, uint32, int32 or int64. May repeat.
    offsets
        int32 or int64 [cells + 1]; cell ``c`` owns the entries ``offsets[c] : offsets[c + 1]``.
    amounts
        [entries], uint8 or floating point. They receive no gradient.
    key_part, value_part
        [heads, head_dim], times the amount, or [bins, heads, head_dim] with at most 256 bins,
        for uint8 amounts. Given together with ``amounts``.
    bias, scale, dropout, backend
        As of `ragged_cross_attention`.

    Returns
    -------
    Attended
        As of `ragged_cross_attention`.

    Raises
    ------
    ValueError
        As `ragged_cross_attention`; also for ids without a row and amounts without a bin.

    Examples
    --------
    CellPatch's cross-attention: 64 patches over genes with expression values.

    >>> patches = torch.randn(1, 64, 2, 16)
    >>> keys, values = torch.randn(2, 60_000, 2, 16)  # projected gene embeddings
    >>> genes, offsets = torch.tensor([17, 5, 59_999]), torch.tensor([0, 2, 3])
    >>> expression, slopes = torch.tensor([1.0, 2.5, 0.7]), torch.randn(2, 2, 16)
    >>> ragged_gather_cross_attention(
    ...     patches, keys, values, genes, offsets,
    ...     amounts=expression, key_part=slopes[0], value_part=slopes[1],
    ... ).output.shape
    torch.Size([2, 64, 2, 16])
    """
    problem = RaggedAttention(
        query, key_table, value_table, offsets, ids, amounts, key_part, value_part, bias, None,
        _default(scale, query), dropout,
    )  # fmt: skip
    return attend(problem, backend)


def attend(problem: RaggedAttention, backend: str | None) -> Attended:
    """Check a problem, draw the seed that it lacks, and have it computed."""
    problem = _cast(problem)
    chosen = _choose(problem, backend)
    check_attention(problem, differentiable_amounts=chosen == "reference")
    problem = _normalise(problem)
    if chosen == "reference":
        if looks_at_contents(problem.query.device):
            check_attention_contents(problem)
        with torch.autocast(problem.query.device.type, enabled=False):
            return Attended(*reference.ragged_attention(problem))
    return Attended(*attention_ops.attend(problem, chosen))


def _default(scale: float | None, query: Tensor) -> float:
    if scale is not None:
        return scale
    return 1 / math.sqrt(max(1, query.shape[-1:].numel()))  # of a shape that is not yet checked


def _cast(problem: RaggedAttention) -> RaggedAttention:
    """Inputs of the products in autocast's dtype, where it is on; it leaves float64 alone."""
    device_type = problem.query.device.type
    if not torch.is_autocast_enabled(device_type) or problem.query.dtype == torch.float64:
        return problem
    dtype = torch.get_autocast_dtype(device_type)
    names = ("query", "key", "value", "key_part", "value_part")
    tensors = {name: getattr(problem, name) for name in names}
    return problem._replace(
        **{name: tensor.to(dtype) for name, tensor in tensors.items() if tensor is not None}
    )


def _choose(problem: RaggedAttention, backend: str | None) -> Backend:
    query = problem.query
    if backend is None and query.dtype == torch.float64:
        return "reference"  # the others compute in float32
    chosen = resolve_backend(backend, query.device)
    if chosen == "reference":
        return chosen
    if query.dtype == torch.float64:
        raise ValueError(f"the {chosen} backend computes in float32: float64 needs the reference")
    if query.ndim == 4 and not 1 <= query.shape[-1] <= LARGEST_HEAD_DIM:
        raise ValueError(
            f"the {chosen} backend takes a head_dim of 1 to {LARGEST_HEAD_DIM}, found "
            f"{query.shape[-1]}: use backend='reference'"
        )
    return chosen


def _normalise(problem: RaggedAttention) -> RaggedAttention:
    """Contiguous, offsets int64, bias float32 per head (the reference's own), a seed if needed."""
    bias, seed = problem.bias, None
    if bias is not None:
        if bias.ndim == 1:
            bias = bias[:, None].expand(-1, problem.heads)
        bias = bias.to(torch.promote_types(problem.query.dtype, torch.float32))
    if problem.dropout > 0:
        device = problem.query.device
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    problem = problem._replace(offsets=problem.offsets.long(), bias=bias, seed=seed)
    contiguous: dict[str, Any] = {
        name: field.contiguous()
        for name, field in problem._asdict().items()
        if isinstance(field, Tensor)
    }
    return problem._replace(**contiguous)
