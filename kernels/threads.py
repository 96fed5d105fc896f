"""Run a function over ranges of cells on several threads.

Compiled kernels release the GIL, so plain Python threads are enough. They are used instead of
Numba's ``prange`` because its default threading layer may not be entered from two threads at
once, which is what a loader that prepares the next batch does.

The number of threads is ``torch.get_num_threads()``: one setting, the one PyTorch users know.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count as counter

import torch

_pool: ThreadPoolExecutor | None = None


def run_blocks(task: Callable[[int, int], None], count: int, block: int) -> None:
    """Call ``task(start, stop)`` for consecutive ranges that cover ``range(count)``.

    Threads take the next range when they finish one, so ranges of uneven cost balance. The
    first exception is raised here once all threads have stopped.

    Parameters
    ----------
    task
        Must release the GIL to run in parallel and must not depend on the order of ranges.
    count
        Number of items (cells).
    block
        Items per range.
    """
    blocks = -(-count // block)
    threads = min(torch.get_num_threads(), blocks)
    ticket = counter()  # next() is atomic: it is a C function that holds the GIL
    failed = threading.Event()

    def work() -> None:
        while not failed.is_set() and (index := next(ticket)) < blocks:
            try:
                task(index * block, min(count, (index + 1) * block))
            except BaseException:
                failed.set()
                raise

    others = [_threads().submit(work) for _ in range(threads - 1)]
    try:
        work()
        wait(others)
    except BaseException:  # Ctrl-C too
        failed.set()
        wait(others)
        raise
    for other in others:
        other.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        # The most that there can ever be, should torch's number be raised: they start when needed.
        workers = max(os.cpu_count() or 1, torch.get_num_threads())
        _pool = ThreadPoolExecutor(workers, thread_name_prefix="cellpatch")
    return _pool


def _forget_pool() -> None:
    """A forked child has none of its parent's threads: it must start its own."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
