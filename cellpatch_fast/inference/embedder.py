"""From a stream of cells to embeddings: what `tl.embed` and `atlas.embed` share."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..config import Reading
from ..devices import default_device, memory_errors, usable_device
from ..errors import InputError
from ..kernels import resolve_backend, synchronize
from ..loading import CellLoader
from ..loading.inputs import Stream, open_stream
from ..model import CellPatch, CellPatchAnnotator, pool

if TYPE_CHECKING:
    from anndata import AnnData

    from ..cells import RaggedCells
    from ..model.encoder import Pool

MAX_CELLS = 8_192  # of a batch: its features take 20 MiB at the paper's sizes
MAX_ENTRIES = 1 << 22  # of a batch: 4 million take some 100 MB on their way to tokens
# The reference keeps some kilobytes for every entry, so its batches are smaller.
REFERENCE_CELLS, REFERENCE_ENTRIES = 512, 1 << 17


@dataclass(frozen=True, eq=False)
class EmbeddedCells:
    """Embeddings of some cells.

    Parameters
    ----------
    features
        float32 [cells, width].
    rows, entries, unknown_entries
        int64 [cells], see `loader.CellBatch`.
    probabilities
        float32 [cells, classes], where they were asked for.
    """

    features: np.ndarray
    rows: np.ndarray
    entries: np.ndarray
    unknown_entries: np.ndarray
    probabilities: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def slice(self, start: int, stop: int) -> EmbeddedCells:
        """The cells ``start : stop``."""
        part = slice(start, stop)
        return EmbeddedCells(
            features=self.features[part],
            rows=self.rows[part],
            entries=self.entries[part],
            unknown_entries=self.unknown_entries[part],
            probabilities=None if self.probabilities is None else self.probabilities[part],
        )


class Embedder:
    """A model and how to run it.

    Parameters
    ----------
    model
        A model, a model directory, or the name of a model on the Hugging Face hub.
    pooling
        ``"flatten"`` or ``"mean"``, see `model.encoder.pool`.
    batch_size
        Cells per batch at most; None for a size that bounds memory, which a batch's entries do
        in any case. It changes no result.
    backend, device
        See `kernels.encode` and ``torch.device``; None for the fastest backend, and for a GPU if
        there is one. A model that is an object already computes where it is.
    annotate
        Also tell the probabilities of the classes, which needs a `CellPatchAnnotator`.

    Raises
    ------
    InputError
        If the model cannot be loaded, or an option is not possible.
    """

    def __init__(
        self,
        model: CellPatch | str | Path,
        *,
        pooling: Pool = "flatten",
        batch_size: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        annotate: bool = False,
    ) -> None:
        if pooling not in ("flatten", "mean"):
            raise InputError(f"unknown pooling {pooling!r}: choose flatten or mean")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"the batch size must be at least 1, found {batch_size}")
        if device is None and not isinstance(model, CellPatch):
            device = default_device()
        target = None if device is None else usable_device(device)
        if not isinstance(model, CellPatch):
            model = (CellPatchAnnotator if annotate else CellPatch).from_pretrained(model)
        if annotate and not isinstance(model, CellPatchAnnotator):
            raise InputError(
                f"a {type(model).__name__} tells no classes: fine-tune it first (cellpatch "
                "finetune, cellpatch_fast.training.finetune)"
            )
        if target is not None and not _same(target, model.patches.device):
            model = copy.deepcopy(model).to(target)  # the caller's stays where it is
        self.model = model
        self.annotator = model if annotate and isinstance(model, CellPatchAnnotator) else None
        self.pooling = pooling
        try:
            self.backend = resolve_backend(backend, self.device)
        except ValueError as error:
            raise InputError(str(error)) from error
        on_reference = self.backend == "reference"
        self._max_cells = batch_size or (REFERENCE_CELLS if on_reference else MAX_CELLS)
        self._max_entries = REFERENCE_ENTRIES if on_reference else MAX_ENTRIES

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.patches.device

    @property
    def width(self) -> int:
        """Numbers per cell."""
        config = self.model.config
        return config.output_dim * (config.patches if self.pooling == "flatten" else 1)

    def open(self, data: str | Path | AnnData, reading: Reading = Reading()) -> Stream:
        """Cells, prepared for the model; see `loading.inputs.open_stream`."""
        return open_stream(data, self.model.vocabulary, self.model.config, reading)

    def run(
        self,
        streams: Sequence[Stream],
        rows: Sequence[tuple[int, int]] | np.ndarray | None = None,
    ) -> Generator[EmbeddedCells]:
        """Embed the cells of ``streams``, in order.

        Close the iterator to stop before the end.

        Parameters
        ----------
        rows
            Which of them, see `CellLoader`: positions, or ranges ``(start, stop)``; None for all.

        Raises
        ------
        MemoryError
            If a batch needs more memory than there is.
        """
        loader = CellLoader(
            streams,
            batch_size=self._max_cells,
            max_entries=self._max_entries,
            rows=rows,
            device=self.device,
        )
        with contextlib.closing(iter(loader)) as batches, _evaluating(self.model):
            for batch in batches:
                with torch.inference_mode(), memory_errors():
                    features, probabilities = self._compute(batch.cells)
                    pooled = features.flatten(1).float().cpu().numpy()
                    if self.device.type == "cuda" and self.backend == "triton":
                        synchronize(self.device)
                yield EmbeddedCells(
                    features=pooled,
                    rows=batch.rows,
                    entries=batch.entries,
                    unknown_entries=batch.unknown_entries,
                    probabilities=probabilities,
                )

    def _compute(self, cells: RaggedCells) -> tuple[Tensor, np.ndarray | None]:
        """Pooled features, and probabilities of an annotator."""
        mean = self.pooling == "mean"
        if self.annotator is None:
            return self.model.encode(cells, mean=mean, backend=self.backend), None
        features = self.annotator.encode(cells, backend=self.backend)
        probabilities = self.annotator.probabilities(cells, features).cpu().numpy()
        return pool(features, self.pooling), probabilities


def _same(device: torch.device, other: torch.device) -> bool:
    """Whether they are one device; without an index, ``device`` is any of its type."""
    return device.type == other.type and device.index in (None, other.index)


@contextlib.contextmanager
def _evaluating(model: CellPatch) -> Iterator[None]:
    """No dropout meanwhile."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
