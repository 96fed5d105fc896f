"""How good it is: ``python bench/quality.py [--data DIR] [--folder RUNS] [--output FILE.json]``.

On scanpy's pbmc68k_reduced, and on the data sets of `quality_data.FILES` where a folder holds them:

- Annotation: CellPatch untrained, fine-tuned with and without its linear path, and by the paper's
  recipe, against logistic regression on principal components and on all genes. All learn from the
  same cells and are tested on the same others, of several stratified splits.
- Pretraining on the training cells without their labels: what it adds to annotation; how well it
  tells hidden values of cells that it has not seen, against each gene's mean; and how many of a
  cell's 15 nearest neighbours in the embedding share its label.
- Whether the fast path's loss curves are the reference's, but for rounding.

A score that is kept (``--folder``) is not measured again. Prints Markdown; with ``--output``
writes JSON, and beside it the Markdown and a figure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import curves, quality_figure
from bench.machine import processor
from bench.quality_data import Dataset, Split, read_datasets
from bench.quality_methods import (
    ANNOTATION,
    FULL,
    METHODS,
    NETWORK,
    PRETRAINED,
    REFERENCES,
    TOY,
    Recipe,
    Score,
)
from bench.quality_report import Scores, report, summarise, targets
from cellpatch_fast.files import write_whole
from cellpatch_fast.plots.figures import FORMATS, save_figure

PARTS = ("annotation", "pretraining", "curves")
CURVE_STEPS, CURVE_PATCHES = 200, 16
TOY_CELLS, TOY_SPLITS, TOY_STEPS = 130, 2, 20
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Job(NamedTuple):
    """One score to measure."""

    method: str
    split: Split

    def __str__(self) -> str:
        return f"{self.split.data.name}, split {self.split.seed}, {self.method}"

    def file(self, folder: Path) -> Path:
        """Where its score is kept."""
        name = re.sub(r"\W+", "-", self.method.lower())
        return folder / self.split.data.name / str(self.split.seed) / f"{name}.json"


def jobs_of(datasets: Sequence[Dataset], options: argparse.Namespace) -> list[Job]:
    """Split by split, so that what is interrupted has a little of everything."""
    jobs = []
    for seed in range(options.splits):
        methods = list(ANNOTATION) if "annotation" in options.parts else []
        if seed >= options.references:
            methods = [name for name in methods if name not in REFERENCES]
        if "pretraining" in options.parts and seed < options.pretrained:
            methods += PRETRAINED
        jobs += [Job(name, Split(data, seed)) for data in datasets for name in methods]
    return jobs


def measure(job: Job, folder: Path, recipe: Recipe) -> Score:
    """The score, which is kept; seconds are of the processor, in all threads."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as runs:
        before = time.process_time()
        score = METHODS[job.method](job.split, recipe, Path(runs))
        score.setdefault("seconds", time.process_time() - before)
    path = job.file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(score, indent=1) + "\n")
    return score


def measure_all(
    jobs: Sequence[Job], folder: Path, recipe: Recipe, processes: int
) -> dict[str, dict[str, dict[int, Score]]]:
    """Scores by data set, method and split: those that are kept, and all others."""
    open_jobs = [job for job in jobs if not job.file(folder).exists()]
    for variable in THREADS:  # of the processes below
        os.environ.setdefault(variable, "1")
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        measured = pool.map(partial(measure, folder=folder, recipe=recipe), open_jobs)
        follow(open_jobs, measured)
    scores_of: dict[str, dict[str, dict[int, Score]]] = {}
    for job in jobs:
        methods = scores_of.setdefault(job.split.data.name, {})
        score = json.loads(job.file(folder).read_text())
        if (alone := score.pop(NETWORK, None)) is not None:  # of the same run
            methods.setdefault(NETWORK, {})[job.split.seed] = alone | {"seconds": score["seconds"]}
        methods.setdefault(job.method, {})[job.split.seed] = score
    return scores_of


def follow(jobs: Sequence[Job], measured: Iterable[Score]) -> None:
    """A line for every score."""
    for number, (job, score) in enumerate(zip(jobs, measured, strict=True), 1):
        print(
            f"{number} of {len(jobs)}: {job}: accuracy {score['accuracy']:.3f}, "
            f"macro F1 {score['macro F1']:.3f}, {score['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def loss_curves(data: Dataset, steps: int, recipe: Recipe) -> dict[str, Any]:
    """Of the network alone: the linear path is no part of what backends compute."""
    split = Split(data, 0)
    start = recipe.start(split)
    config = replace(start["config"], patches=CURVE_PATCHES)
    trainings = recipe.pretraining(split), recipe.finetuning(split, linear=False)
    with tempfile.TemporaryDirectory() as runs:
        return curves.compare(
            data.cells, data.label, start["vocabulary"], config, *trainings, steps, Path(runs)
        )


def described(data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """What scores depend on, but for the seed."""
    split = Split(data, 0)
    return {
        "cells": data.cells.n_obs,
        "genes": data.cells.n_vars,
        "config": recipe.start(split)["config"].to_dict(),
        "fine-tuning": recipe.finetuning(split).to_dict(),
        "pretraining": recipe.pretraining(split).to_dict(),
        "the paper's config": recipe.papers_start(split)["config"].to_dict(),
        "the paper's fine-tuning": recipe.papers_finetuning(split).to_dict(),
    }


def require_same(recipes: dict[str, Any], folder: Path) -> None:
    """Refuse a folder with scores that another recipe has made."""
    for name, recipe in recipes.items():
        path = folder / name / "recipe.json"
        if path.exists() and json.loads(path.read_text()) != recipe:
            sys.exit(f"{path}: scores there are of another recipe; choose another --folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(recipe, indent=1) + "\n")


def annotation(scores: Mapping[str, Scores]) -> dict[str, Any]:
    summaries = {name: summarise(of_data) for name, of_data in scores.items()}
    return {"targets": targets(summaries), "summaries": summaries, "scores": scores}


def pretraining(scores: Mapping[str, Scores]) -> dict[str, list[Score]]:
    """By data set, the scores of all splits that were pretrained."""
    (method,) = PRETRAINED
    return {name: list(of_data[method].values()) for name, of_data in scores.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="few steps, to see that it works")
    parser.add_argument("--data", type=Path, help="folder with further data sets")
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--pretrained", type=int, default=1, metavar="N", help="pretrain for N of the splits"
    )
    parser.add_argument(
        "--references",
        type=int,
        default=3,
        metavar="N",
        help="the untrained model and the paper's recipe on N of the splits",
    )
    parser.add_argument("--jobs", type=int, default=1, help="scores measured at a time")
    parser.add_argument("--folder", type=Path, help="keep scores here; measure those that lack")
    parser.add_argument("--output", type=Path, help="JSON file; .md, .png and .svg beside it")
    options = parser.parse_args()
    if options.toy:
        options.splits = TOY_SPLITS
    options.references = min(options.references, options.splits)
    if min(options.splits, options.jobs, options.references) < 1:
        parser.error("--splits, --references and --jobs are 1 at least")
    if not 1 <= options.pretrained <= options.splits:
        parser.error("--pretrained is 1 to --splits")
    return options


def write(results: dict[str, Any], path: Path) -> None:
    """JSON, and beside it Markdown and figure."""
    write_whole(path, json.dumps(results, indent=1) + "\n")
    write_whole(path.with_suffix(".md"), report(results) + "\n")
    if "annotation" in results:
        figure = quality_figure.draw(results["annotation"])
        for suffix in FORMATS:
            save_figure(figure, path.with_suffix(f".{suffix}"))


def main() -> None:
    options = parse()
    recipe, steps = (TOY, TOY_STEPS) if options.toy else (FULL, CURVE_STEPS)
    datasets = read_datasets(options.data)
    if options.toy:
        datasets = [dataset.some(TOY_CELLS) for dataset in datasets]
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "toy": options.toy,
        "machine": {
            "processor": processor(),
            "jobs": options.jobs,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "recipes": {dataset.name: described(dataset, recipe) for dataset in datasets},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        require_same(results["recipes"], folder)
        scores = measure_all(jobs_of(datasets, options), folder, recipe, options.jobs)
    if "annotation" in options.parts:
        results["annotation"] = annotation(scores)
    if "pretraining" in options.parts:
        results["pretraining"] = pretraining(scores)
    if "curves" in options.parts:
        results["curves"] = loss_curves(datasets[0], steps, recipe)
    print(report(results))
    if options.output:
        write(results, options.output)


if __name__ == "__main__":
    main()
