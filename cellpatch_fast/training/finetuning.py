"""Fine-tuning for cell type annotation: labelled cells in, an annotator and its test result out.

The cells are split into those that are trained on, those that tell when to stop (validation) and
those that tell how good the result is (test), which nothing is decided by.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cells import RaggedCells
from ..columns import Column, balancing_weights
from ..config import CellPatchConfig
from ..errors import InputError
from ..files import write_whole
from ..loader import CellBatch, CellLoader
from ..masking import Masking
from ..model import CellPatch, CellPatchAnnotator, fingerprint
from ..streams import Stream, reading_options
from .data import (
    Labels,
    describe,
    digest,
    opened,
    read_labels,
    report,
    require_batch,
    split_by_column,
    split_labelled,
)
from .distributed import Processes
from .evaluation import UNKNOWN, Evaluation, evaluate, require_analysis
from .running import Running, require_possible, run_task, seeded
from .settings import FinetuningSettings
from .starting import learn_new_genes, loader_options, starting_model, whiten_attention
from .task import History, Task, ranges_of

if TYPE_CHECKING:
    from ..detect import Expected
    from ..genes import GeneVocabulary

logger = logging.getLogger("cellpatch_fast")

MOST_GENES = 1 << 30  # of a cell: the encoder sees all that are not hidden


@dataclass(frozen=True)
class Finetuned:
    """What fine-tuning came to.

    Parameters
    ----------
    history
        Of the training.
    test
        How good the annotator is on the test cells; None where there are none.
    """

    history: History
    test: Evaluation | None


def finetune(
    data: Any,
    output: str | Path,
    *,
    label: str,
    model: CellPatch | str | Path | None = None,
    config: CellPatchConfig | None = None,
    vocabulary: GeneVocabulary | None = None,
    settings: FinetuningSettings | None = None,
    split_column: str | None = None,
    add_genes: bool = False,
    layer: str | None = None,
    use_raw: bool = False,
    gene_column: str | None = None,
    input: Expected = "auto",  # noqa: A002  (the name users know)
    device: torch.device | str | None = None,
    devices: int | None = None,
    threads: int | None = None,
    checkpoint_minutes: float = 10.0,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Finetuned:
    """Train an annotator of cell types.

    Parameters
    ----------
    data
        AnnData files, AnnData objects, 10x output or token stores: one, or a list.
    output
        Folder of the run: a model directory (`CellPatchAnnotator.from_pretrained`), the result on
        the test cells (``metrics.json``, ``per_class.csv``, ``confusion.csv``, figures,
        ``test_predictions.csv``), and what `pretrain` writes. The same call goes on with a run that
        was interrupted, and ends with the same bits.
    label
        Column of obs that holds the classes. Cells without a label, and classes with fewer than
        ``settings.min_cells`` cells, are left out and reported.
    model
        The pretrained encoder to start from: a model or its directory. None for an untrained one.
    settings
        How to train; the paper's numbers by default.
    split_column
        Column of obs that says ``train``, ``validation`` or ``test``; None splits by the shares in
        ``settings``.
    config, vocabulary, add_genes, layer, use_raw, gene_column, input, device, devices, threads, \
checkpoint_minutes, overwrite, progress
        As of `pretrain`.

    Returns
    -------
    Finetuned
        The history, and the result on the test cells.

    Raises
    ------
    InputError
        If an input, the labels, a setting or the folder cannot be used; or a loss is not finite.
    OSError
        If the folder cannot be written. What is done is kept.
    """
    settings = settings or FinetuningSettings()
    output = Path(output)
    options = reading_options(layer, use_raw, gene_column, input)
    with Processes.join(device, devices) as processes, seeded(settings.seed, processes):
        require_possible(output, settings, processes)
        require_analysis()
        encoder = starting_model(CellPatch, model, config, vocabulary)
        identity: dict[str, Any] = {"model": None if model is None else fingerprint(encoder)}
        if add_genes:
            learn_new_genes(encoder, data, options)
        with opened(data, encoder.vocabulary, encoder.config, options) as streams:
            report(streams, processes)
            labels = read_labels(streams, label, settings.min_cells)
            if UNKNOWN in labels.classes:
                raise InputError(
                    f"obs[{label!r}] has a class {UNKNOWN!r}, which stands for cells below the "
                    "threshold: give these cells no label, or the class another name"
                )
            if processes.leads:
                logger.info("%s", labels)
            rows = (
                split_labelled(labels, settings)
                if split_column is None
                else split_by_column(streams, split_column, labels)
            )
            require_batch(len(rows["training"]), settings.batch_size)
            annotator = CellPatchAnnotator.from_encoder(encoder, labels.classes)
            annotator = annotator.to(processes.device).float()
            task = _task(annotator, streams, rows, labels, settings, processes, threads)
            if model is None and settings.whitened:
                whiten_attention(annotator, task.training, settings, processes)
            identity |= {
                "data": describe(streams),
                **{name: value for name, value in options.items() if value},
                "label": label,
                "classes": labels.classes,
                "split_column": split_column,
                "cells": digest(labels.codes, *rows.values()),
                "vocabulary": encoder.vocabulary.fingerprint,
                "config": annotator.config.to_dict(),
            }
            running = Running(output, overwrite, checkpoint_minutes, progress)
            history = run_task(task, "fine-tuning", settings, identity, processes, running)
            test = None
            if processes.leads:
                if len(rows["test"]):
                    test = _test(output, streams, rows["test"], labels, processes, settings)
                _draw_curves(output)
            processes.wait()
    return Finetuned(history, test)


def _task(
    annotator: CellPatchAnnotator,
    streams: Sequence[Stream],
    rows: Mapping[str, np.ndarray],
    labels: Labels,
    settings: FinetuningSettings,
    processes: Processes,
    threads: int | None,
) -> Annotation:
    common = loader_options(settings, processes, threads)
    weights = None
    if settings.balance:
        codes = np.full(len(labels.codes), -1)
        codes[rows["training"]] = labels.codes[rows["training"]]
        weights = balancing_weights(Column(codes, np.array(labels.classes)), "label")
    masking = None
    if settings.hidden:
        masking = Masking(settings.hidden, zeros=0, max_encoder=MOST_GENES)
    # neighbours on disk are often of one type, and few cells are mixed well in memory
    training = CellLoader(
        streams,
        rows=rows["training"],
        shuffle=True,
        block_size=1,
        weights=weights,
        masking=masking,
        **common,
    )
    validation = None
    if len(rows["validation"]):
        validation = CellLoader(streams, rows=rows["validation"], **common)
    return Annotation(annotator, training, validation, labels.codes, settings)


class _Part(NamedTuple):
    cells: RaggedCells
    codes: Tensor  # int64 [cells]


class Annotation(Task):
    """Classification of cells; ``codes`` int64 [cells of the inputs] are their classes."""

    measures = ("accuracy", "macro_f1")

    def __init__(
        self,
        model: CellPatchAnnotator,
        training: CellLoader,
        validation: CellLoader | None,
        codes: np.ndarray,
        settings: FinetuningSettings,
    ) -> None:
        self.model: CellPatchAnnotator = model
        self.training, self.validation = training, validation
        self._codes, self._settings = codes, settings
        if settings.freeze_encoder:
            model.requires_grad_(False)
            model.head.requires_grad_(True)

    def train(self) -> None:
        self.model.train(not self._settings.freeze_encoder)
        self.model.head.train()

    def targets(self, batch: CellBatch) -> int:
        return len(batch.cells)

    def parts(self, batch: CellBatch, number: int) -> Iterator[_Part]:
        codes = self._codes_of(batch)
        if number == 1:
            yield _Part(batch.cells, codes)
            return
        for start, stop in ranges_of(len(codes), number):
            yield _Part(batch.cells.slice(start, stop), codes[start:stop])

    def loss(self, part: _Part) -> Tensor:
        logits = self.model.logits(part.cells, backend=self._settings.backend)
        return F.cross_entropy(logits.float(), part.codes, reduction="sum")

    def tally(self, batch: CellBatch) -> np.ndarray:
        """Sum of losses, then the confusion matrix, truth x prediction."""
        classes, codes = len(self.model.classes), self._codes_of(batch)
        logits = self.model.logits(batch.cells, backend=self._settings.backend).float()
        pairs = classes * codes + logits.argmax(1)
        confusion = torch.bincount(pairs, minlength=classes**2)
        loss = F.cross_entropy(logits.double(), codes, reduction="sum")
        return np.array([float(loss), *confusion.tolist()])

    def summarise(self, sums: np.ndarray) -> dict[str, float]:
        classes = len(self.model.classes)
        confusion = sums[1:].reshape(classes, classes)
        right, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        f1 = 2 * right / np.maximum(true + predicted, 1)
        cells = confusion.sum()
        return {
            "loss": float(sums[0] / cells),
            "accuracy": float(right.sum() / cells),
            "macro_f1": float(f1[true > 0].mean()),
        }

    def score(self, found: dict[str, float]) -> float:
        """Not the loss: a model becomes too sure of itself long before it stops getting better."""
        return found["accuracy"] + found["macro_f1"]

    def _codes_of(self, batch: CellBatch) -> Tensor:
        return torch.from_numpy(self._codes[batch.rows]).to(batch.cells.device)


def _test(
    output: Path,
    streams: Sequence[Stream],
    rows: np.ndarray,
    labels: Labels,
    processes: Processes,
    settings: FinetuningSettings,
) -> Evaluation:
    """Evaluate the model that was kept, and write what it says of each test cell."""
    import pandas as pd

    from ..embedding import Embedder

    embedder = Embedder(
        CellPatchAnnotator.from_pretrained(output),
        backend=settings.backend,
        device=processes.device,
        annotate=True,
    )
    ranges = [(row, row + 1) for row in rows.tolist()]
    found = [cells.probabilities for cells in embedder.run(streams, ranges)]
    probabilities = np.concatenate([block for block in found if block is not None])
    names = np.array(labels.classes, object)
    truth, predicted = names[labels.codes[rows]], names[probabilities.argmax(1)]
    table = pd.DataFrame(
        {"row": rows, "truth": truth, "predicted": predicted, "probability": probabilities.max(1)}
    )
    write_whole(output / "test_predictions.csv", table.to_csv(index=False))
    evaluation = evaluate(truth, predicted, labels.classes, probabilities=probabilities)
    evaluation.save(output)
    return evaluation


def _draw_curves(output: Path) -> None:
    from .. import pl

    pl.training_curves(output, save=output / "training_curves")
