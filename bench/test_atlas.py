"""Group "atlas": from a generated atlas to an embedding store, by number of cells."""

from __future__ import annotations

from bench.atlas_runs import QUICK_SIZES, SIZES, measure_atlases
from bench.session import Session


def test_atlas(session: Session) -> None:
    options = session.options
    for record in measure_atlases(
        options.folder,
        options.device,
        QUICK_SIZES if options.quick else SIZES,
        repeats=1 if options.quick else 3,
        time_limit=options.time_limit,
    ):
        session.add(record)
