"""From a stream of cells to embeddings: what `tl.embed` and `atlas.embed` share."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .errors import InputError
from .kernels import resolve_backend
from .loader import MAX_CELLS, read_ahead
from .model import CellPatch
from .model.encoder import pool

if TYPE_CHECKING:
    from .loader import CellStream
    from .model.encoder import Pool


@dataclass(frozen=True, eq=False)
class EmbeddedBlock:
    """Embeddings of consecutive cells.

    ``rows`` is float32 [cells, width], ``start`` the position of the first cell in its source;
    the counts are those of `loader.TokenBlock`.
    """

    start: int
    rows: np.ndarray
    unknown_entries: int
    empty_cells: int


class Embedder:
    """A model and how to run it.

    Parameters
    ----------
    model
        A model, a model directory, or the name of a model on the Hugging Face hub.
    pooling
        ``"flatten"`` or ``"mean"``, see `model.encoder.pool`.
    batch_size
        Cells per batch at most; None for a size that bounds memory. It changes no result.
    backend, device
        See `kernels.encode` and ``torch.device``; None for the fastest backend and for the
        device that the model is on.
    """

    def __init__(
        self,
        model: CellPatch | str | Path,
        *,
        pooling: Pool = "flatten",
        batch_size: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if pooling not in ("flatten", "mean"):
            raise InputError(f"unknown pooling {pooling!r}: choose flatten or mean")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"the batch size must be at least 1, found {batch_size}")
        if not isinstance(model, CellPatch):
            model = CellPatch.from_pretrained(model)
        if device is not None and torch.device(device).type != _device_of(model).type:
            try:
                model = copy.deepcopy(model).to(device)  # the caller's stays where it is
            except (RuntimeError, AssertionError) as error:
                raise InputError(f"cannot use device {device}: {error}") from error
        self.model = model
        self.pooling = pooling
        self.backend = self._resolved(backend)
        self._max_cells = batch_size or MAX_CELLS

    @property
    def width(self) -> int:
        """Numbers per cell."""
        config = self.model.config
        return config.output_dim * (config.patches if self.pooling == "flatten" else 1)

    def run(self, parts: Iterable[tuple[CellStream, int, int]]) -> Iterator[EmbeddedBlock]:
        """Embed the cells of ``(stream, start, stop)`` parts, in order."""
        device = _device_of(self.model)
        blocks = read_ahead(parts, max_cells=self._max_cells)
        with contextlib.closing(blocks), _evaluating(self.model):
            for block in blocks:
                with torch.inference_mode():
                    features = self.model.encode(block.cells.to(device), backend=self.backend)
                    rows = pool(features, self.pooling).float().cpu().numpy()
                yield EmbeddedBlock(block.start, rows, block.unknown_entries, block.empty_cells)

    def _resolved(self, backend: str | None) -> str:
        try:
            return resolve_backend(backend, _device_of(self.model))
        except ValueError as error:
            raise InputError(str(error)) from error


@contextlib.contextmanager
def _evaluating(model: CellPatch) -> Iterator[None]:
    """No dropout meanwhile."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _device_of(model: CellPatch) -> torch.device:
    return model.patches.device
