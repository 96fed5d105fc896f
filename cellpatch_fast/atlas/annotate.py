"""Annotate any number of cells: labels, their probabilities, and the embedding, in one store.

Labels are read off the probabilities once all of them are in the store, a part at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..config import Reading
from ..errors import InputError
from ..inference.embedder import Embedder
from ..inference.evaluation import Evaluation, evaluate, require_analysis
from ..inference.labels import label_column, most_likely, require_threshold, true_labels
from ..io.stores.embeddings import EmbeddingWriter
from ..model.storage import fingerprint
from ..training.folder import warn_of_unfinished
from .making import KEY, PROBABILITIES, make_store
from .selection import Selection
from .summary import Summary

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike

    from ..config import Expected
    from ..io.sources.tables import Table
    from ..model import CellPatchAnnotator
    from ..model.encoder import Pool

LABEL, PROBABILITY = "cellpatch_label", "cellpatch_probability"
READ_ROWS = 1 << 16  # of probabilities at a time


@dataclass(frozen=True)
class Annotated:
    """What `annotate` did.

    Parameters
    ----------
    summary
        Of the store.
    cells
        Number of cells with each label, the most frequent first.
    evaluation
        Agreement with the labels that were given; None without them.
    """

    summary: Summary
    cells: dict[str, int]
    evaluation: Evaluation | None = None

    def __str__(self) -> str:
        labels = ", ".join(f"{name} {count:,}" for name, count in self.cells.items())
        text = f"{self.summary}\nlabels: {labels}"
        return text if self.evaluation is None else f"{text}\n{self.evaluation}"


def annotate(
    inputs: str | Path | Sequence[str | Path],
    model: CellPatchAnnotator | str | Path,
    output: str | Path,
    *,
    threshold: float = 0.0,
    embedding: bool = True,
    label: str | None = None,
    label_map: Mapping[str, str] | None = None,
    layer: str | None = None,
    use_raw: bool = False,
    gene_column: str | None = None,
    input: Expected = "auto",  # noqa: A002  (the name users know)
    obs_query: str | None = None,
    rows: ArrayLike | None = None,
    pool: Pool = "flatten",
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int | None = None,
    backend: str | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Annotated:
    """Annotate the cells of files: labels, their probabilities, and the embedding, in a store.

    Parameters
    ----------
    inputs, layer, use_raw, gene_column, input, obs_query, rows, pool, dtype, batch_size, backend, \
device, overwrite, progress
        As in `embed`.
    model
        A `CellPatchAnnotator`, its directory, or its name on the Hugging Face hub.
    output
        The store to make: an AnnData Zarr store with ``obs["cellpatch_label"]``,
        ``obs["cellpatch_probability"]``, ``obsm["cellpatch_probabilities"]`` [cells, classes] (in
        the order of the label's categories) and ``obsm["X_cellpatch"]``.
    threshold
        A cell whose label has a lower probability is ``"unknown"``.
    embedding
        Store the embedding too.
    label
        Column of obs with true labels, to compare with. Those that are not among the model's
        classes are warned of and have a row in the evaluation's table of truth x prediction.
    label_map
        What labels are called in the model, ``{name in obs: class}``, where the names differ;
        several may be one class. Others stay as they are.

    Returns
    -------
    Annotated
        Counts, speed, and the agreement with ``label``.

    Raises
    ------
    InputError, OSError
        As `embed`; or if the model is no annotator.
    """
    if label is not None:
        require_analysis()
    elif label_map is not None:
        raise InputError("a label map renames true labels: name their column with --label (label=)")
    reading = Reading(layer=layer, use_raw=use_raw, gene_column=gene_column, input=input)
    selection = Selection(obs_query, rows)
    warn_of_unfinished(model)
    embedder = Embedder(
        model,
        pooling=pool,
        batch_size=batch_size,
        backend=backend,
        device=device,
        annotate=True,
    )
    assert embedder.annotator is not None
    classes = embedder.annotator.classes
    require_threshold(threshold, classes, compared=label is not None)
    truth: list[np.ndarray] = []

    def add_labels(writer: EmbeddingWriter) -> None:
        writer.add_columns(_labels(writer, classes, threshold))

    def read_truth(tables: Sequence[Table], names: Sequence[str]) -> None:
        if label is not None:
            truth.append(true_labels(tables, names, label, label_map, classes))

    widths = {PROBABILITIES: len(classes)} | ({KEY: embedder.width} if embedding else {})
    extras = {
        "head": fingerprint(embedder.annotator, whole=True),
        "classes": list(classes),
        "threshold": threshold,
        "embedding": embedding,
    }
    summary = make_store(
        inputs,
        embedder,
        output,
        reading=reading,
        selection=selection,
        widths=widths,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
        extras=extras,
        begin=read_truth,
        finish=add_labels,
    )
    return _annotated(summary, classes, truth[0] if truth else None)


def _annotated(summary: Summary, classes: Sequence[str], truth: np.ndarray | None) -> Annotated:
    """What a finished store says."""
    import zarr
    from anndata.io import read_elem

    labels = read_elem(zarr.open_group(summary.output, mode="r")[f"obs/{LABEL}"])
    counts = labels.value_counts().sort_values(ascending=False, kind="stable")
    cells = {str(name): int(count) for name, count in counts.items() if count}
    evaluation = None if truth is None else evaluate(truth, np.asarray(labels), classes)
    return Annotated(summary, cells, evaluation)


def _labels(writer: EmbeddingWriter, classes: Sequence[str], threshold: float) -> dict[str, Any]:
    """Columns of obs from the probabilities in a store, a part at a time."""

    codes = np.empty(writer.rows, np.int32)
    highest = np.empty(writer.rows, np.float32)
    for start in range(0, writer.rows, READ_ROWS):
        stop = min(start + READ_ROWS, writer.rows)
        codes[start:stop], highest[start:stop] = most_likely(
            writer.read(PROBABILITIES, start, stop), threshold
        )
    return {LABEL: label_column(codes, classes), PROBABILITY: highest}
