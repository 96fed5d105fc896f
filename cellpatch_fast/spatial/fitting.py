"""Trains a network on a tissue, one step of Adam per epoch, over one piece or many.

The loss is the mean squared error over all spots and genes. Gradients of pieces are summed before
the step, so tiles change the result by rounding only. Random numbers (dropout of attention weights,
where the encoder is trained) are a function of (seed, epoch, piece), and everything is
deterministic on a CPU: a run that goes on from a checkpoint ends with the bits of an uninterrupted
one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..devices import memory_errors
from ..errors import InputError
from ..progress import progress_bar
from ..training.repeating import step_seed
from .features import PatchFeatures
from .settings import SpatialSettings
from .stagate import Piece, Stagate

logger = logging.getLogger("cellpatch_fast")


class Fit:
    """A network, its optimiser, and how far it has come.

    Parameters
    ----------
    network
        What is trained.
    encoder
        Makes features of a piece's cells, trained too; None where features are in the pieces, or
        there are none.
    settings
        How.
    """

    def __init__(
        self, network: Stagate, encoder: PatchFeatures | None, settings: SpatialSettings
    ) -> None:
        self.network, self.encoder, self.settings = network, encoder, settings
        self.losses: list[float] = []  # of each epoch
        modules = nn.ModuleList([network] if encoder is None else [network, encoder])
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        # one after the other: matrices that share memory are stepped twice, see `Tie`
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay,
            foreach=False, fused=settings.tie == "true",
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.network.hidden_weight.device

    def run(self, pieces: Sequence[Piece], *, progress: bool | None = None) -> None:
        """Train until the last epoch; call `step` for one.

        Raises
        ------
        InputError
            If the loss is not finite.
        """
        spots, epochs = sum(piece.core for piece in pieces), self.settings.epochs
        done = len(self.losses)
        with progress_bar(epochs * spots, "STAGATE", progress, done=done * spots) as bar:
            for _ in range(done, epochs):
                bar.set_postfix(loss=f"{self.step(pieces):.4f}", refresh=False)
                bar.update(spots)

    def step(self, pieces: Sequence[Piece]) -> float:
        """One epoch; returns its loss."""
        epoch, genes = len(self.losses), self.network.config.genes
        spots = sum(piece.core for piece in pieces)
        self.optimizer.zero_grad()
        total = 0.0
        with memory_errors():
            for number, piece in enumerate(pieces):
                torch.manual_seed(step_seed(self.settings.seed, epoch, number))
                error = self.network.squared_error(self._with_features(piece, number))
                (error / (spots * genes)).backward()
                total += float(error.detach())
        loss = total / (spots * genes)
        norm = float(
            nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"the loss is {loss} and its gradient's norm {norm} in epoch {epoch + 1}: the step "
                "was not taken. A lower learning_rate often helps"
            )
        if self.settings.gradient_clip:
            clip = torch.tensor(norm, device=self.device)
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.gradient_clip, clip)
        self.optimizer.step()
        self.losses.append(loss)
        return loss

    def embed(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Embedding of all pieces' cores, one after the other: float32 [spots, output]."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            rows = [
                self.network.embed(self._with_features(piece, number))[: piece.core].cpu().numpy()
                for number, piece in enumerate(pieces)
            ]
        return np.concatenate(rows)

    def _with_features(self, piece: Piece, number: int) -> Piece:
        piece = piece.to(self.device)
        if self.encoder is None:
            return piece
        return piece._replace(features=self.encoder(number))
