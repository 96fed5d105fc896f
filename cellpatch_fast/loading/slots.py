"""Memory for windows, reused: page-locked where batches go to a GPU.

Page-locked memory takes milliseconds to get and fresh memory a page fault per 4 KB, so windows
live in slots that come back:

- On the way to a GPU, a slot is free once the copies from it are done, which an event tells.
- Otherwise the batches are the slot's memory. It is free when the last tensor on it is gone,
  however long somebody keeps a batch; nothing is ever overwritten that can still be seen.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; a cache line


class Slots:
    """Gives out memory and takes it back.

    Parameters
    ----------
    pinned
        Whether it is page-locked.
    most
        Free slots that are kept at most.
    """

    def __init__(self, *, pinned: bool, most: int) -> None:
        self._pinned, self._most = pinned, most
        self._free: list[Tensor] = []
        self._lock = threading.RLock()  # collecting garbage inside `take` may give back

    def take(self, size: int) -> Slot:
        """A slot of at least ``size`` bytes."""
        with self._lock:
            fitting = [memory for memory in self._free if len(memory) >= size]
            if fitting:
                memory = min(fitting, key=len)
                self._free = [other for other in self._free if other is not memory]
                return Slot(self, memory)
            if self._free:
                self._free.pop(0)  # too small: a larger one takes its place
        size += size // 8  # so that the next window, somewhat larger, fits too
        return Slot(self, torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned))

    def give_back(self, memory: Tensor) -> None:
        with self._lock:
            if len(self._free) < self._most:
                self._free.append(memory)

    def close(self) -> None:
        """Keep nothing any more, also of what comes back later."""
        with self._lock:
            self._most = 0
            self._free.clear()

    @property
    def free_bytes(self) -> int:
        with self._lock:
            return sum(map(len, self._free))


class Slot:
    """Memory of one window, cut into arrays by `tensor`."""

    def __init__(self, slots: Slots, memory: Tensor) -> None:
        self._slots, self._used = slots, 0
        self._pending: list[torch.cuda.Event] = []
        # Tensors cut from ``_whole`` keep this array alive, and nothing else does.
        lease = memory.numpy()[:]
        weakref.finalize(lease, _returned, slots, memory, self._pending).atexit = False
        self._whole = torch.from_numpy(lease)

    def tensor(self, length: int, dtype: torch.dtype) -> Tensor:
        """The next ``length`` elements."""
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        self._used = start + length * dtype.itemsize
        return self._whole[start : self._used].view(dtype)

    def copied(self, event: torch.cuda.Event) -> None:
        """The slot must not be reused before ``event``."""
        self._pending.append(event)


def slot_bytes(*parts: tuple[int, np.dtype]) -> int:
    """Bytes that tensors of these lengths and types take in a slot."""
    return sum(length * dtype.itemsize + ALIGNMENT for length, dtype in parts)


def _returned(slots: Slots, memory: Tensor, pending: list[torch.cuda.Event]) -> None:
    for event in pending:
        event.synchronize()
    slots.give_back(memory)
