"""Ragged attention on a GPU: launches the kernels of `ragged.py` and `ragged_backward.py`.

What is launched depends on shapes alone, never on what tensors hold: nothing waits for the device,
and all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
import triton
from torch import Tensor

from ..ragged import RaggedAttention
from .attention import CHUNK
from .configuration import Configuration, compiler_options
from .encoder import architecture, note_compilation, table_type
from .faults import faults, raise_faults
from .ragged import ENTRIES_PER_PLACE, attend_slots, merge_slots

MOST_QUERIES = 64  # of a block


def forward(problem: RaggedAttention) -> tuple[Tensor, Tensor]:
    """Output [c, q, h, d] in the dtype of the queries; log-sum-exp float32 [c, h, q].

    Raises
    ------
    ValueError
        If an earlier batch was found to be wrong, or this one already was (in the interpreter).
    """
    launch = _Launch(problem)
    cells, queries, heads = problem.cells, problem.queries, problem.heads
    output = torch.empty(
        (cells, *problem.query.shape[1:]), dtype=problem.query.dtype, device=launch.device
    )
    log_sum_exp = launch.empty(cells, heads, queries)
    places = problem.entries // ENTRIES_PER_PLACE.value
    normalizers = launch.empty(places, heads, queries, 2)
    partials = launch.empty(places, heads, queries, problem.head_dim)
    configuration = forward_configuration(problem.query.dtype, launch.dim)
    launch.run(
        attend_slots, launch.slots * launch.programs_per_cell, configuration,
        *launch.inputs, output, log_sum_exp, normalizers, partials, launch.faults,
        *launch.counts, *launch.drop, **launch.constants,
        BINNED=problem.binned, TILE=configuration.tile, STAGES=configuration.stages,
    )  # fmt: skip
    launch.run(
        merge_slots, cells * launch.programs_per_cell, configuration,
        problem.offsets, output, log_sum_exp, normalizers, partials, launch.faults,
        cells, problem.entries, queries, heads, launch.drop[-1], **launch.constants,
        EXACT=problem.query.dtype == torch.float32,
    )  # fmt: skip
    return output, log_sum_exp


class _Launch:
    """One batch, and what its kernels are launched with."""

    def __init__(self, problem: RaggedAttention) -> None:
        self.device = problem.query.device
        raise_faults(self.device)
        table_type(problem.query.dtype)
        self.faults = faults(self.device)
        self.slots = problem.cells + problem.entries // CHUNK.value
        self.dim = padded(problem.head_dim)
        block = min(MOST_QUERIES, padded(problem.queries))
        self.programs_per_cell = problem.heads * triton.cdiv(problem.queries, block)
        amounts = problem.amounts
        if amounts is not None and amounts.dtype in (torch.float64, torch.bfloat16):
            amounts = amounts.float()
        # a probability of 0 but for rounding drops nothing
        threshold = round(problem.dropout * 2**32)
        self.inputs = problem._replace(amounts=amounts, seed=problem.seed if threshold else None)[
            : RaggedAttention._fields.index("scale")
        ]
        limit = min(threshold, 2**32) - 1  # as a signed number of the same 32 bits
        bins = len(problem.key_part) if problem.binned else 0
        self.counts = (
            problem.cells, problem.entries, len(problem.key), bins, problem.queries, problem.heads,
            0 if len(problem.query) == 1 else 1,
        )  # fmt: skip
        self.drop = (limit - 2**32 * (limit >= 2**31), problem.scale, 1 / (1 - problem.dropout))
        self.constants = {"HEAD_DIM": problem.head_dim, "DIM": self.dim, "QUERIES": block}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def run(
        self, kernel: Any, programs: int, configuration: Configuration, *arguments: Any,
        **constants: Any,
    ) -> None:  # fmt: skip
        if programs == 0:
            return
        # Triton launches on the current device, whatever device the tensors are on
        on_gpu = self.device.type == "cuda"
        there = torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext()
        key = (
            kernel.__name__,
            self.device,
            *(str(x.dtype) for x in arguments if isinstance(x, Tensor)),
            *constants.items(),
        )
        started = time.perf_counter()
        with there:
            options = compiler_options(architecture(self.device), configuration)
            kernel[(programs,)](*arguments, **constants, **options)
        note_compilation(key, time.perf_counter() - started)
        if not on_gpu:  # nothing is asynchronous there
            raise_faults(self.device)


def padded(size: int) -> int:
    """What a tile has of an axis: a power of two, at least the 16 of a matrix product."""
    return max(16, triton.next_power_of_2(size))


def forward_configuration(dtype: torch.dtype, dim: int) -> Configuration:
    return Configuration(64, 4, 2)
