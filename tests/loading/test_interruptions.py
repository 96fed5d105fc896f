"""Errors of workers, and consumers that go away: nothing hangs, and no thread stays."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from cellpatch_fast import CellPatch, RaggedCells
from cellpatch_fast.loading import CellLoader
from cellpatch_fast.preprocessing.masking import Masked, Masking, mask

from .batches import (
    Files,
    assert_same,
    loading_threads,
    together,
)

pytestmark = pytest.mark.usefixtures("watchdog")


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("where", ["masking", "obs"])
def test_any_error_in_a_worker_reaches_the_consumer(
    originals: Files, small_model: CellPatch, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(cells: RaggedCells, rows: np.ndarray, **options: Any) -> Masked:
        if rows[0] >= 100:
            raise ZeroDivisionError("in masking")
        return mask(cells, rows, **options)

    options: dict[str, Any] = {"batch_size": 10, "obs": ["n"], "masking": Masking()}
    with CellLoader(originals["tokens.zarr"], small_model.vocabulary, **options) as loader:
        if where == "masking":
            monkeypatch.setattr("cellpatch_fast.loading.loader.mask", fail)
        else:
            loader._obs["n"] = loader._obs["n"][:100]
        batches = iter(loader)
        for _ in range(10):
            next(batches)
        with pytest.raises(ZeroDivisionError if where == "masking" else IndexError):
            next(batches)
        assert loading_threads() == []
        assert next(batches, None) is None


def test_a_forgotten_iterator_ends_its_threads(originals: Files) -> None:
    with CellLoader(originals["tokens.zarr"], batch_size=3, threads=3) as loader:
        batches = iter(loader)
        next(batches)
        assert loading_threads()
        del batches
        gc.collect()
        assert loading_threads() == []


def test_a_consumer_thread_that_dies_ends_the_threads(originals: Files) -> None:
    died: list[bool] = []

    def consume() -> None:
        try:
            for _ in loader:
                raise ZeroDivisionError
        except ZeroDivisionError:
            died.append(True)

    with CellLoader(originals["tokens.zarr"], batch_size=3, threads=3) as loader:
        consumer = threading.Thread(target=consume)
        consumer.start()
        consumer.join()
        assert died
        gc.collect()
        assert loading_threads() == []


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("name", ["tokens.zarr", "cells.zarr", "cells.h5ad"])
def test_two_iterations_at_a_time_do_not_disturb_each_other(
    originals: Files, small_model: CellPatch, tokens: RaggedCells, name: str
) -> None:
    """In turns, one ahead of the other, and in two threads."""
    options: dict[str, Any] = {"batch_size": 3, "threads": 2}
    iterations: list[list[Any]] = [[], [], [], []]

    def consume(into: list[Any]) -> None:
        into.extend(loader)

    with CellLoader(
        originals[name], small_model.vocabulary, small_model.config, **options
    ) as loader:
        first, second = iter(loader), iter(loader)
        iterations[0] += [next(first) for _ in range(4)]
        for batch in second:
            iterations[1].append(batch)
            iterations[0] += [batch for batch in [next(first, None)] if batch is not None]
        consumers = [threading.Thread(target=consume, args=(into,)) for into in iterations[2:]]
        for consumer in consumers:
            consumer.start()
        for consumer in consumers:
            consumer.join()
    for batches in iterations:
        assert_same(together(batches), tokens)


@pytest.mark.parametrize("small", [False, True], ids=["read_already", "not_yet_read"])
def test_a_loader_closed_while_iterating_says_so(
    originals: Files, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if small:
        monkeypatch.setattr("cellpatch_fast.loading.loader.WINDOW_BYTES", 1)
    loader = CellLoader(originals["tokens.zarr"], batch_size=3, threads=2)
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises(ValueError, match="the loader was closed: keep it open"):
        next(batches)
    assert loading_threads() == []
    with pytest.raises(ValueError, match="the loader was closed: keep it open"):
        next(iter(loader))
    loader.close()


# --- Ctrl-C ------------------------------------------------------------------------------------

INTERRUPTED = """
import faulthandler, sys, threading, time

faulthandler.dump_traceback_later(60, exit=True)
from cellpatch_fast.loading import loader
from cellpatch_fast.io.chunks.direct import DirectChunks

loader.WINDOW_BYTES = 1
read = DirectChunks.read

def consume(what):
    with loader.CellLoader(sys.argv[1], batch_size=3, threads=2) as batches:
        for number, _ in enumerate(batches):
            if number == 2:
                print(what, flush=True)
                time.sleep(50)

def blocked(chunks, numbers, out):
    print("blocked", flush=True)
    time.sleep(0.5)
    read(chunks, numbers, out)

def interrupted():
    raised = False
    try:
        consume("slow")
    except KeyboardInterrupt:
        raised = True
    threads = [thread.name for thread in threading.enumerate()]
    loading = [name for name in threads if name.startswith("cellpatch")]
    print("ended", raised, *loading, flush=True)

interrupted()
DirectChunks.read = blocked
interrupted()
DirectChunks.read = read
for _ in loader.CellLoader(sys.argv[1], batch_size=3, threads=2):
    print("uncaught", flush=True)
    time.sleep(50)
"""


def test_ctrl_c_ends_the_process(originals: Files) -> None:
    """While the consumer is slow, while it waits for a worker that is blocked, and uncaught."""
    command = [sys.executable, "-c", INTERRUPTED, str(originals["tokens.zarr"])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for moment in ("slow", "blocked"):
            assert process.stdout.readline() == f"{moment}\n"
            process.send_signal(signal.SIGINT)
            while (line := process.stdout.readline()) == "blocked\n":
                pass
            assert line == "ended True\n"
        assert process.stdout.readline() == "uncaught\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
