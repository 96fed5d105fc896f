"""Training steps, ours and the original's: the group "training" of `pytest bench`.

Whole steps (forward, loss, backward, clipping, Adam) as `bench.training` makes them, in one process
with the settings of memory that suit the original (`ENVIRONMENT`), the two in turn, so that a noisy
machine disturbs both alike.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench import training
from bench.cpu import timed
from bench.options import Options
from bench.peers.registry import ENVIRONMENT, PEERS
from bench.processes import COMPILING, Failed, run_python, timing_of
from bench.reporting.results import Record

QUICK = training.Sizes(pretraining_cells=32, finetuning_cells=64, repeats=3)
FULL = training.Sizes(repeats=5)
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
            details = {"model": model, "task": task, "cells": cells, "genes": sizes.length}
            if isinstance(done, Failed):
                yield Record("training", name, *done, details=details)
                continue
            facts = done.facts[task][model]
            seconds = timing_of(facts.pop("seconds"))
            details |= {"cells_per_second": cells / seconds.median, **facts}
            yield Record("training", name, "measured", seconds=seconds, per="step", details=details)


def train_alone(device: torch.device, sizes: training.Sizes) -> dict[str, Any]:
    """By task and model, the seconds of each step, and of the original the size of a part."""
    masked = training.hide(training.draw(sizes.pretraining_cells, sizes.length))
    part, original = training.fastest_original_pretraining(masked, device)
    pretraining = timed(training.our_pretraining(masked, device), original, repeats=sizes.repeats)
    del original
    cells = training.draw(sizes.finetuning_cells, sizes.length)
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


if __name__ == "__main__":
    chosen = training.Sizes(*json.loads(sys.argv[2]))
    print(json.dumps(train_alone(torch.device(sys.argv[1]), chosen)))
