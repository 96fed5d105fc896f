"""Training's speed on a CPU: ``python bench/training_cpu.py [--output FILE.json]``.

Measures in one run, interleaved so that a noisy machine disturbs all alike:

- the cross-attention's operator at CellPatch's size, forward and backward, and the ratio of the two
  (aimed for: at most 3); the same with dropped weights (at most 1.5 times as long);
- a whole training step of the encoder (`kernels.encode` with gradients of all weights), on the fast
  path and on the reference, and the padded original's on the same cells;
- self-attention among 1,000 entries of a cell, forward and backward.

Prints Markdown and writes JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from cellpatch_fast.kernels import EncoderWeights, attention_ops, encode
from cellpatch_fast.kernels.entry_attention import ragged_self_attention
from cellpatch_fast.kernels.ragged import RaggedAttention

from bench.cells import GENES, draw_cells
from bench.cpu import median, timed, with_values
from bench.machine import processor
from bench.peers.original import PaddedPathFormer
from bench.report import table
from cellpatch_fast import RaggedCells

CELLS, LENGTH = 512, 1000  # of a training batch
PATCHES, HEADS, HEAD_DIM = 64, 2, 16
FEW_CELLS = 64  # for what computes entry by entry in PyTorch, which takes long and much memory
TIMES_FORWARD = 3.0
DROPOUT, TIMES_NONE = 0.1, 1.5  # the model's default, and what it may cost


def training_weights(model: PaddedPathFormer) -> EncoderWeights:
    """The model's encoder, each tensor a leaf of its own that receives a gradient."""
    from cellpatch_fast.model.live import _live_weights

    tensors, structure = _live_weights(model, project_out=True).flatten()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    return EncoderWeights.unflatten(leaves, structure)


def gather_problem(cells: RaggedCells, genes: int) -> RaggedAttention:
    """CellPatch's cross-attention, from projected tables on."""
    tables = torch.randn(2, genes + 1, HEADS, HEAD_DIM)
    parts = torch.randn(2, HEADS, HEAD_DIM)
    return RaggedAttention(
        query=torch.randn(1, PATCHES, HEADS, HEAD_DIM),
        key=tables[0],
        value=tables[1],
        offsets=cells.offsets,
        ids=cells.genes,
        amounts=cells.values,
        key_part=parts[0],
        value_part=parts[1],
        bias=None,
        seed=None,
        scale=HEAD_DIM**-0.5,
        dropout=0.0,
    )


def both_directions(problem: RaggedAttention) -> list[Callable[[], object]]:
    """The registered operator and its backward, each alone."""
    output, log_sum_exp = attention_ops.attend(problem, "numba")
    gradient = torch.randn_like(output)
    delta = (gradient * output).sum(-1).transpose(1, 2).contiguous()
    backward = torch.ops.cellpatch.ragged_attention_backward
    return [
        partial(attention_ops.attend, problem, "numba"),
        partial(backward, gradient, delta, log_sum_exp, *problem, "numba"),
    ]


def measure_operator(cells: RaggedCells, genes: int, repeats: int) -> dict[str, float]:
    """Forward and backward, without and with dropped weights."""
    problem = gather_problem(cells, genes)
    dropped = problem._replace(dropout=DROPOUT, seed=torch.tensor([1]))
    times = timed(*both_directions(problem), *both_directions(dropped), repeats=repeats)
    forward, backward, dropped_forward, dropped_backward = times

    def ratio(above: list[float], below: list[float]) -> float:
        return median([one / other for one, other in zip(above, below, strict=True)])

    def both(one: list[float], other: list[float]) -> list[float]:
        return [a + b for a, b in zip(one, other, strict=True)]

    return {
        "cells": len(cells),
        "entries": cells.entries,
        "forward ms": 1e3 * median(forward),
        "backward ms": 1e3 * median(backward),
        "backward / forward": ratio(backward, forward),
        "target": TIMES_FORWARD,
        "dropout": DROPOUT,
        "forward ms, dropout": 1e3 * median(dropped_forward),
        "backward ms, dropout": 1e3 * median(dropped_backward),
        "dropout / none, forward": ratio(dropped_forward, forward),
        "dropout / none, backward": ratio(dropped_backward, backward),
        "dropout / none, both": ratio(
            both(dropped_forward, dropped_backward), both(forward, backward)
        ),
        "dropout / none, target": TIMES_NONE,
    }


def training_step(weights: EncoderWeights, cells: RaggedCells, backend: str) -> Callable[[], None]:
    """Features of the cells, and gradients of all weights."""
    leaves = weights.tensors()

    def step() -> None:
        batch = cells.offsets, cells.genes, cells.values
        features = encode(weights, *batch, backend=backend).features
        torch.autograd.grad(features.square().mean(), leaves)

    return step


def original_step(model: PaddedPathFormer, cells: RaggedCells) -> Callable[[], None]:
    genes, values = cells.to_padded()
    padded = values.float(), genes
    parameters = list(model.parameters())

    def step() -> None:
        features = model.get_mid_embeding(*padded)
        torch.autograd.grad(features.square().mean(), parameters, allow_unused=True)

    return step


def measure_step(cells: RaggedCells, genes: int, few: int, repeats: int) -> dict[str, float]:
    """Milliseconds per cell; the reference and the original take a few of the cells."""
    model = PaddedPathFormer(genes + 1)
    weights = training_weights(model)
    some = cells.slice(0, few)
    times = timed(
        training_step(weights, cells, "numba"),
        training_step(weights, some, "numba"),
        training_step(weights, some, "reference"),
        original_step(model, some),
        repeats=repeats,
    )
    ours, ours_few, reference, original = (1e3 * median(taken) for taken in times)
    return {
        "cells": len(cells),
        "ms per cell": ours / len(cells),
        "few cells": few,
        "ms per cell, few": ours_few / few,
        "ms per cell, reference": reference / few,
        "ms per cell, original": original / few,
        "reference / ours, few": reference / ours_few,
        "original / ours, few": original / ours_few,
        "reference / ours, per cell": reference / few / (ours / len(cells)),
        "original / ours, per cell": original / few / (ours / len(cells)),
    }


def measure_self_attention(cells: int, length: int, repeats: int) -> dict[str, float]:
    """The decoder's self-attention against the reference, which holds all pairs of a cell."""
    offsets = torch.arange(0, (cells + 1) * length, length)
    query, key, value = (
        torch.randn(cells * length, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3)
    )

    def forward(backend: str | None) -> Tensor:
        return ragged_self_attention(query, key, value, offsets, backend=backend)

    def step(backend: str | None) -> None:
        torch.autograd.grad(forward(backend).sum(), (query, key, value))

    runs = [partial(f, backend) for backend in (None, "reference") for f in (forward, step)]
    ours, our_step, theirs, their_step = (
        1e3 * median(taken) / cells for taken in timed(*runs, repeats=repeats)
    )
    return {
        "entries of a cell": length,
        "forward, ms per cell": ours,
        "forward + backward, ms per cell": our_step,
        "reference, forward + backward, ms per cell": their_step,
        "reference / ours, forward": theirs / ours,
        "reference / ours, forward + backward": their_step / our_step,
    }


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{results['date']}"
    ]
    for title in ("operator", "training step", "self-attention"):
        body = [[name, f"{value:,.4g}"] for name, value in results[title].items()]
        lines += table([title, ""], body)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    cells, length, few, repeats = (3, 40, 2, 1) if options.toy else (CELLS, LENGTH, FEW_CELLS, 7)
    drawn = with_values(*draw_cells(cells, length, rng), rng)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "toy": options.toy,
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "operator": measure_operator(drawn, GENES, repeats),
        "training step": measure_step(drawn, GENES, few, repeats),
        "self-attention": measure_self_attention(few, length, repeats),
    }
    print(report(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
