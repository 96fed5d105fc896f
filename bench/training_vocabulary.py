"""A step's time against the size of the vocabulary: a part of `bench.training`.

Steps of the package's own training loop, with the settings for few cells, on cells whose genes are
always the same, while the model knows ever more genes. `OccurringGenes` has them train the rows of
measured genes alone; the counterpart, all rows, is had by data in which all genes were measured.

Milliseconds of processor time of one thread, from the beginning of a step to that of the next: with
loading and what else belongs to it, whatever other work the machine has. On the CPU in any case.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import anndata
import numpy as np
import torch
from scipy import sparse

from bench.report import table
from cellpatch_fast import CellLoader, CellPatchConfig, GeneVocabulary
from cellpatch_fast.loading import CellBatch
from cellpatch_fast.model import CellPatchAnnotator
from cellpatch_fast.preprocessing.masking import Masking
from cellpatch_fast.training.classification import Annotation
from cellpatch_fast.training.distributed import Processes
from cellpatch_fast.training.finetuning import MOST_GENES
from cellpatch_fast.training.loop import Trainer
from cellpatch_fast.training.settings import FinetuningSettings

CLASSES = 11
MOST_TIMES = 1.1  # that a step of the largest vocabulary takes of one of the smallest


class Sizes(NamedTuple):
    vocabularies: tuple[int, ...] = (12_000, 60_000, 250_000)  # gene tokens
    measured: int = 12_000  # genes that the data have
    length: int = 600  # genes of a cell, on average
    cells: int = 32  # of a step
    steps: int = 25  # of a run
    runs: int = 7


TOY = Sizes((100, 300), 100, 20, 4, 4, 1)


class Timed(Annotation):
    """Notes when each step begins."""

    begun: list[float]

    def targets(self, batch: CellBatch) -> int:
        self.begun.append(time.process_time())
        return super().targets(batch)


def measure(sizes: Sizes) -> dict[str, Any]:
    """A row for each vocabulary, and how its largest does against the target."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row(case, sizes) for case in run_in_turn(sizes)]
    finally:
        torch.set_num_threads(threads)
    times = max(entry["times the smallest"] for entry in rows)
    return {
        "cells": sizes.cells,
        "genes measured": sizes.measured,
        "genes of a cell": sizes.length,
        "rows": rows,
        "target": MOST_TIMES,
        "most times the smallest": times,
        "met": bool(times <= MOST_TIMES),
    }


class Case(NamedTuple):
    """Milliseconds of a step in each run: of occurring rows and of all, and of the smallest."""

    tokens: int
    occurring: list[float]
    everything: list[float]
    smallest: list[float]


def run_in_turn(sizes: Sizes) -> Iterator[Case]:
    """Cases are run in turn, so that a noisy machine disturbs all alike."""
    tasks = [
        make_task(tokens, everything, sizes)
        for tokens in sizes.vocabularies
        for everything in (False, True)
    ]
    taken: list[list[float]] = [[] for _ in tasks]
    for number in range(1 + sizes.runs):
        for task, times in zip(tasks, taken, strict=True):
            seconds = run(task, sizes)
            if number:  # the first one warms up
                times.append(seconds)
    for place, tokens in enumerate(sizes.vocabularies):
        yield Case(tokens, taken[2 * place], taken[2 * place + 1], taken[0])


def make_task(tokens: int, everything: bool, sizes: Sizes) -> Timed:
    """Fine-tuning of a new model; ``everything``: the data say that all genes were measured."""
    rng = np.random.default_rng(0)
    names = [f"gene{token}" for token in range(tokens)]
    measured_tokens = np.sort(rng.choice(tokens, sizes.measured, replace=False))
    adata = draw(rng, sizes, measured_tokens, names)
    if not everything:
        adata = adata[:, measured_tokens].copy()
    vocabulary = GeneVocabulary([""] * tokens, names)
    config = CellPatchConfig.for_few_cells(max_genes=vocabulary.size)
    torch.manual_seed(0)
    model = CellPatchAnnotator(config, vocabulary, [f"class {i}" for i in range(CLASSES)])
    settings = settings_of(sizes)
    masking = Masking(settings.hidden, zeros=0, max_encoder=MOST_GENES)
    loader = CellLoader(
        adata,
        vocabulary,
        config,
        batch_size=sizes.cells,
        shuffle=True,
        masking=masking,
        threads=1,
    )
    return Timed(model, loader, None, np.arange(adata.n_obs) % CLASSES, settings)


def draw(
    rng: np.random.Generator, sizes: Sizes, measured_tokens: np.ndarray, names: list[str]
) -> anndata.AnnData:
    """Counts of a run's cells, of the genes ``own`` among more that no cell has."""
    cells = sizes.cells * sizes.steps
    counts = sparse.random_array(
        (cells, sizes.measured),
        density=sizes.length / sizes.measured,
        rng=rng,
        data_sampler=lambda size: rng.integers(1, 6, size).astype(np.float32),
    ).tocsr()
    parts = counts.data, measured_tokens[counts.indices], counts.indptr
    adata = anndata.AnnData(sparse.csr_matrix(parts, shape=(cells, len(names))))
    adata.var_names = names
    return adata


def settings_of(sizes: Sizes) -> FinetuningSettings:
    return FinetuningSettings.for_few_cells(epochs=1, batch_size=sizes.cells, validation=0)


def run(task: Timed, sizes: Sizes) -> float:
    """Milliseconds of a step: the median of a run."""
    task.begun = []
    Trainer(task, settings_of(sizes), Processes(0, 1, torch.device("cpu")), None, None).run(False)
    return float(1e3 * np.median(np.diff(task.begun)))


def row(case: Case, sizes: Sizes) -> dict[str, Any]:
    """Times are medians; ratios are those of runs in turn, and medians of them."""

    def times(some: list[float], others: list[float]) -> float:
        return statistics.median(x / y for x, y in zip(some, others, strict=True))

    return {
        "gene tokens": case.tokens,
        "ms per step": statistics.median(case.occurring),
        "times the smallest": times(case.occurring, case.smallest),
        "all rows trained, ms per step": statistics.median(case.everything),
        "all rows / ours": times(case.everything, case.occurring),
    }


def report(results: dict[str, Any]) -> list[str]:
    """The part as Markdown."""
    body = [[f"{value:,.4g}" for value in row.values()] for row in results["rows"]]
    for line, row in zip(body, results["rows"], strict=True):
        line[0] = f"{row['gene tokens']:,}"
    verdict = "met" if results["met"] else "**missed**"
    return [
        *table(list(results["rows"][0]), body),
        "",
        f"{results['cells']} cells of {results['genes of a cell']} genes, "
        f"{results['genes measured']:,} genes measured; one thread's processor time. The largest "
        f"vocabulary takes {results['most times the smallest']:.3f} times the smallest, at most "
        f"{results['target']} aimed for: {verdict}",
    ]
