"""Attention of constant queries over ragged keys, with what others have built.

Each baseline attends 64 queries, the same for every cell, over that cell's keys. All of them need
keys and values of every entry in memory, so making those is part of what is timed, in two forms:

- ``plain``: look up the gene's embedding, add the value part, project to keys and values;
- ``projected``: look up the row of a table that was projected before, add the projected value part.

What depends on the cells' lengths alone is made beforehand and not timed: repeated queries,
lengths, masks, padded tokens. On a GPU `torch.compile` makes keys and values, fusing the look-up
with the sum. Both favour the baselines.

A baseline imports what it needs when it is prepared, so that a missing package fails by itself.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from cellpatch_fast.kernels import EncoderWeights
from torch import Tensor

from bench.measure import Call, Method, explain
from cellpatch_fast import RaggedCells

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values: see `Baseline`
Form = Literal["plain", "projected"]
PADDED_TOKENS = 1 << 25
FLEX_KEYS = 128  # keys of a block of FlexAttention's mask; a block of queries is one cell


class Baseline(NamedTuple):
    """An attention. ``prepare`` takes the number of queries of a cell, and cells; what it returns
    takes queries [c · p, h, d], and keys and values [n, h, d], or [c, longest, h, d] where padded,
    and returns [c, p, D] or the same memory in another shape.
    """

    name: str
    prepare: Callable[[int, RaggedCells], Attend]
    padded: bool = False
    replayable: bool = False  # from a CUDA graph: does nothing that waits for the host


def methods(weights: EncoderWeights, dtype: torch.dtype) -> Iterator[Method]:
    """Every baseline in both forms, for affine value embeddings."""
    forms: tuple[Form, ...] = ("plain", "projected")
    for form in forms:
        make = KeysAndValues(weights, form, dtype)
        for baseline in BASELINES:
            method = Method(
                "cross-attention",
                baseline.name,
                form,
                functools.partial(_prepare, baseline, make),
                padded_tokens=PADDED_TOKENS if baseline.padded else None,
            )
            yield method
            if baseline.replayable:
                yield method._replace(replayed=True)


def _prepare(baseline: Baseline, make: KeysAndValues, cells: RaggedCells) -> Call:
    attend = baseline.prepare(len(make.queries), cells)
    queries = make.queries.repeat(len(cells), 1, 1)
    if baseline.padded:
        genes, values = cells.to_padded()
        genes = genes.int()
    else:
        genes, values = cells.genes.int(), cells.values

    def call() -> Tensor:
        keys, rows = make(genes, values)
        return attend(queries, keys, rows).reshape(len(cells), *make.shape)

    return call


class KeysAndValues:
    """Makes keys and values [..., h, d] of genes and values [...], in one of the two forms."""

    def __init__(self, weights: EncoderWeights, form: Form, dtype: torch.dtype) -> None:
        assert weights.value_weight is not None
        assert weights.value_bias is not None
        patches, dim = weights.patches.shape
        self.heads, self.shape = weights.heads, (patches, dim)
        matrix, bias = weights.cross.in_weight.double(), weights.cross.in_bias.double()
        queries = F.linear(weights.patches.double(), matrix[:dim], bias[:dim])
        self.queries = queries.to(dtype).unflatten(-1, (self.heads, -1))
        matrix, bias = matrix[dim:], bias[dim:]  # of keys and values
        slope, constant = weights.value_weight.double(), weights.value_bias.double()
        self.project: tuple[Tensor, Tensor] | None = None
        table = weights.genes.double()
        if form == "plain":
            self.project = matrix.to(dtype), bias.to(dtype)
        else:
            slope, constant = matrix @ slope, torch.zeros_like(bias)
            table = F.linear(table, matrix, bias + matrix @ weights.value_bias.double())
        self.table, self.slope, self.constant = (x.to(dtype) for x in (table, slope, constant))
        self.look_up = self._compiled() if table.device.type == "cuda" else self._look_up

    def __call__(self, genes: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.look_up(genes, values)
        if self.project is not None:
            embedded = F.linear(embedded, *self.project)
        keys, rows = embedded.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return keys, rows

    def _compiled(self) -> Callable[[Tensor, Tensor], Tensor]:
        compiled = torch.compile(self._look_up, dynamic=True)
        entries = torch.arange(5, device=self.table.device)
        try:
            compiled(entries.int(), entries.to(torch.uint8))
        except Exception as failure:  # of any type: it is the compiler's
            warnings.warn(f"baselines look up uncompiled: {explain(failure)}", stacklevel=2)
            return self._look_up
        return compiled

    def _look_up(self, genes: Tensor, values: Tensor) -> Tensor:
        part = values.to(self.table.dtype).unsqueeze(-1) * self.slope
        if self.project is not None:
            part = part + self.constant
        return F.embedding(genes, self.table) + part


def _starts(patches: int, cells: RaggedCells) -> Tensor:
    """Where each cell's queries begin, int32 [c + 1]."""
    return torch.arange(0, (len(cells) + 1) * patches, patches, device=cells.device).int()


def varlen_attn(patches: int, cells: RaggedCells) -> Attend:
    """The FlashAttention inside PyTorch."""
    from torch.nn.attention.varlen import varlen_attn

    offsets = _starts(patches, cells), cells.offsets.int()
    longest = patches, int(cells.lengths.max())
    return lambda queries, keys, rows: varlen_attn(  # type: ignore[return-value]
        queries, keys, rows, *offsets, *longest
    )


def flash_attn(patches: int, cells: RaggedCells) -> Attend:
    """The package flash-attn, version 2."""
    attention = importlib.import_module("flash_attn")

    offsets = _starts(patches, cells), cells.offsets.int()
    longest = patches, int(cells.lengths.max())
    return lambda queries, keys, rows: attention.flash_attn_varlen_func(
        queries, keys, rows, *offsets, *longest
    )


def nested(patches: int, cells: RaggedCells) -> Attend:
    """Nested jagged tensors and PyTorch's scaled dot-product attention.

    It takes contiguous keys and values only, so both are copied.
    """
    jagged = torch.nested.nested_tensor_from_jagged
    starts = _starts(patches, cells).long()
    shortest, longest = int(cells.lengths.min()), int(cells.lengths.max())

    def attend(queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
        ragged_queries = jagged(queries, starts, min_seqlen=patches, max_seqlen=patches)
        ragged_keys, ragged_rows = (
            jagged(x.contiguous(), cells.offsets, min_seqlen=shortest, max_seqlen=longest)
            for x in (keys, rows)
        )
        attended = F.scaled_dot_product_attention(
            ragged_queries.transpose(1, 2),
            ragged_keys.transpose(1, 2),
            ragged_rows.transpose(1, 2),
        )
        return attended.transpose(1, 2).values()

    return attend


def flex(patches: int, cells: RaggedCells) -> Attend:
    """FlexAttention with a document mask: one sequence of all cells."""
    mask = document_mask(cells, patches)
    run = _compiled_flex() if cells.device.type == "cuda" else _flex_attention()
    # The default block of queries is larger than a cell's, which the mask does not allow.
    options = {"BLOCK_M": patches, "BLOCK_N": 64}

    def attend(queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
        attended = run(
            queries.transpose(0, 1)[None],  # [1, h, c · p, d]
            keys.transpose(0, 1)[None],
            rows.transpose(0, 1)[None],
            block_mask=mask,
            kernel_options=options,
        )
        return attended[0].transpose(0, 1)

    return attend


def document_mask(cells: RaggedCells, patches: int) -> Any:
    """The block mask in which the queries of a cell see that cell's entries.

    PyTorch's own `create_block_mask` goes through a dense mask of all queries by all entries; here
    the blocks follow from the offsets: a cell's first and last block of keys may be shared with its
    neighbours, those between are its own.
    """
    from torch.nn.attention.flex_attention import BlockMask

    offsets = cells.offsets.long()
    first, last = offsets[:-1], offsets[1:]  # [c]
    whole_from = (first + FLEX_KEYS - 1) // FLEX_KEYS  # the first block that is all the cell's
    whole_to = torch.maximum(last // FLEX_KEYS, whole_from)  # behind the last such block
    outer_from, outer_to = first // FLEX_KEYS, (last + FLEX_KEYS - 1) // FLEX_KEYS
    width = int(torch.maximum(outer_to - outer_from, torch.full_like(first, 2)).max())
    blocks = torch.arange(width, device=cells.device)
    whole = whole_from[:, None] + blocks  # [c, width]; beyond the cell's number unused
    head_shared = outer_from < torch.minimum(whole_from, outer_to)
    tail_shared = (outer_to > whole_to) & (outer_to - 1 >= whole_from)
    shared = torch.zeros_like(whole)
    shared[:, 0] = torch.where(head_shared, outer_from, outer_to - 1)
    shared[:, 1] = outer_to - 1
    keys = FLEX_KEYS * (cells.entries // FLEX_KEYS + 1)

    def same_cell(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        cell = query // patches
        return (key >= offsets[cell]) & (key < offsets[cell + 1])

    return BlockMask.from_kv_blocks(
        (head_shared.int() + tail_shared.int())[None, None].int(),
        shared.clamp(max=keys // FLEX_KEYS - 1)[None, None].int(),
        (whole_to - whole_from)[None, None].int(),
        whole.clamp(max=keys // FLEX_KEYS - 1)[None, None].int(),
        BLOCK_SIZE=(patches, FLEX_KEYS),
        mask_mod=same_cell,
        seq_lengths=(len(cells) * patches, cells.entries),
        compute_q_blocks=False,
    )


def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    # fullgraph: fails rather than materialise all scores
    return torch.compile(_flex_attention(), dynamic=True, fullgraph=True)


def xformers(patches: int, cells: RaggedCells) -> Attend:
    """xformers' memory-efficient attention with a block-diagonal mask."""
    ops = importlib.import_module("xformers.ops")
    biases = importlib.import_module("xformers.ops.fmha.attn_bias")

    mask = biases.BlockDiagonalMask.from_seqlens([patches] * len(cells), cells.lengths.tolist())
    return lambda queries, keys, rows: ops.memory_efficient_attention(
        queries[None], keys[None], rows[None], attn_bias=mask
    )


def padded(patches: int, cells: RaggedCells) -> Attend:
    """PyTorch's scaled dot-product attention over padded cells, masked where any is padding."""
    lengths = cells.lengths
    longest = int(lengths.max())
    mask = None
    if int(lengths.min()) < longest:
        mask = (torch.arange(longest, device=cells.device) < lengths[:, None])[:, None, None]

    def attend(queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
        of_cells = queries.unflatten(0, (len(cells), patches)).transpose(1, 2)  # [c, h, p, d]
        attended = F.scaled_dot_product_attention(
            of_cells, keys.transpose(1, 2), rows.transpose(1, 2), attn_mask=mask
        )
        return attended.transpose(1, 2)

    return attend


BASELINES = (
    Baseline("varlen_attn", varlen_attn, replayable=True),
    Baseline("flash_attn_varlen_func", flash_attn, replayable=True),
    Baseline("nested jagged + SDPA", nested),
    Baseline("FlexAttention, document mask", flex),
    Baseline("xformers, block diagonal", xformers),
    Baseline("padded SDPA", padded, padded=True),
)
