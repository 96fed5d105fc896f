"""The end of fine-tuning: linear models, calibration, the mixture of all, and the test.

What is decided here is decided on validation cells. The linear models are first fitted to the
training cells, so that validation cells can weigh them against the network, then with the same
penalties to both. Everything starts from the network that training has kept, so that a run which
was interrupted here ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cells import RaggedCells
from ..files import write_whole
from ..inference.evaluation import Evaluation, evaluate
from ..loading import CellLoader
from ..loading.inputs import Stream
from ..model import CellPatchAnnotator
from ..model.linear import LinearPath
from ..plots.confusion import save_confusion
from .calibration import mixture_shares, temperature
from .data import Labels
from .expression import Expression, gather
from .folder import LINEAR_METRICS
from .linear import ABSENT, GRAM_CELLS, LinearModels, fit, softmax
from .settings import FinetuningSettings

logger = logging.getLogger("cellpatch_fast")

# Cells that speak for each of `MEMBERS` before any is seen. Where validation cells cannot tell them
# apart (all have them right) the network counts half as much as a linear model: on three data sets,
# two or four splits each, equal shares had 0.002 less accuracy than these.
PRIOR = (10.0, 10.0, 5.0)
BATCH_CELLS = 256


class Tested(NamedTuple):
    """Evaluations on the test cells: of the annotator, and of the linear models alone."""

    annotator: Evaluation | None
    linear: Evaluation | None


def finish(
    output: Path,
    streams: Sequence[Stream],
    rows: Mapping[str, np.ndarray],
    labels: Labels,
    settings: FinetuningSettings,
    device: torch.device,
    linear: LinearModels | None,
) -> Tested:
    """Complete the annotator that training has left in ``output``, and test it.

    Parameters
    ----------
    rows
        int64, of each part of the cells: training, validation and test.
    linear
        The linear models of the training cells; None to fit them here, to a sample.
    """
    annotator = CellPatchAnnotator.from_pretrained(output).to(device)
    cells = _Cells(streams, labels, device)
    linear, shares = _combine(annotator, cells, rows, settings, linear)
    annotator.save_pretrained(output)
    if not len(rows["test"]):
        return Tested(None, None)
    return Tested(
        _test(output, annotator, cells, rows["test"], settings),
        _test_linear(output, linear, shares, cells, rows["test"]),
    )


class _Cells:
    """The cells of the inputs, and what is computed of some of them."""

    def __init__(self, streams: Sequence[Stream], labels: Labels, device: torch.device) -> None:
        self.streams, self.labels, self.device = streams, labels, device

    def codes(self, rows: np.ndarray) -> np.ndarray:
        return self.labels.codes[rows]

    @torch.inference_mode()
    def computed(self, rows: np.ndarray, compute: Callable[[RaggedCells], Tensor]) -> np.ndarray:
        """What ``compute`` makes of the cells ``rows``, one row each, in order."""
        loader = CellLoader(self.streams, rows=rows, batch_size=BATCH_CELLS, device=self.device)
        with contextlib.closing(iter(loader)) as batches:
            return np.concatenate([compute(batch.cells).numpy(force=True) for batch in batches])


def _combine(
    annotator: CellPatchAnnotator,
    cells: _Cells,
    rows: Mapping[str, np.ndarray],
    settings: FinetuningSettings,
    first: LinearModels | None,
) -> tuple[LinearModels, np.ndarray]:
    """Give the annotator a temperature and its linear path; the models, and their shares."""
    training, validation = rows["training"], rows["validation"]
    beside = "to compare with" if annotator.linear is None else "beside it"
    logger.info("the network is trained; fitting linear models %s", beside)
    logits = np.zeros((0, len(annotator.classes)))
    if len(validation):
        logits = cells.computed(
            validation, lambda some: annotator.logits(some, backend=settings.backend).float()
        )
    true = cells.codes(validation)
    fitted = temperature(logits, true)
    annotator.config = dataclasses.replace(annotator.config, temperature=fitted)
    sampled = np.sort(np.concatenate([training, validation]))
    if annotator.linear is None and len(sampled) > GRAM_CELLS:  # a baseline: a sample will do
        sampled = np.sort(np.random.default_rng(settings.seed).choice(sampled, GRAM_CELLS, False))
    expression = gather(cells.streams, sampled, annotator.config.max_genes, settings.seed)
    if first is None:
        trained = np.isin(expression.rows, training)
        codes = cells.codes(expression.rows[trained])
        first = fit(expression.values[trained], codes, len(annotator.classes), settings.seed)
    models, members = _weighed(first, expression, cells, validation, settings)
    shares = mixture_shares(np.stack([*members, _likely(logits / fitted, true)]), PRIOR)
    if annotator.linear is not None:
        models.load_into(annotator.linear, shares)
        by = f"chosen by {len(validation):,} validation cells" if len(validation) else "default"
        logger.info(
            "the annotator's probabilities: %.0f %% from a linear model of values (C %g), %.0f %% "
            "from one of what attention sees of them (C %g), %.0f %% from the network; %s",
            100 * shares[0],
            models.values.penalty,
            100 * shares[1],
            models.seen.penalty,
            100 * shares[2],
            by,
        )
    return models, shares


def _weighed(
    first: LinearModels,
    expression: Expression,
    cells: _Cells,
    validation: np.ndarray,
    settings: FinetuningSettings,
) -> tuple[LinearModels, list[np.ndarray]]:
    """Linear models of all known cells; and how likely the first ones find validation cells."""
    if not len(validation):
        return first, [np.zeros(0)] * 2
    true = cells.codes(validation)
    members = cells.computed(validation, _logits_of(first, cells)).transpose(1, 0, 2)
    cell = np.arange(len(true))
    seen = members[0][cell, true] > ABSENT / 2  # of no other class a temperature says anything
    temperatures = [temperature(logits[seen], true[seen]) for logits in members]
    likely = [_likely(x / t, true) for x, t in zip(members, temperatures, strict=True)]
    penalties = first.values.penalty, first.seen.penalty
    codes, classes = cells.codes(expression.rows), len(cells.labels.classes)
    exponent = first.seen.exponent
    models = fit(expression.values, codes, classes, settings.seed, penalties, exponent)
    return models.tempered(temperatures), likely


def _logits_of(models: LinearModels, cells: _Cells) -> Callable[[RaggedCells], Tensor]:
    """Logits [cells, 2, classes] of both linear models."""
    path = LinearPath(len(models.values.weights), len(cells.labels.classes)).to(cells.device)
    models.load_into(path, path.shares.numpy(force=True))
    return lambda some: path.logits(some).transpose(0, 1)


def _likely(logits: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The probability of each cell's true class."""
    likely: np.ndarray = softmax(logits)[np.arange(len(codes)), codes]
    return likely


def _test(
    output: Path,
    annotator: CellPatchAnnotator,
    cells: _Cells,
    rows: np.ndarray,
    settings: FinetuningSettings,
) -> Evaluation:
    """Evaluate the annotator, and write what it says of each test cell."""
    import pandas as pd

    from ..inference.embedder import Embedder

    embedder = Embedder(annotator, backend=settings.backend, device=cells.device, annotate=True)
    ranges = [(row, row + 1) for row in rows.tolist()]
    blocks = [some.probabilities for some in embedder.run(cells.streams, ranges)]
    probabilities = np.concatenate([block for block in blocks if block is not None])
    names = np.array(annotator.classes, object)
    truth, predicted = names[cells.codes(rows)], names[probabilities.argmax(1)]
    table = pd.DataFrame(
        {"row": rows, "truth": truth, "predicted": predicted, "probability": probabilities.max(1)}
    )
    write_whole(output / "test_predictions.csv", table.to_csv(index=False))
    evaluation = evaluate(truth, predicted, annotator.classes, probabilities=probabilities)
    evaluation.save(output)
    save_confusion(
        evaluation.confusion,
        output / "confusion",
        others=len(evaluation.other_labels),
        title=evaluation.headline,
    )
    return evaluation


def _test_linear(
    output: Path, models: LinearModels, shares: np.ndarray, cells: _Cells, rows: np.ndarray
) -> Evaluation:
    """Evaluate the linear models alone, mixed as they are beside the network."""
    logits = cells.computed(rows, _logits_of(models, cells))  # [c, 2, classes]
    weights = shares[:2] / shares[:2].sum()
    probabilities = np.einsum("m,cmk->ck", weights, np.stack([softmax(x) for x in logits]))
    names = np.array(cells.labels.classes, object)
    evaluation = evaluate(
        truth=names[cells.codes(rows)],
        predicted=names[probabilities.argmax(1)],
        classes=cells.labels.classes,
        probabilities=probabilities,
    )
    metrics = json.dumps(evaluation.metrics(), indent=2)
    write_whole(output / LINEAR_METRICS, metrics + "\n")
    return evaluation
