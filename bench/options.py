"""The options of `pytest bench`, and what is refused before anything is measured."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bench.cells import GENES
from bench.command import TYPES
from bench.reporting.results import Run, require_writable
from cellpatch_fast.errors import InputError

if TYPE_CHECKING:
    from bench.peers.registry import Peer

RESULTS = Path(__file__).parent / "results"
DEFAULT_GENES = "500,1000,2000,4000,8000,16000"
# Cells of a batch at most, and seconds for a point.
QUICK_CELLS, FULL_CELLS, GPU_CELLS = 512, 4_096, 16_384
QUICK_LIMIT, FULL_LIMIT = 5.0, 120.0


@dataclass(frozen=True)
class Options:
    """What a run measures, and how; `settings` is what its results file says of it.

    Parameters
    ----------
    device, dtype
        Where, and in which precision.
    genes
        Numbers of genes per cell, rising.
    cells
        Of a measured batch, at most.
    peers
        The models.
    registry
        The module that they are registered in.
    time_limit
        Seconds for a point.
    quick
        Whether all of it is to be done within minutes.
    results
        Folder for results files.
    folder
        For files that are generated.
    compare, threshold
        An older run, and how many times as slow a benchmark may be.
    """

    device: torch.device
    dtype: torch.dtype
    genes: tuple[int, ...]
    cells: int
    peers: tuple[Peer, ...]
    registry: str
    time_limit: float
    quick: bool
    results: Path
    folder: Path
    compare: Run | None = None
    threshold: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "genes": list(self.genes),
            "cells": self.cells,
            "models": [peer.key for peer in self.peers],
            "time limit, s": self.time_limit,
            "quick": self.quick,
            "threads": torch.get_num_threads(),
        }


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "benchmarks of cellpatch-fast (pytest bench)")
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        help="where to measure (default: cuda if there is a GPU)",
    )
    group.addoption(
        "--dtype",
        choices=tuple(TYPES),
        help="precision of weights and inputs (default: float32 on a CPU, bfloat16 on a GPU)",
    )
    group.addoption(
        "--genes",
        type=_genes,
        default=DEFAULT_GENES,
        metavar="N,…",
        help="numbers of genes per cell, each a point of every model (default: %(default)s)",
    )
    group.addoption(
        "--cells",
        type=_count,
        metavar="N",
        help="cells in a measured batch at most; the best number up to it is looked for (default: "
        f"{QUICK_CELLS} in a quick run, else {FULL_CELLS} on a CPU and {GPU_CELLS} on a GPU)",
    )
    group.addoption(
        "--models",
        default="all",
        metavar="KEY,…",
        help="models to compare, by key (default: all); an unknown key lists them",
    )
    group.addoption(
        "--registry",
        default="bench.peers.registry",
        metavar="MODULE",
        help="Python module whose PEERS are the models: for a model of your own",
    )
    group.addoption(
        "--time-limit",
        type=_positive,
        metavar="SECONDS",
        help="for a point; one that takes longer is recorded as out of time (default: "
        f"{QUICK_LIMIT:g} in a quick run, else {FULL_LIMIT:g})",
    )
    group.addoption(
        "--quick", action="store_true", help="less of everything: minutes (default on a CPU)"
    )
    group.addoption("--full", action="store_true", help="all of it (default on a GPU)")
    group.addoption(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="where <device>/<date>.json and its report are written (default: bench/results)",
    )
    group.addoption(
        "--scratch",
        type=Path,
        metavar="FOLDER",
        help="where files are generated, and kept (default: a temporary folder)",
    )
    group.addoption(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="print the ratio to this older run for every benchmark",
    )
    group.addoption(
        "--threshold",
        type=_positive,
        metavar="X",
        help="with --compare: fail if any takes more than X times as long, or has no time any more",
    )


def read_options(config: pytest.Config, folder: Path) -> Options:
    """Options that can be worked with; ``folder`` is for generated files, unless one was named.

    Raises
    ------
    pytest.UsageError
        That says what was found, and what to do.
    """
    given = config.option
    if getattr(given, "numprocesses", None):
        raise pytest.UsageError(
            "benchmarks that run side by side disturb each other: leave -n (pytest-xdist) out"
        )
    if given.quick and given.full:
        raise pytest.UsageError("--quick and --full exclude each other: give one")
    if given.threshold is not None and given.compare is None:
        raise pytest.UsageError(
            "--threshold says what is too slow in a comparison: add --compare OLD.json"
        )
    device = _device(given.device)
    quick = given.quick or (device.type == "cpu" and not given.full)
    cells = QUICK_CELLS if quick else FULL_CELLS if device.type == "cpu" else GPU_CELLS
    dtype = given.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    try:
        for place in filter(None, (given.results, given.scratch)):
            require_writable(place)
        older = None if given.compare is None else Run.load(given.compare)
    except InputError as error:
        raise pytest.UsageError(str(error)) from error
    return Options(
        device=device,
        dtype=TYPES[dtype],
        genes=given.genes,
        cells=given.cells or cells,
        peers=_peers(given.registry, given.models),
        registry=given.registry,
        time_limit=given.time_limit or (QUICK_LIMIT if quick else FULL_LIMIT),
        quick=quick,
        results=given.results,
        folder=(given.scratch or folder).absolute(),
        compare=older,
        threshold=given.threshold,
    )


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "--device cuda, and PyTorch finds no CUDA GPU here: use --device cpu, or install a "
            "PyTorch and a driver for your GPU"
        )
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _peers(registry: str, chosen: str) -> tuple[Peer, ...]:
    try:
        peers: Sequence[Peer] = importlib.import_module(registry).PEERS
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(
            f"--registry {registry}: {error}. Name a module that can be imported and has PEERS, as "
            "bench/peers/registry.py has."
        ) from error
    keys = [key.strip() for key in chosen.split(",")]
    if keys == ["all"]:
        return tuple(peers)
    available = [peer.key for peer in peers]
    if unknown := [key for key in keys if key not in available]:
        raise pytest.UsageError(
            f"--models: there is no model {', '.join(map(repr, unknown))}; valid are all, "
            f"{', '.join(available)}"
        )
    return tuple(peer for peer in peers if peer.key in keys)


def _genes(text: str) -> tuple[int, ...]:
    numbers = sorted({_count(part) for part in text.split(",")})
    if numbers[-1] > GENES:
        raise argparse.ArgumentTypeError(
            f"a cell has at most {GENES:,} different genes, found {numbers[-1]}"
        )
    return tuple(numbers)


def _count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, found {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, found {text!r}")
    return number
