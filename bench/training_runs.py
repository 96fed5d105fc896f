"""Training steps, ours and the original's: the group "training" of `pytest bench`.

Whole steps (forward, loss, backward, clipping, Adam) as `bench.training` makes them, the two in
turn, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench import training
from bench.cpu import timed
from bench.options import Options
from bench.peers.registry import PEERS
from bench.processes import timing_of
from cellpatch_fast.benchmarks.results import Record

QUICK = training.Sizes(pretraining_cells=64, finetuning_cells=128, repeats=3)
FULL = training.Sizes(repeats=5)
OURS = next(peer.name for peer in PEERS if peer.ours)
ORIGINAL = next(peer.name for peer in PEERS if peer.key == "cellpatch-original")


def measure_training(options: Options) -> Iterator[Record]:
    """A record of each task and model."""
    device, sizes = options.device, QUICK if options.quick else FULL
    masked = training.hide(training.draw(sizes.pretraining_cells, sizes.length))
    yield from _compare(
        "pretraining",
        sizes.pretraining_cells,
        sizes,
        training.our_pretraining(masked, device),
        training.original_pretraining(masked, sizes.part, device),
    )
    cells = training.draw(sizes.finetuning_cells, sizes.length)
    labels = torch.arange(len(cells)) % training.CLASSES
    yield from _compare(
        "fine-tuning",
        len(cells),
        sizes,
        training.our_finetuning(cells, labels, device),
        training.original_finetuning(cells, labels, device),
    )


def _compare(
    task: str, cells: int, sizes: training.Sizes, ours: training.Step, original: training.Step
) -> Iterator[Record]:
    times = timed(ours, original, repeats=sizes.repeats)
    for model, taken in zip((OURS, ORIGINAL), times, strict=True):
        seconds = timing_of(taken)
        details: dict[str, Any] = {
            "model": model,
            "task": task,
            "cells": cells,
            "genes": sizes.length,
            "cells_per_second": cells / seconds.median,
        }
        name = f"training/{task}/{model}"
        yield Record("training", name, "measured", seconds=seconds, per="step", details=details)
