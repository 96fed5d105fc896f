"""annbatch's sequential speed, in its own environment, which needs Python 3.12 and newer zarr::

    python3.12 -m venv annbatch && annbatch/bin/pip install "annbatch[zarrs]"
    annbatch/bin/python bench/peers/annbatch_loader.py atlas.zarr --setting 64x128 512x32

A setting is annbatch's ``chunk_size`` x ``preload_nchunks``: rows in one request, and requests
read at once. Batches have 4,096 cells (except where a setting has fewer in all) and are SciPy's CSR
matrices in memory. The first setting runs once unmeasured. Prints JSON with medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SETTINGS = ("64x128", "512x16", "512x32", "2048x8")


def measure(store: Path, setting: str, batch_size: int, max_cells: int | None) -> dict[str, Any]:
    """Read cells in their order, once."""
    import anndata
    import zarr
    from annbatch import Loader  # type: ignore[import-not-found]
    from annbatch.samplers import SequentialSampler  # type: ignore[import-not-found]

    chunk_size, preload = map(int, setting.split("x"))
    matrix = anndata.io.sparse_dataset(zarr.open_group(store, mode="r")["X"])
    sampler = SequentialSampler(
        chunk_size,
        preload,
        batch_size,
        mask=slice(0, min(max_cells or matrix.shape[0], matrix.shape[0])),
    )
    loader = Loader(batch_sampler=sampler, preload_to_gpu=False).add_dataset(matrix)
    cells = entries = 0
    started, processor = time.perf_counter(), time.process_time()
    for batch in loader:
        cells += batch["X"].shape[0]
        entries += batch["X"].nnz
    seconds = time.perf_counter() - started
    return {
        "setting": setting,
        "cells": cells,
        "non-zeros": entries,
        "seconds": seconds,
        "processor seconds": time.process_time() - processor,
        "cells/s": cells / seconds,
        "non-zeros/s": entries / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="annbatch's sequential speed")
    parser.add_argument("store", type=Path, help="an AnnData Zarr store with a CSR matrix X")
    parser.add_argument(
        "--setting", nargs="+", default=SETTINGS, help="chunk_size x preload_nchunks"
    )
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--max-cells", type=int, help="read no more than the first of them")
    parser.add_argument("--repeats", type=int, default=3, help="of every setting, in turn")
    parser.add_argument("--pipeline", choices=("zarrs", "zarr"), default="zarrs")
    parser.add_argument("--threads", type=int, help="of the zarrs pipeline; all cores without it")
    options = parser.parse_args()

    import zarr

    if options.pipeline == "zarrs":
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    if options.threads:
        zarr.config.set({"threading.max_workers": options.threads})
    measure(options.store, options.setting[0], options.batch_size, options.max_cells)
    runs: dict[str, list[dict[str, Any]]] = {setting: [] for setting in options.setting}
    for _ in range(options.repeats):
        for setting, done in runs.items():
            done.append(measure(options.store, setting, options.batch_size, options.max_cells))
    medians = [
        {
            name: value if isinstance(value, str) else statistics.median(run[name] for run in done)
            for name, value in done[0].items()
        }
        for done in runs.values()
    ]
    result = {
        "versions": {name: version(name) for name in ("annbatch", "anndata", "zarr", "zarrs")},
        "pipeline": options.pipeline,
        "batch size": options.batch_size,
        "repeats": options.repeats,
        "settings": medians,
        "best": max(medians, key=lambda run: run["non-zeros/s"]),
        "peak memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
