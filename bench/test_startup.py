"""Group "startup": importing, `cellpatch --help` and the first embedding, in new processes."""

from __future__ import annotations

from bench.session import Session
from bench.startup import measure_startup


def test_startup(session: Session) -> None:
    options = session.options
    for record in measure_startup(
        options.folder,
        options.device,
        repeats=3 if options.quick else 9,
        time_limit=3 * options.time_limit,  # a first embedding imports much and loads the kernels
    ):
        session.add(record)
