"""Group "loader": our loader and others', on the same atlas."""

from __future__ import annotations

from bench.loader_runs import measure_loaders
from bench.session import Session


def test_loaders(session: Session) -> None:
    failed = []
    for record in measure_loaders(session.options):
        session.add(record)
        if record.status == "failed":
            failed.append(f"{record.name}: {record.reason}")
    assert not failed
