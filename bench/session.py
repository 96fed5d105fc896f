"""One run of `pytest bench`: it collects records, and at the end writes results and report.

Times are taken by the groups' own code (events on a GPU, processes of their own for models) and
then told to pytest-benchmark, so that its table and ``--benchmark-json`` hold the same numbers: its
timer is a `Clock` that only a record moves on.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.ceilings import measure_ceilings
from bench.machine import describe_device, installed
from bench.options import Options
from bench.peers.registry import Peer
from bench.reporting.compare import compare, slower_than
from bench.reporting.results import Record, Run
from bench.reporting.tables import runtime_tables
from bench.reporting.write import write_report
from cellpatch_fast.errors import InputError


class Clock:
    """A timer for pytest-benchmark: it shows the seconds that have been added to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Session:
    """What the groups share.

    Parameters
    ----------
    options
        Of the run.

    Attributes
    ----------
    models
        What the results say of each model, by name; `described` says all but its parameters. Those
        chosen that a record names in its details are added in the end.
    records
        What was added so far.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.models: dict[str, dict[str, Any]] = {}
        self.records: list[Record] = []
        self.clock = Clock()
        self.began = datetime.now(UTC)
        self.summary: list[str] = []

    @functools.cached_property
    def ceilings(self) -> dict[str, Any]:
        """What the device can do at most, measured once in a run."""
        found = measure_ceilings(self.options.device, self.options.dtype, toy=False)
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()  # models' processes share the GPU
        return found

    def add(self, record: Record) -> None:
        """Keep a record for the results file."""
        self.records.append(record)

    def skip(self, group: str, name: str, reason: str, **details: Any) -> None:
        """Record that something was not tried, and skip the test."""
        self.add(Record(group, name, "skipped", reason, details=details))
        pytest.skip(reason)

    def record(
        self, benchmark: BenchmarkFixture, record: Record, durations: Sequence[float] = ()
    ) -> None:
        """Keep a record, tell its times to pytest-benchmark, and end the test accordingly.

        Parameters
        ----------
        benchmark
            The test's fixture.
        record
            What came of the attempt. The test fails if that is "failed", or "inaccurate" for ours
            (its details say so), and is skipped if it is not measured for another reason.
        durations
            Seconds of each repeat of what is measured.
        """
        self.add(record)
        if record.measured:
            remaining = iter(durations)

            def advance() -> None:
                self.clock.now += next(remaining)

            benchmark.pedantic(advance, rounds=len(durations), iterations=1)
            benchmark.extra_info |= record.details
            return
        benchmark.skipped = True  # or it would warn that it was not used
        ours = record.details.get("ours", False)
        wrong = record.status == "failed" or (ours and record.status == "inaccurate")
        end = pytest.fail if wrong else pytest.skip
        end(f"{record.status}: {record.reason}")

    def finish(self, interrupted: bool) -> int:
        """Write what there is, and compare; the exit status: 0, or 1 if something is too slow."""
        if not any(record.measured for record in self.records):
            self.summary = ["nothing was measured: no results were written"]
            return 0
        run = self._run(interrupted)
        path = run.path_in(self.options.results)
        self.summary = [table.markdown() for table in runtime_tables(run)]
        statuses = Counter(record.status for record in self.records)
        lines = [", ".join(f"{count} {status}" for status, count in statuses.items())]
        lines += [f"failed: {r.name}: {r.reason}" for r in self.records if r.status == "failed"]
        try:
            run.save(path)
            lines.append(f"results: {path}")
            written = [file for file in write_report(path) if file.suffix in (".md", ".html")]
            lines += [f"report: {file}" for file in written]
        except InputError as error:
            lines.append(f"error: {error}")
            return 1
        finally:
            self.summary.append("\n".join(lines))
        return self._compare(run)

    def _run(self, interrupted: bool) -> Run:
        named = {record.details.get("model") for record in self.records}
        others = [peer for peer in self.options.peers if peer.name in named - self.models.keys()]
        return Run(
            date=self.began.isoformat(timespec="seconds"),
            device=describe_device(self.options.device),
            versions=installed(),
            settings=self.options.settings | {"interrupted": interrupted},
            ceilings={} if interrupted and "ceilings" not in self.__dict__ else self.ceilings,
            models=self.models | {peer.name: described(peer) for peer in others},
            records=self.records,
        )

    def _compare(self, run: Run) -> int:
        old, threshold = self.options.compare, self.options.threshold
        if old is None:
            return 0
        comparison = compare(old, run)
        self.summary.append(comparison.markdown())
        slower = [] if threshold is None else slower_than(comparison, threshold)
        if slower:
            names = ", ".join(row.name for row in slower)
            self.summary.append(f"more than {threshold:g} × as slow as the older run: {names}")
        return 1 if slower else 0


def described(peer: Peer) -> dict[str, Any]:
    """What the results say of a model; its parameters are counted once it is there."""
    told = ("ours", "cap", "published", "architecture", "setting", "assumed", "source")
    return {"key": peer.key, "parameters": None} | {key: getattr(peer, key) for key in told}
