"""Fine-tuning for cell type annotation: labelled cells in, an annotator and its test result out.

The cells are split into those that are trained on, those that tell when to stop (validation) and
those that tell how good the result is (test), which nothing is decided by.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config import CellPatchConfig, Reading
from ..errors import InputError
from ..inference.evaluation import UNKNOWN, Evaluation, require_analysis
from ..loading import CellLoader
from ..loading.columns import Column, balancing_weights
from ..loading.inputs import Stream
from ..model import CellPatch, CellPatchAnnotator, fingerprint
from ..preprocessing.masking import Masking
from .choosing import choose, complete, new_config
from .classification import Annotation
from .curves import training_curves
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
from .expression import gather
from .finishing import Tested, finish
from .folder import held
from .linear import LinearModels, fit
from .running import Running, require_possible, require_resumable, run_task, seeded
from .settings import FinetuningSettings
from .starting import begin, learn_new_genes, loader_options, starting_model
from .task import History

if TYPE_CHECKING:
    from ..config import Expected
    from ..genes import GeneVocabulary

logger = logging.getLogger("cellpatch_fast")

KIND = "fine-tuning"
MOST_GENES = 1 << 30  # of a cell: the encoder sees all that are not hidden
FEW_TESTED = 50  # cells
LITTLE = 0.02  # accuracy above that of the most frequent class
NO_NAMES = {"nan", "none", "null", "na", "n/a", "<na>", ""}  # that text has instead of a class


@dataclass(frozen=True)
class Finetuned:
    """What fine-tuning came to.

    Parameters
    ----------
    history
        Of the training.
    test
        How good the annotator is on the test cells; None where there are none.
    linear
        How good linear models are on the same cells, fitted to the same training cells: what it
        has to be compared with.
    """

    history: History
    test: Evaluation | None
    linear: Evaluation | None


def finetune(
    data: Any,
    output: str | Path,
    *,
    label: str,
    model: CellPatch | str | Path | None = None,
    config: CellPatchConfig | Mapping[str, Any] | None = None,
    vocabulary: GeneVocabulary | None = None,
    settings: FinetuningSettings | Mapping[str, Any] | None = None,
    few_cells: bool | None = None,
    split_column: str | None = None,
    add_genes: bool | None = None,
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
        How to train: all of it, or a mapping of what shall be other than the defaults, which are
        those of ``few_cells``.
    few_cells
        Take the settings for few cells (`FinetuningSettings.for_few_cells`, and for a new model
        `CellPatchConfig.for_few_cells`), or the paper's. None decides by the number of cells, and
        says what it has decided: below 20,000 they are few.
    split_column
        Column of obs that says ``train``, ``validation`` or ``test``; None splits by the shares in
        ``settings``. Where it names no validation cells, some training cells are kept apart.
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
    output = Path(output)
    reading = Reading(layer=layer, use_raw=use_raw, gene_column=gene_column, input=input)
    choice = choose(data, few_cells, settings, reading)
    first = complete(FinetuningSettings, settings, choice.few, None)
    with Processes.join(device, devices) as processes, seeded(first.seed, processes):
        require_possible(output, model, first, processes)
        require_analysis()
        if model is None:
            config = new_config(data, choice, config)
        encoder = starting_model(CellPatch, model, config, vocabulary)
        identity: dict[str, Any] = {"model": None if model is None else fingerprint(encoder)}
        if add_genes or (add_genes is None and model is None and choice.few):
            learn_new_genes(encoder, data, reading, required=bool(add_genes))
        with opened(data, encoder.vocabulary, encoder.config, reading) as streams:
            report(streams, processes)
            labels = read_labels(streams, label, first.min_cells)
            rows = (
                split_labelled(labels, first)
                if split_column is None
                else split_by_column(streams, split_column, labels, first)
            )
            chosen = complete(FinetuningSettings, settings, choice.few, len(rows["training"]))
            if processes.leads:
                _say(labels, label, rows, f"{choice}", chosen, new=model is None)
            _check(labels, label, rows, chosen)
            annotator = CellPatchAnnotator.from_encoder(encoder, labels.classes, chosen.linear)
            annotator = annotator.to(processes.device).float()
            task = _task(annotator, streams, rows, labels, chosen, processes, threads)
            identity |= {
                "data": describe(streams),
                **reading.given(),
                "label": label,
                "classes": labels.classes,
                "split_column": split_column,
                "cells": digest(labels.codes, *rows.values()),
                "vocabulary": encoder.vocabulary.fingerprint,
                "config": annotator.config.to_dict(),
            }
            running = Running(output, overwrite, checkpoint_minutes, progress)
            require_resumable(KIND, chosen, identity, processes, running)
            linear = _begin(task, rows["training"], labels, chosen, processes, new=model is None)
            history = run_task(task, KIND, chosen, identity, processes, running)
            tested = Tested(None, None)
            if processes.leads:
                _warn_of_majority(history, labels, rows)
                with held(output):
                    tested = finish(output, streams, rows, labels, chosen, processes.device, linear)
                    training_curves(output, save=output / "training_curves")
            processes.wait()
    return Finetuned(history, tested.annotator, tested.linear)


def _begin(
    task: Annotation,
    rows: np.ndarray,
    labels: Labels,
    settings: FinetuningSettings,
    processes: Processes,
    *,
    new: bool,
) -> LinearModels | None:
    """Start a new model, and fit the linear models of the training cells where they are used."""
    spectral = new and settings.spectral
    guided = spectral and settings.guided
    values = models = None
    if spectral or settings.linear:
        size = task.model.config.max_genes
        values, kept = gather(task.training.streams, rows, size, settings.seed)
        if guided or settings.linear:
            models = fit(values, labels.codes[kept], len(labels.classes), settings.seed)
    if new:
        guide = models.seen.weights if models is not None and guided else None
        begin(task.model, task.training, values, settings, processes, guide)
    return models


def _check(
    labels: Labels, label: str, rows: Mapping[str, np.ndarray], settings: FinetuningSettings
) -> None:
    """Refuse what cannot be trained on."""
    if UNKNOWN in labels.classes:
        raise InputError(
            f"obs[{label!r}] has a class {UNKNOWN!r}, which stands for cells below the "
            "threshold: give these cells no label, or the class another name"
        )
    require_batch(len(rows["training"]), settings.batch_size)


def _say(
    labels: Labels,
    label: str,
    rows: Mapping[str, np.ndarray],
    choice: str,
    settings: FinetuningSettings,
    *,
    new: bool,
) -> None:
    """What is trained on and how, and what about it someone should look at."""
    logger.info("%s", labels)
    logger.info("a %s model, %s", "new" if new else "given", choice)
    logger.info(
        "%s cells to train on, %s to validate, %s to test; epochs: %d, in batches of %d cells",
        f"{len(rows['training']):,}",
        f"{len(rows['validation']):,}",
        f"{len(rows['test']):,}",
        settings.epochs,
        settings.batch_size,
    )
    nameless = [name for name in labels.classes if name.lower() in NO_NAMES]
    if nameless:
        logger.warning(
            "obs[%r] has a class called %s, which is taken for a cell type: cells without a label "
            "should have none (NaN, not text)",
            label,
            ", ".join(map(repr, nameless)),
        )
    tested = np.bincount(labels.codes[rows["test"]], minlength=len(labels.classes))
    if 0 < tested.sum() < FEW_TESTED:
        logger.warning(
            "there are only %d test cells (%d of the rarest class): one is %.1f %% of accuracy, "
            "so small differences mean nothing",
            tested.sum(),
            tested.min(),
            100 / tested.sum(),
        )


def _warn_of_majority(history: History, labels: Labels, rows: Mapping[str, np.ndarray]) -> None:
    """Say so where the network knows no more than which class has most cells."""
    accuracy = history.best.get("validation_accuracy")
    counts = np.bincount(labels.codes[rows["validation"]], minlength=len(labels.classes))
    if accuracy is None or accuracy > counts.max() / counts.sum() + LITTLE:
        return
    logger.warning(
        "the network's accuracy on the validation cells, %.3f, is hardly above that of calling all "
        "of them %r, %.3f: it has not learnt to tell the classes apart. More epochs, or the "
        "settings for few cells (--few-cells, few_cells=True), often help",
        accuracy,
        labels.classes[int(counts.argmax())],
        counts.max() / counts.sum(),
    )


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
