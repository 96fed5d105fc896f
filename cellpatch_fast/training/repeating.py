"""What makes a run repeatable: seeds of steps, and deterministic algorithms."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import torch


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of PyTorch's generators for a step, another one for every step and process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Meanwhile PyTorch uses deterministic algorithms alone, where that is ``wanted``."""
    if not wanted:  # what is set stays: setting it imports PyTorch's compiler, 1.1 s
        yield
        return
    # without this, which cuBLAS reads when it is first used, it is refused
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
