"""Group "atlas": from a generated atlas to an embedding store, by number of cells."""

from __future__ import annotations

from typing import Any

from bench.atlas_runs import QUICK_SIZES, SIZES, measure_atlases


def test_atlas(session: Any) -> None:
    options = session.options
    sizes = QUICK_SIZES if options.quick else SIZES
    for record in measure_atlases(
        options.folder, options.device, sizes, time_limit=options.time_limit
    ):
        session.add(record)
