"""Annotation by every model at every number of genes: what may run out of memory or time does.

Each model has a process of its own (`bench.worker`). One that is killed, by the system for its
memory or by us for its time, costs its point and the larger ones, and nothing else. On Linux
processes for a CPU are forked from one that has imported what models need; CUDA wants new ones.

A model that computes the same sequence at two numbers of genes, because it ignores some of them or
always takes all, is measured at the first only, and the second says so.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bench import worker
from bench.batches import DISTINCT, Drawing
from bench.options import Options
from bench.peers.registry import ENVIRONMENT, Peer
from bench.processes import timing_of
from bench.reporting.results import Record
from bench.session import described
from bench.worker import Broken, Made, Message, Order, Point, Tried

PREPARING_LIMIT = 120.0  # seconds to make a model, or to read cells
ENTRIES, QUICK_ENTRIES = 16_000_000, 2_000_000  # of the cells that are drawn for a point, at most
FORKED = sys.platform == "linux"  # processes for a CPU
SECONDS = {True: 0.5, False: 1.0}  # of measured calls at the best batch, by whether it is quick


class Ended(Exception):
    """A process that gives no more answers: the status of its point, and why."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Process:
    """A model in a process of its own."""

    def __init__(self, order: Order) -> None:
        context: ForkServerContext | SpawnContext = multiprocessing.get_context("spawn")
        if FORKED and order.device.type == "cpu":
            context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker.serve, args=(theirs, order), daemon=True)
        self.process.start()
        theirs.close()
        try:
            prepared = self.receive(PREPARING_LIMIT)
        except Ended:
            self.close()
            raise
        assert isinstance(prepared, Made)
        self.made = prepared

    def measure(self, point: Point) -> tuple[list[Tried], Ended | None]:
        """What was measured, in order, and why there is not more."""
        tried: list[Tried] = []
        try:
            self.pipe.send(point)
            self.receive(PREPARING_LIMIT)
            began = time.monotonic()
            while isinstance(message := self.receive(point.limit, began), Tried):
                tried.append(message)
        except Ended as end:
            self.close()
            return tried, end
        return tried, None

    def receive(self, limit: float, began: float | None = None) -> Message:
        """The next message, within so many seconds; an `Ended` where there is none."""
        spent = 0.0 if began is None else time.monotonic() - began
        try:
            if not self.pipe.poll(max(0.0, limit - spent)):
                doing = "to make it: " if began is None else ""
                raise Ended("out of time", f"{doing}limit {limit:g} s")
            message: Message = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            code = self.process.exitcode
            if code == -9:
                raise Ended("out of memory", "the system killed its process") from error
            raise Ended("failed", f"its process ended with {code}") from error
        if isinstance(message, Broken):
            raise Ended(message.status, message.reason)
        return message

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Runtime:
    """Measures models, one after the other, each with rising numbers of genes.

    Parameters
    ----------
    options
        Of the run.
    models
        Where what is found of a model is put, by its name.
    """

    def __init__(self, options: Options, models: dict[str, dict[str, Any]]) -> None:
        self.options, self.models = options, models
        self.files: dict[int, Path] = {}  # of cells, by their genes
        self.peer: Peer | None = None
        # Of this peer: its process, what was found, and what ended it for larger numbers of genes.
        self.process: Process | None = None
        self.made: Made | None = None
        self.found: list[tuple[Record, Sequence[float]]] = []
        self.ended: Ended | None = None

        if options.device.type == "cuda":
            torch.cuda.empty_cache()  # of what was measured before, in this process
        elif FORKED:
            start_forkserver(options)

    def measure(self, peer: Peer, genes: int) -> tuple[Record, Sequence[float]]:
        """The record of a point, in seconds per 1,000 cells, and the same of every call."""
        if peer is not self.peer:
            self.close()
            self.peer, self.found, self.ended = peer, [], None
            self.models[peer.name] = described(peer)
        name = f"runtime/{peer.name}/{genes}"
        tokens = peer.tokens(genes)
        ignored = 0 if peer.cap is None else max(0, genes - peer.cap)
        details: dict[str, Any] = {"model": peer.name, "genes": genes, "ignored": ignored}
        for record, durations in self.found:
            if record.details["tokens"] == tokens:
                details["measured_at"] = record.details["genes"]
                return replace(record, name=name, details=record.details | details), durations
        details |= {"tokens": tokens, "dtype": self.options.settings["dtype"]}
        tried, end = self._try(peer, genes)
        if tried:
            outcome = self._measured(name, details, tried)
        else:
            assert end is not None
            outcome = Record("runtime", name, end.status, end.reason, details=details), ()
        self.found.append(outcome)
        return outcome

    def close(self) -> None:
        """End this model's process."""
        if self.process is not None:
            self.process.close()
            self.process = None

    def _try(self, peer: Peer, genes: int) -> tuple[list[Tried], Ended | None]:
        """What was measured, and if that is nothing, why."""
        if self.ended is not None:
            return [], self.ended
        options = self.options
        tried: list[Tried] = []
        try:
            if self.process is None:
                seconds = SECONDS[options.quick]
                order = Order(options.registry, peer.key, options.device, options.dtype, seconds)
                self.process = Process(order)
                self.models[peer.name]["parameters"] = self.process.made.parameters
                self.made = self.process.made
            point = Point(self._file(genes), options.cells, options.time_limit)
            tried, end = self.process.measure(point)
        except Ended as failure:
            end = failure
        if end is not None:
            self.process = None  # it is gone
            if end.status == "failed":
                tried = []  # a mistake, whatever came before it
            if not tried:
                self.ended = Ended(end.status, f"{end.reason} (already at {genes:,} genes)")
        return tried, end

    def _measured(
        self, name: str, details: dict[str, Any], tried: Sequence[Tried]
    ) -> tuple[Record, Sequence[float]]:
        batches = [one.batch for one in tried]
        # a batch that was measured twice is the best one: the second time was for longer
        again = batches[-1] in batches[:-1]
        best = tried[-1] if again else min(tried, key=lambda one: one.per_cell)
        seconds = [1_000 * duration / best.batch for duration in best.durations]
        peak = best.peak_bytes
        assert self.made is not None
        details |= {
            "batch": best.batch,
            "setup_seconds": self.made.seconds,
            "first_call_seconds": tried[0].first_call,
            "peak_bytes": peak,
            "peak_bytes_per_cell": None if peak is None else peak / best.batch,
            "model_bytes": self.made.model_bytes,
            "batches": batches,
        }
        timing = timing_of(seconds)
        record = Record("runtime", name, "measured", "", timing, "1,000 cells", details)
        return record, seconds

    def _file(self, genes: int) -> Path:
        """Cells of exactly so many genes, the same for every model."""
        if genes not in self.files:
            entries = QUICK_ENTRIES if self.options.quick else ENTRIES
            number = min(self.options.cells, DISTINCT, max(8, entries // genes))
            cells = self.drawing.cells(np.full(number, genes))
            tensors = {"offsets": cells.offsets, "genes": cells.genes, "values": cells.values}
            path = self.options.folder / f"cells-of-{genes}-genes.safetensors"
            save_file(tensors, path)
            self.files[genes] = path
        return self.files[genes]

    @functools.cached_property
    def drawing(self) -> Drawing:
        return Drawing(torch.device("cpu"), ENTRIES)


def start_forkserver(options: Options) -> None:
    """The process that models' processes are forked from, with what they import and are set to."""
    modules = ["bench.worker", options.registry]
    if any(peer.package for peer in options.peers):
        modules.append("bench.preloaded")
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    kept = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:  # other benchmarks' processes are as users start them
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
