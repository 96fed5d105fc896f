"""What is measured in a process of its own: nothing is imported yet, and its memory is its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.reporting.results import Timing

ROOT = Path(__file__).parents[1]
COMPILING = 120.0  # seconds beside a limit: the first process on a machine compiles kernels


class Failed(NamedTuple):
    """Why a process has no result: the status of a record, and its reason in one line."""

    status: str
    reason: str


class Finished(NamedTuple):
    """What a process took and printed."""

    seconds: float  # from its start to its end
    output: str

    @property
    def facts(self) -> dict[str, Any]:
        """The JSON in its last line."""
        facts: dict[str, Any] = json.loads(self.output.splitlines()[-1])
        return facts


def run_python(
    *arguments: str | Path, limit: float | None = None, environment: Mapping[str, str] | None = None
) -> Finished | Failed:
    """Run Python from the repository's root.

    Parameters
    ----------
    arguments
        Of the interpreter: ``"-c"`` and code, or ``"-m"``, a module and its arguments.
    limit
        Seconds after which it is ended.
    environment
        Variables that it has besides those of this process.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Failed("out of time", f"more than {limit:g} s")
    seconds = time.perf_counter() - started
    if done.returncode == 0:
        return Finished(seconds, done.stdout)
    reason = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    short = "MemoryError" in reason or "out of memory" in reason.lower() or done.returncode == -9
    return Failed("out of memory" if short else "failed", reason[:240])


def timing_of(seconds: Sequence[float]) -> Timing:
    """The median and the 20th and 80th percentiles: of the values found, the nearest inside."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    low, high = ordered[int(0.2 * last)], ordered[round(0.8 * last)]
    return Timing(low, statistics.median(ordered), high, len(ordered))


def peak_memory() -> int:
    """Bytes that this process has held at most.

    ``getrusage`` would count what the process before it had.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
