"""Models for tests of `pytest bench`, by what comes of them: `PEERS`, as its registry has them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.registry import Annotator, Peer
from cellpatch_fast import RaggedCells

CAP = 53


class Fake(Annotator):
    """A linear layer over values, and a deed at every call, which is told the input [c, n].

    It cannot be called before its kernels are compiled.
    """

    def __init__(self, deed: Callable[[Tensor], object], classes: int) -> None:
        super().__init__()
        self.deed, self.compiled = deed, False
        self.head = torch.nn.Linear(1, classes)

    def prepare(self, cells: RaggedCells) -> tuple[Tensor, ...]:
        return (cells.to_padded()[1].float(),)

    def compile_kernels(self) -> None:
        self.compiled = True

    def forward(self, values: Tensor) -> Tensor:
        assert self.compiled
        self.deed(values)
        logits: Tensor = self.head(values.mean(1, keepdim=True))
        return logits


def sleep_by_genes(values: Tensor) -> None:
    """A second for every 101 genes beyond the first 101."""
    time.sleep(max(0, values.shape[1] - 101) / 101)


def allocate(values: Tensor) -> None:
    """More than there is, where there are several cells."""
    if len(values) > 1:
        torch.empty(1 << 50)


def be_killed(values: Tensor) -> None:
    """As the system does to a process that holds too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def err(values: Tensor) -> None:
    raise ValueError("a mistake in the model")


def peer(
    key: str, deed: Callable[[Tensor], object], cap: int | None = None, ours: bool = False
) -> Peer:
    def make(device: torch.device, dtype: torch.dtype, classes: int) -> Annotator:
        if key == "missing":
            raise ImportError("pip install something")
        return Fake(deed, classes).to(device, dtype).eval()

    return Peer(
        key=key,
        name=f"the {key} one",
        make=make,
        tokens=lambda genes: genes if cap is None else min(genes, cap),
        cap=cap,
        architecture="a linear layer",
        setting="as it is",
        published=None,
        source="this file",
        ours=ours,
    )


PEERS = (
    peer("quick", lambda values: None, ours=True),
    peer("capped", lambda values: None, CAP),
    peer("slow", sleep_by_genes),
    peer("one at a time", allocate),
    peer("hungry", lambda values: torch.empty(1 << 50)),
    peer("killed", be_killed),
    peer("missing", lambda values: None),
    peer("wrong", err),
)
