"""Group "kernels": the operators against what else computes the same, in speed and error."""

from __future__ import annotations

from bench.kernel_runs import measure_kernels
from bench.session import Session


def test_kernels(session: Session) -> None:
    """Ours run and are right; a baseline that fails is a record."""
    failed = []
    for record in measure_kernels(session.options, session.ceilings):
        session.add(record)
        if record.details["ours"] and record.status in ("failed", "inaccurate"):
            failed.append(f"{record.name}: {record.reason}")
    assert not failed
