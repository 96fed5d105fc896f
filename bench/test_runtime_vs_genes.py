"""Group "runtime": annotating a batch of cells, by number of genes per cell, with every model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.peers.registry import Peer
from bench.runtime import Runtime
from bench.session import Session


@pytest.fixture(scope="module")
def runtime(session: Session) -> Iterator[Runtime]:
    runtime = Runtime(session.options, session.models)
    yield runtime
    runtime.close()


def test_annotation(
    session: Session, runtime: Runtime, benchmark: BenchmarkFixture, peer: Peer, genes: int
) -> None:
    record, seconds = runtime.measure(peer, genes)
    session.record(benchmark, record, seconds)
