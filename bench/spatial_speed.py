"""Seconds and memory of spatial domains: ``python bench/spatial_speed.py [--output FILE.json]``.

In one run, on one thread, seconds of the processor:

- an epoch of STAGATE at 3,600 x 3,000 against plain PyTorch (dense loss, ``index_add``) and, if it
  is installed, stagate-modern, taking turns, so that a noisy machine disturbs all alike;
- an epoch at 36,000 x 3,000, and memory, each in a process of its own;
- an epoch in tiles, from a file, of 10,000 to 1,000,000 generated spots of 300 genes;
- domains of 4,000 spots, from the embedding to labels.

Prints Markdown; with ``--output`` writes JSON, and the Markdown beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import anndata
import numpy as np
import torch
from scipy import sparse

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import spatial_plain
from bench.machine import processor
from bench.processes import Failed, peak_memory, run_python
from bench.report import table
from bench.spatial_peers import UPSTREAM, installed
from cellpatch_fast.config import Reading
from cellpatch_fast.files import write_whole
from cellpatch_fast.spatial.domains import STARTS, find_domains
from cellpatch_fast.spatial.embedding import embed_tissue
from cellpatch_fast.spatial.fitting import Fit
from cellpatch_fast.spatial.graphs import SpatialGraph, spatial_graph
from cellpatch_fast.spatial.pieces import TILE_SPOTS
from cellpatch_fast.spatial.settings import SpatialSettings
from cellpatch_fast.synthetic.tissue import synthetic_tissue

OURS, PLAIN, ALIASED = "ours", "plain PyTorch", "ours, aliased"
METHODS = {OURS: spatial_plain.ours, PLAIN: spatial_plain.plain, ALIASED: spatial_plain.aliased}
DENSITY, TILED_GENES, LAYERS, CLUSTERED_EPOCHS = 0.12, 300, 7, 20
AIMS = {PLAIN: 4.0, UPSTREAM: 3.0}  # times as fast at 3,600 spots
LARGE_AIM, MEMORY_AIM, LINEAR_AIM, DOMAINS_AIM = 2.0, 0.25, 1.2, 60.0


class Sizes(NamedTuple):
    spots: int = 3_600
    large: int = 36_000
    genes: int = 3_000
    rounds: int = 5
    tiled: tuple[int, ...] = (10_000, 100_000, 300_000, 1_000_000)
    clustered: int = 4_000


TOY = Sizes(60, 90, 50, 2, (200, 400), 100)


def places_of(spots: int) -> np.ndarray:
    """A hexagonal grid, about as wide as high."""
    across = max(2, int(np.sqrt(spots)))
    rows, columns = np.divmod(np.arange(spots), across)
    return np.stack([columns + rows % 2 / 2, rows * np.sqrt(3) / 2], axis=1)


def drawn(spots: int, genes: int, seed: int = 0) -> sparse.csr_matrix:
    """Counts of which a share of `DENSITY` are not zero."""
    generator = np.random.default_rng(seed)
    counts = generator.binomial(genes, DENSITY, spots)
    indptr = np.append(0, counts.cumsum())
    keys = generator.integers(0, genes, indptr[-1]).astype(np.int32)
    matrix = sparse.csr_matrix((np.ones(len(keys), np.float32), keys, indptr), (spots, genes))
    matrix.sum_duplicates()
    return matrix


def tissue(spots: int, genes: int) -> tuple[sparse.csr_matrix, SpatialGraph, np.ndarray]:
    """Expression, graph and places."""
    places = places_of(spots)
    return drawn(spots, genes).log1p(), spatial_graph(places), places


def methods() -> dict[str, Any]:
    return METHODS | ({UPSTREAM: spatial_plain.upstream} if UPSTREAM in installed() else {})


def small(sizes: Sizes) -> dict[str, list[float]]:
    """Seconds of each round by method, in turns."""
    inputs = tissue(sizes.spots, sizes.genes)
    steps = {name: make(*inputs) for name, make in methods().items()}
    for step in steps.values():
        step()  # the first compiles and allocates
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(sizes.rounds):
        for name, step in steps.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    return seconds


def alone(name: str, spots: int, genes: int) -> dict[str, float]:
    """The second epoch of one method, and the most memory that this process has held."""
    inputs = tissue(spots, genes)
    began_with = peak_memory()
    step = methods()[name](*inputs)
    step()
    began = time.process_time()
    step()
    return {
        "seconds": time.process_time() - began,
        "peak bytes": peak_memory(),
        "bytes before": began_with,
    }


def tiled(path: str, spots: int) -> dict[str, float]:
    """One epoch in tiles, of a file; memory of the process, and before anything was read."""
    seconds = []
    step = Fit.step

    def timed(fit: Fit, pieces: Any) -> float:
        began = time.process_time()
        loss = step(fit, pieces)
        seconds.append(time.process_time() - began)
        return loss

    began, begun_with = time.process_time(), peak_memory()
    places = places_of(spots)
    graph = spatial_graph(places)
    of_graph, with_graph = time.process_time() - began, peak_memory()
    with mock.patch.object(Fit, "step", timed):
        embed_tissue(
            path, places, graph, settings=SpatialSettings.preset("default", epochs=1),
            reading=Reading(input="counts"), tile_spots=min(TILE_SPOTS, max(16, spots // 2)),
            progress=False,
        )  # fmt: skip
    return {
        "seconds": seconds[-1],
        "graph, s": of_graph,
        "all, s": time.process_time() - began,
        "peak bytes": peak_memory(),
        "bytes with graph": with_graph,
        "bytes before": begun_with,
    }


def child(*arguments: str | int) -> dict[str, Any]:
    """A function of this file in a process of its own, on one thread."""
    done = run_python(
        "-m", "bench.spatial_speed", "--child", *map(str, arguments),
        environment={"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
    )  # fmt: skip
    return {"failed": done.reason} if isinstance(done, Failed) else done.facts


def growing(counts: Sequence[int]) -> dict[int, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        measured = {}
        for spots in counts:
            path = Path(folder) / f"{spots}.h5ad"
            anndata.AnnData(drawn(spots, TILED_GENES)).write_h5ad(path)
            measured[spots] = child("tiled", str(path), spots)
            path.unlink()
        return measured


def domains(spots: int) -> dict[str, float]:
    """Twenty mixtures of what STAGATE makes of a generated tissue in some epochs."""
    cells = synthetic_tissue(spots, layers=LAYERS, genes=TILED_GENES)
    places = cells.obsm["spatial"]
    rows = embed_tissue(
        cells, places, spatial_graph(places), reading=Reading(input="counts"), progress=False,
        settings=SpatialSettings.preset("default", epochs=CLUSTERED_EPOCHS),
    ).rows  # fmt: skip
    began = time.process_time()
    domains = find_domains(rows, LAYERS, progress=False)
    seconds = time.process_time() - began
    return {"seconds": seconds, "starts": STARTS, "domains": domains.count, "spots": len(rows)}


def targets(results: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Name, aim, what was found, and whether it is enough."""
    entries = []
    if "small" in results:
        medians = {name: statistics.median(s) for name, s in results["small"].items()}
        for name, aim in AIMS.items():
            if name in medians:
                times = medians[name] / medians[OURS]
                text = f"an epoch at {results['sizes'][0]:,} spots against {name}"
                entries.append((text, f"{aim:g} ×", f"{times:.2f} ×", times >= aim))
    for name, row in results.get("large", {}).items():
        ours = results["large"][OURS]
        if name not in AIMS or "failed" in row or "failed" in ours:
            continue
        times, share = row["seconds"] / ours["seconds"], ours["peak bytes"] / row["peak bytes"]
        text = f"at {results['sizes'][1]:,} spots against {name}"
        entries += [
            (f"an epoch {text}", f"{LARGE_AIM:g} ×", f"{times:.2f} ×", times >= LARGE_AIM),
            (f"peak memory {text}", f"{MEMORY_AIM:.0%}", f"{share:.0%}", share <= MEMORY_AIM),
        ]
    rows = {int(n): r for n, r in results.get("tiled", {}).items() if "failed" not in r}
    if len(rows) > 1:
        first, last = min(rows), max(rows)
        each, each_first = (rows[n]["seconds"] / n for n in (last, first))
        text = f"seconds per spot, {last:,} against {first:,} spots"
        found = each / each_first
        entries.append((text, f"{LINEAR_AIM:g} ×", f"{found:.2f} ×", found <= LINEAR_AIM))
    if "domains" in results:
        seconds = results["domains"]["seconds"]
        text = f"domains of {results['domains']['spots']:,} spots"
        entries.append((text, f"{DOMAINS_AIM:g} s", f"{seconds:.1f} s", seconds < DOMAINS_AIM))
    return entries


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"{results['processor']}, one thread, seconds of the processor, torch {results['torch']}, "
        f"{results['date']}"
    ]
    if results["toy"]:
        lines += ["", "**Toy sizes: this shows that everything runs and says nothing of speed.**"]
    aims = [[n, a, f, "met" if met else "**missed**"] for n, a, f, met in targets(results)]
    lines += table(["target", "aim", "found", ""], aims)
    if "small" in results:
        ours = statistics.median(results["small"][OURS])
        rows = [
            [name, f"{statistics.median(s):.3f}", f"{min(s):.3f} to {max(s):.3f}",
             f"{statistics.median(s) / ours:.2f}"]
            for name, s in results["small"].items()
        ]  # fmt: skip
        lines += table([f"{results['sizes'][0]:,} spots", "s per epoch", "range", "× ours"], rows)
    if "large" in results:
        rows = [_large_row(name, row) for name, row in results["large"].items()]
        lines += table([f"{results['sizes'][1]:,} spots", "s per epoch", "peak memory, GB"], rows)
    if "tiled" in results:
        rows = [_tiled_row(int(spots), row) for spots, row in results["tiled"].items()]
        header = ["spots in tiles", "s per epoch", "µs per spot", "graph, s", "all, s"]
        lines += table([*header, "peak memory, GB", "of which before", "with the graph"], rows)
    return "\n".join(lines)


def _large_row(name: str, row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [name, row["failed"], ""]
    return [name, f"{row['seconds']:.2f}", f"{row['peak bytes'] / 1e9:.2f}"]


def _tiled_row(spots: int, row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [f"{spots:,}", row["failed"], *[""] * 6]
    gigabytes = [row[name] / 1e9 for name in ("peak bytes", "bytes before", "bytes with graph")]
    each = f"{1e6 * row['seconds'] / spots:.1f}"
    times = [f"{row[name]:.1f}" for name in ("graph, s", "all, s")]
    return [f"{spots:,}", f"{row['seconds']:.2f}", each, *times, *(f"{g:.2f}" for g in gigabytes)]


PARTS = ("small", "large", "tiled", "domains")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        torch.set_num_threads(1)
        _, _, kind, name, *numbers = sys.argv
        of_child = alone if kind == "alone" else tiled
        print(json.dumps(of_child(name, *map(int, numbers))))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--largest", type=int, default=1_000_000, help="most spots in tiles")
    parser.add_argument("--output", type=Path, help="JSON file; .md beside it")
    options = parser.parse_args()
    sizes = TOY if options.toy else Sizes()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "toy": options.toy,
        "processor": processor(),
        "torch": torch.__version__,
        "sizes": list(sizes),
    }
    if "small" in options.parts:
        results["small"] = small(sizes)
    if "large" in options.parts:
        results["large"] = {
            name: child("alone", name, sizes.large, sizes.genes) for name in methods()
        }
    if "tiled" in options.parts:
        results["tiled"] = growing([spots for spots in sizes.tiled if spots <= options.largest])
    if "domains" in options.parts:
        results["domains"] = domains(sizes.clustered)
    text = report(results)
    print(text)
    if options.output:
        write_whole(options.output, json.dumps(results, indent=1) + "\n")
        write_whole(options.output.with_suffix(".md"), text + "\n")


if __name__ == "__main__":
    main()
