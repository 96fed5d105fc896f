"""Training steps, ours and the original's: the group "training" of `pytest bench`.

Whole steps (forward, loss, backward, clipping, Adam) as `bench.training` makes them, in one process
with the settings of memory that suit the original (`ENVIRONMENT`), the two in turn, so that a noisy
machine disturbs both alike. The original takes a pretraining batch in parts whose gradients add up,
because it holds all pairs of prompts; of some sizes of part the fastest counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bench import training
from bench.cpu import timed
from bench.options import Options
from bench.peers.registry import ENVIRONMENT, PEERS
from bench.processes import COMPILING, Failed, run_python, timing_of
from cellpatch_fast.benchmarks.results import Record
from cellpatch_fast.masking import Masked


class Sizes(NamedTuple):
    pretraining_cells: int = 512
    finetuning_cells: int = 256
    genes: int = 1000  # of a cell, the median
    repeats: int = 5


QUICK = Sizes(pretraining_cells=32, finetuning_cells=64, repeats=3)
FULL = Sizes()
# Cells that the original pretrains with at a time, by kind of device. On two cores a step of 64
# cells took 2.2 s in parts of 4, 2.5 s in parts of 16, 3.0 s at once.
PARTS = {"cpu": (4, 64), "cuda": (64, 128, 256)}
PATIENCE = 20  # the group may take so many times as long as a point of other groups
OURS = next(peer.name for peer in PEERS if peer.ours)
ORIGINAL = next(peer.name for peer in PEERS if peer.key == "cellpatch-original")
TASKS = ("pretraining", "fine-tuning")


def measure_training(options: Options) -> Iterator[Record]:
    """A record of each task and model."""
    sizes, device = QUICK if options.quick else FULL, options.device
    done = run_python(
        *("-m", "bench.training_runs", str(device), json.dumps(sizes)),
        limit=PATIENCE * options.time_limit + COMPILING,
        environment=ENVIRONMENT if device.type == "cpu" else {},
    )
    for task, cells in zip(TASKS, (sizes.pretraining_cells, sizes.finetuning_cells), strict=True):
        for model in (OURS, ORIGINAL):
            name = f"training/{task}/{model}"
            details = {"model": model, "task": task, "cells": cells, "genes": sizes.genes}
            if isinstance(done, Failed):
                yield Record("training", name, *done, details=details)
                continue
            found = done.facts[task][model]
            seconds = timing_of(found.pop("seconds"))
            details |= {"cells_per_second": cells / seconds.median, **found}
            yield Record("training", name, "measured", seconds=seconds, per="step", details=details)


def train_alone(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """By task and model, the seconds of each step, and of the original the size of a part."""
    masked = training.hide(training.draw(sizes.pretraining_cells, sizes.genes))
    part, original = fastest_parts(masked, PARTS[device.type], device)
    pretraining = timed(training.our_pretraining(masked, device), original, repeats=sizes.repeats)
    del original
    cells = training.draw(sizes.finetuning_cells, sizes.genes)
    labels = torch.arange(len(cells)) % training.CLASSES
    steps = [
        make(cells, labels, device)
        for make in (training.our_finetuning, training.original_finetuning)
    ]
    finetuning = timed(*steps, repeats=sizes.repeats)
    return {
        task: {
            OURS: {"seconds": ours},
            ORIGINAL: {"seconds": theirs} | ({"cells_at_once": part} if task == TASKS[0] else {}),
        }
        for task, (ours, theirs) in zip(TASKS, (pretraining, finetuning), strict=True)
    }


def fastest_parts(
    masked: Masked, parts: Sequence[int], device: torch.device
) -> tuple[int, training.Step]:
    """The original's pretraining steps in parts of so many cells: the fastest of one call each."""
    cells = len(masked.encoder)
    sizes = sorted({min(part, cells) for part in parts})
    steps = [training.original_pretraining(masked, size, device) for size in sizes]
    taken = timed(*steps, repeats=1)
    return min(zip(taken, sizes, steps, strict=True), key=lambda found: found[0])[1:]


if __name__ == "__main__":
    print(json.dumps(train_alone(torch.device(sys.argv[1]), Sizes(*json.loads(sys.argv[2])))))
