"""Training's speed on a GPU: ``python bench/training_kernels.py [--output FILE.json]``.

The same rules, batches and bounds as `bench.kernels`, for forward and backward in one step, that
starts from the encoder's weights and ends in their gradients:

- the cross-attention, its table gradients by atomics and in a fixed order (deterministic), against
  the steps of what others have built (`bench.peers.steps`), each plain and with projected tables;
- the whole encoder's step against the padded original's;
- `ragged_cross_attention` over keys that are given per entry, 8 heads of 64, with 64 and 256
  queries, against FlashAttention: forward, and with backward;
- the memory that a step takes.

The roofline counts two products of matrices forward and five backward: the scores again, and the
gradients of weights, values, keys and queries. So a gene takes 28,672 FLOP, 256 exponentials and
6 bytes from device memory at the paper's sizes.

Every step is first compared with the float64 reference on a small batch, its gradients too.
``--toy`` takes tiny sizes; with ``--device cpu`` the kernels then run in Triton's interpreter. That
shows that all of this works and says nothing about speed.

Prints Markdown and writes JSON beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from cellpatch_fast.kernels import (
    EncoderWeights,
    encode,
    patch_attention,
    ragged_cross_attention,
    reference,
)

from bench.batches import Case, Drawing, chosen_cases
from bench.ceilings import Work, measure_ceilings, roofline
from bench.command import TYPES, describe, parse
from bench.kernels import (
    CHECKED_LENGTHS,
    ENTRIES,
    GENES,
    ORIGINAL_TOKENS,
    convert,
    widened,
)
from bench.measure import (
    Call,
    Computes,
    Effort,
    Method,
    Reference,
    Results,
    Row,
    Suite,
    measure_cases,
)
from bench.peers import attention, steps
from bench.peers.original import PaddedPathFormer
from bench.training_report import over_keys, report, targets
from cellpatch_fast import RaggedCells

# the interpreter takes its time, also for each row of a table whose gradients are summed
TOY_GENES, TOY_LENGTHS = 11, (1, 7)
TOY_CASE = "log-normal"
KEY_ENTRIES = 1_000_000  # of a batch with 8 heads of 64: 2 GB of keys and values
KEY_CHECKED_LENGTHS = CHECKED_LENGTHS[:4]  # the reference holds all pairs of queries and entries
KEY_CASES = ("1,000", "4,000", "16,000", "log-normal")
FLASH = ("varlen_attn", "flash_attn_varlen_func")


# --- steps from the encoder's weights ----------------------------------------------------------


def our_steps(weights: EncoderWeights, dtype: torch.dtype) -> Iterator[Method]:
    """The kernels as a training loop calls them."""
    leaves = steps.training(weights, dtype)

    def attend(cells: RaggedCells) -> Call:
        first = steps.leaves_of(leaves)
        inputs = cells.offsets, cells.genes, cells.values
        forward = partial(patch_attention, leaves, *inputs, backend="triton")
        return steps.step_of(lambda: forward()[0], first, len(first))

    def run_encoder(cells: RaggedCells) -> Call:
        first = steps.leaves_of(leaves)
        others = [x for x in leaves.tensors() if all(x is not leaf for leaf in first)]
        inputs = cells.offsets, cells.genes, cells.values
        forward = partial(encode, leaves, *inputs, backend="triton")
        return steps.step_of(lambda: forward().features, [*first, *others], len(first))

    def in_fixed_order(cells: RaggedCells) -> Call:
        return deterministic(attend(cells))

    yield Method("cross-attention, step", "ours", "", attend, ours=True)
    yield Method("cross-attention, step", "ours, deterministic", "", in_fixed_order, ours=True)
    yield Method("encoder, step", "ours", "", run_encoder, ours=True)


def deterministic(call: Call) -> Call:
    """The call under PyTorch's deterministic algorithms."""

    def run() -> Results:
        torch.use_deterministic_algorithms(True)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def expected_step(
    weights: EncoderWeights,
    cells: RaggedCells,
    dtype: torch.dtype,
    computes: Computes,
    pads: Tensor | None,
) -> Results:
    """The reference's output and gradients in ``dtype``."""
    leaves = steps.training(weights, dtype)
    inputs = cells.offsets, cells.genes, cells.values

    def forward() -> Tensor:
        if computes == "encoder, step":
            return reference.encode(leaves, *inputs, pads=pads).features
        return reference.patch_cross_attention(leaves, *inputs, pads=pads).attended

    first = steps.leaves_of(leaves)
    return steps.step_of(forward, first, len(first))()


def step_suites(
    model: PaddedPathFormer, dtype: torch.dtype, small: RaggedCells
) -> dict[bool, Suite]:
    """Suites for ordinary scores (False) and wide ones (True)."""
    from cellpatch_fast.model.live import _live_weights

    with torch.no_grad():
        weights = convert(_live_weights(model, project_out=True), torch.float32)
        both = {False: weights, True: widened(weights)}
    suites = {}
    for wide, of_suite in both.items():
        methods = list(our_steps(of_suite, dtype))
        if not wide:
            methods += steps.methods(weights, dtype)
            methods.append(steps.original_method(model, ORIGINAL_TOKENS))
        right = Reference(partial(expected_step, of_suite, small), small)
        suites[wide] = Suite(methods, partial(right.check, dtype=dtype))
    return suites


# --- keys and values given per entry -----------------------------------------------------------


class KeySizes:
    """Sizes of `ragged_cross_attention`; a toy's are small."""

    def __init__(self, toy: bool) -> None:
        self.heads, self.head_dim = (2, 16) if toy else (8, 64)
        self.queries = (16, 32) if toy else (64, 256)


def draw_leaves(
    cells: RaggedCells, sizes: KeySizes, queries: int, dtype: torch.dtype
) -> list[Tensor]:
    """Query [q, h, d], key and value [n, h, d]; the same ones for the same number of entries."""
    generator = torch.Generator(cells.device).manual_seed(0)
    return [
        torch.randn(rows, sizes.heads, sizes.head_dim, generator=generator, device=cells.device)
        .to(dtype)
        .requires_grad_()
        for rows in (queries, cells.entries, cells.entries)
    ]


def key_methods(sizes: KeySizes, dtype: torch.dtype) -> Iterator[Method]:
    """Forward, and with backward, for each number of queries: ours and FlashAttention's."""
    baselines = {baseline.name: baseline for baseline in attention.BASELINES}

    def prepare(name: str, queries: int, backward: bool, cells: RaggedCells) -> Call:
        leaves = draw_leaves(cells, sizes, queries, dtype)
        query, key, value = leaves
        attend = None if name == "ours" else baselines[name].prepare(queries, cells)

        def forward() -> Tensor:
            if attend is None:
                return ragged_cross_attention(
                    query[None], key, value, cells.offsets, backend="triton"
                ).output
            shape = len(cells), *query.shape
            return attend(query.repeat(len(cells), 1, 1), key, value).reshape(shape)

        return steps.step_of(forward, leaves, 3) if backward else torch.no_grad()(forward)

    for queries, backward, name in itertools.product(
        sizes.queries, (False, True), ("ours", *FLASH)
    ):
        prepared = partial(prepare, name, queries, backward)
        yield Method(over_keys(queries, backward), name, "", prepared, ours=name == "ours")


def expected_over_keys(
    cells: RaggedCells,
    sizes: KeySizes,
    dtype: torch.dtype,
    computes: Computes,
    pads: Tensor | None,
) -> Results:
    """The reference's in ``dtype``, of the same numbers."""
    queries = next(q for q in sizes.queries if computes.startswith(over_keys(q, False)))
    drawn = draw_leaves(cells, sizes, queries, torch.float32)
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in drawn]
    query, key, value = leaves

    def forward() -> Tensor:
        return ragged_cross_attention(
            query[None], key, value, cells.offsets, backend="reference"
        ).output

    if computes == over_keys(queries, True):
        return steps.step_of(forward, leaves, 3)()
    with torch.no_grad():
        return forward()


def measure_keys(
    drawing: Drawing, dtype: torch.dtype, options: argparse.Namespace
) -> Iterator[Row]:
    """`ragged_cross_attention` on some of the lengths; a toy's on one."""
    sizes = KeySizes(options.toy)
    small = drawing.cells(np.array(TOY_LENGTHS if options.toy else KEY_CHECKED_LENGTHS))
    right = Reference(partial(expected_over_keys, small, sizes), small)
    suite = Suite(list(key_methods(sizes, dtype)), partial(right.check, dtype=dtype))
    names = (TOY_CASE,) if options.toy else KEY_CASES
    cases = [case for case in chosen_cases(options.only, toy=False) if case.name in names]
    effort = Effort(0.0, 1, 1) if options.toy else Effort()
    return measure_cases(cases, drawing, lambda case: suite, effort, options.until)


# --- all of it ---------------------------------------------------------------------------------


def measure_all(
    model: PaddedPathFormer, device: torch.device, dtype: torch.dtype, options: argparse.Namespace
) -> Iterator[Row]:
    """A row for every method on every case."""
    genes, shorten = model.gene2vector.num_embeddings - 1, 100 if options.toy else 1
    drawing = Drawing(device, ENTRIES, genes=genes, shorten=shorten)
    effort = Effort(0.0, 1, 1) if options.toy else Effort()
    small = drawing.cells(np.array(TOY_LENGTHS if options.toy else CHECKED_LENGTHS))
    suites = step_suites(model, dtype, small)
    cases: list[Case] = [
        case
        for case in chosen_cases(options.only, toy=False)
        if case.name == TOY_CASE or not options.toy
    ]
    yield from measure_cases(cases, drawing, lambda case: suites[case.wide], effort, options.until)
    of_keys = Drawing(device, KEY_ENTRIES, genes=genes, shorten=shorten)
    yield from measure_keys(of_keys, dtype, options)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements; written to ``options.output`` after every row."""
    device, dtype = torch.device(options.device), TYPES[options.dtype]
    torch.manual_seed(0)
    model = PaddedPathFormer((TOY_GENES if options.toy else GENES) + 1, attention_dropout=0.0).to(
        device
    )
    heads = model.sizes[1]
    head_dim = model.sizes[0] // heads
    work = Work.of(model.pathway_token.shape[1], heads, head_dim, dtype)
    work = work.with_backward(heads, head_dim)
    ceilings = measure_ceilings(device, dtype, options.toy)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "toy": options.toy,
        "tables": options.dtype,
        "machine": describe(device),
        "ceilings": ceilings,
        "work per gene": work._asdict(),
        "roofline genes/s": roofline(ceilings, work) if device.type == "cuda" else None,
        "rows": [],
    }
    for row in measure_all(model, device, dtype, options):
        results["rows"].append(row.as_json())
        results["targets"] = targets(results)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    # without it, PyTorch's deterministic algorithms refuse products of matrices on a GPU
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    print(report(run(parse(__doc__, "training"))))


if __name__ == "__main__":
    main()
