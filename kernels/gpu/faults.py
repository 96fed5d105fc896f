"""What a kernel found wrong with its input, told without making anyone wait.

A kernel replaces a gene token or an id without a table row, a value without a bin, wrong offsets
and negative pads by something harmless and stores a 1 in `faults`: four numbers in page-locked host
memory, which a GPU can write to. That costs nothing where all is well, and after any
synchronisation the host sees it. The next call of a kernel raises it, or `raise_faults` does.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_MESSAGES = (
    "a gene token is not in the gene embedding, or an id has no row in the table: were the cells "
    "made with another vocabulary?",
    "a value has no bin, or an amount no row in the parts: clip the values as the model's config "
    "says",
    "offsets do not start at 0, decrease, or end beyond the entries",
    "a number of pads is negative",
)


@functools.cache
def faults(device: torch.device) -> Tensor:
    """int32 [4] that kernels on ``device`` write to; one place for each message."""
    return torch.zeros(len(_MESSAGES), dtype=torch.int32, pin_memory=device.type == "cuda")


def raise_faults(device: torch.device) -> None:
    """Raise what has been found so far. Waits for nothing: synchronize first to be sure.

    Raises
    ------
    ValueError
        Naming everything that was wrong since this was last asked.
    """
    found = faults(device)
    if not bool(found.numpy().any()):
        return
    messages = [text for text, there in zip(_MESSAGES, found.tolist(), strict=True) if there]
    found.zero_()
    raise ValueError(
        f"cells computed on {device} were wrong, and so is what came of them: "
        f"{'; '.join(messages)}. CELLPATCH_CHECK=1 names the batch, for the time of a check of "
        "all entries"
    )
