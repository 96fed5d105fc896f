"""Spatial domains against annotated layers: ``python bench/spatial.py [--data DIR]``.

On a generated tissue, and on those of `spatial_data.FILES` that a folder holds. Every method embeds
the spots; its domains are the most likely of 20 Gaussian mixtures with the true number of domains.
Scores are of each of many seeds: the adjusted Rand index of the most likely mixture, and the median
over all starts, which says what clustering alone decides; normalised mutual information; and,
beside them, what can be told without labels. Differences are taken seed by seed.

A score that is kept (``--folder``) is not measured again. Prints Markdown; with ``--output``
writes JSON, and the Markdown beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import processor
from bench.spatial_data import SPOTS, Tissue, read_tissues
from bench.spatial_methods import CEILING, METHODS, PEERS, TRAINED, Recipe, smoothed_pca
from bench.spatial_report import Scores, report, summarise, targets
from bench.spatial_scores import ARI, MEDIAN_ARI, Score, ceiling, scored
from cellpatch_fast.files import write_whole

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
TOY = Recipe(2, 1, 1, {"patches": 3, "dim": 14, "self_attention_blocks": 1})
TOY_SPOTS, TOY_SEEDS = 150, 2


class Job(NamedTuple):
    """One score to measure."""

    method: str
    seed: int
    tissue: Tissue

    def __str__(self) -> str:
        return f"{self.tissue.name}, seed {self.seed}, {self.method}"

    def file(self, folder: Path) -> Path:
        """Where its score is kept."""
        tissue, method = (re.sub(r"\W+", "-", n.lower()) for n in (self.tissue.name, self.method))
        return folder / tissue / str(self.seed) / f"{method}.json"


def jobs_of(tissues: Sequence[Tissue], options: argparse.Namespace) -> list[Job]:
    """Seed by seed, so that what is interrupted has a little of everything."""
    jobs = []
    for seed in range(options.seeds):
        methods = [CEILING, *METHODS]
        if seed >= options.peers:
            methods = [name for name in methods if name not in PEERS]
        if seed >= options.trained:
            methods = [name for name in methods if name not in TRAINED]
        if options.methods:
            methods = [name for name in methods if name in options.methods]
        jobs += [Job(name, seed, tissue) for tissue in tissues for name in methods]
    if options.kept:
        jobs = [job for job in jobs if job.file(options.folder).exists()]
    return jobs


def measure(job: Job, folder: Path, recipe: Recipe) -> Score:
    """The score, which is kept; seconds are of the processor, of embedding and of clustering."""
    torch.set_num_threads(1)
    began = time.process_time()
    if job.method == CEILING:
        score = ceiling(job.tissue, smoothed_pca(job.tissue), job.seed)
        embedded = time.process_time()
    else:
        rows = METHODS[job.method](job.tissue, job.seed, recipe)
        embedded = time.process_time()
        score = scored(job.tissue, rows, job.seed)
    score |= {"embedding, s": embedded - began, "clustering, s": time.process_time() - embedded}
    path = job.file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(score, indent=1) + "\n")
    return score


def measure_all(
    jobs: Sequence[Job], folder: Path, recipe: Recipe, processes: int
) -> Mapping[str, Scores]:
    """Scores by tissue, method and seed: those that are kept, and all others."""
    missing = [job for job in jobs if not job.file(folder).exists()]
    for variable in THREADS:  # of the processes below
        os.environ.setdefault(variable, "1")
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        measured = pool.map(partial(measure, folder=folder, recipe=recipe), missing)
        for number, (job, score) in enumerate(zip(missing, measured, strict=True), 1):
            print(
                f"{number} of {len(missing)}: {job}: ARI {score[ARI]:.3f}, median over starts "
                f"{score[MEDIAN_ARI]:.3f}, {score['embedding, s']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    scores: dict[str, dict[str, dict[int, Score]]] = {}
    for job in jobs:
        methods = scores.setdefault(job.tissue.name, {})
        methods.setdefault(job.method, {})[job.seed] = json.loads(job.file(folder).read_text())
    return scores


def described(tissues: Sequence[Tissue]) -> dict[str, Any]:
    return {
        tissue.name: {
            "spots": tissue.spots.n_obs,
            "annotated": int(tissue.annotated.sum()),
            "genes": tissue.spots.n_vars,
            "domains": tissue.count,
            "graph": str(tissue.graph),
        }
        for tissue in tissues
    }


def require_same(recipe: dict[str, Any], folder: Path) -> None:
    """Refuse a folder with scores that another recipe has made."""
    path = folder / "recipe.json"
    if path.exists() and json.loads(path.read_text()) != recipe:
        sys.exit(f"{path}: scores there are of another recipe; choose another --folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(recipe, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="little of all, to see that it works")
    parser.add_argument("--data", type=Path, help="folder with further tissues")
    parser.add_argument("--tissues", nargs="+", help="names of those to measure alone")
    parser.add_argument("--methods", nargs="+", help="names of rows to measure alone")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--peers", type=int, default=10, metavar="N", help="other packages' seeds")
    parser.add_argument(
        "--trained", type=int, default=3, metavar="N", help="seeds of presets that train features"
    )
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="of STAGATE")
    parser.add_argument(
        "--trained-epochs",
        type=int,
        default=Recipe.trained_epochs,
        help="of the presets that train features (published: 1,000)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="scores measured at a time")
    parser.add_argument("--folder", type=Path, help="keep scores here; measure those that lack")
    parser.add_argument("--kept", action="store_true", help="measure nothing: report the folder")
    parser.add_argument("--output", type=Path, help="JSON file; .md beside it")
    options = parser.parse_args()
    if min(options.seeds, options.jobs, options.epochs, options.trained_epochs) < 1:
        parser.error("--seeds, --jobs, --epochs and --trained-epochs are 1 at least")
    if options.kept and options.folder is None:
        parser.error("--kept reports the scores that --folder holds: name it")
    if unknown := [name for name in options.methods or [] if name not in (CEILING, *METHODS)]:
        parser.error(f"no method {unknown[0]!r}: choose of {', '.join([CEILING, *METHODS])}")
    return options


def main() -> None:
    options = parse()
    recipe = Recipe(options.epochs, options.trained_epochs)
    if options.toy:
        recipe, options.seeds = TOY, TOY_SEEDS
    tissues, absent = read_tissues(options.data, TOY_SPOTS if options.toy else SPOTS)
    for name in absent:
        print(f"{name} is left out: --data names no folder that holds {name}.h5ad", file=sys.stderr)
    if options.tissues:
        tissues = [tissue for tissue in tissues if tissue.name in options.tissues]
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "toy": options.toy,
        "machine": {
            "processor": processor(),
            "jobs": options.jobs,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "recipe": {**dataclasses.asdict(recipe), "peers": list(PEERS)},
        "tissues": described(tissues),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        require_same(dataclasses.asdict(recipe), folder)
        scores = measure_all(jobs_of(tissues, options), folder, recipe, options.jobs)
    summaries = {name: summarise(of_tissue) for name, of_tissue in scores.items()}
    results |= {"targets": targets(scores), "summaries": summaries, "scores": scores}
    text = report(results)
    print(text)
    if options.output:
        write_whole(options.output, json.dumps(results, indent=1) + "\n")
        write_whole(options.output.with_suffix(".md"), text + "\n")


if __name__ == "__main__":
    main()
