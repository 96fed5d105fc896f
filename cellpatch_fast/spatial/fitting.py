"""Trains a network on a tissue, one step of Adam per epoch, over one piece or many.

The loss is the mean squared error over all spots and genes. Gradients of pieces are summed before
the step, so tiles change the result by rounding only. Random numbers (dropout of attention weights,
where the encoder is trained) are a function of (seed, epoch, piece), and everything is
deterministic on a CPU: a run that goes on from a checkpoint ends with the bits of an uninterrupted
one.
"""

from __future__ import annotations

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
from ..training.folder import EPOCHS, RunFolder
from ..training.repeating import step_seed
from .features import PatchFeatures
from .settings import SpatialSettings
from .stagate import Piece, Stagate

logger = logging.getLogger("cellpatch_fast")

CHECKPOINT_SECONDS = 120.0


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
    spots
        Of the whole tissue.
    """

    def __init__(
        self,
        network: Stagate,
        encoder: PatchFeatures | None,
        settings: SpatialSettings,
        *,
        spots: int,
    ) -> None:
        self.network, self.encoder, self.settings, self.spots = network, encoder, settings, spots
        self.losses: list[float] = []  # of each epoch
        self._modules = nn.ModuleList([network] if encoder is None else [network, encoder])
        self.parameters = [p for p in self._modules.parameters() if p.requires_grad]
        # one after the other: matrices that share memory are stepped twice, see `Tie`
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay,
            foreach=False, fused=settings.tie == "true",
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.network.hidden_weight.device

    def run(
        self,
        pieces: Sequence[Piece],
        *,
        run: RunFolder | None = None,
        progress: bool | None = None,
    ) -> None:
        """Train until the last epoch.

        Parameters
        ----------
        pieces
            Of the whole tissue.
        run
            Goes on from the checkpoint in this folder, and keeps it up to date; None keeps nothing.

        Raises
        ------
        InputError
            If the loss is not finite, or a checkpoint does not fit.
        """
        epochs = self.settings.epochs
        if run is not None and run.checkpoint is not None:
            self._restore(run.checkpoint)
        if len(self.losses) > epochs:
            raise InputError(
                f"{len(self.losses):,} epochs are done, more than epochs={epochs}: ask for as many "
                "or more, or begin anew with --overwrite (overwrite=True)"
            )
        saved = time.perf_counter()
        done = len(self.losses) * self.spots
        with progress_bar(epochs * self.spots, "STAGATE", progress, done=done) as bar:
            while len(self.losses) < epochs:
                loss = self.step(pieces)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(self.spots)
                if run is None:
                    continue
                epoch = len(self.losses)
                run.add_row(EPOCHS, {"epoch": epoch, "step": epoch, "loss": loss})
                if epoch == epochs or time.perf_counter() - saved > CHECKPOINT_SECONDS:
                    run.save(self._checkpoint())
                    saved = time.perf_counter()

    def _checkpoint(self) -> dict[str, Any]:
        place = {"epoch": len(self.losses), "step": len(self.losses), "losses": list(self.losses)}
        return {
            "model": self._modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "place": place,
            "best": {},
            "threads": torch.get_num_threads(),
            "finished": len(self.losses) >= self.settings.epochs,
        }

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        try:
            self._modules.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.losses = [float(loss) for loss in checkpoint["place"]["losses"]]
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"the checkpoint of this run does not fit its network ({error}): begin anew with "
                "--overwrite (overwrite=True)"
            ) from error

    def step(self, pieces: Sequence[Piece]) -> float:
        """One epoch; returns its loss."""
        epoch, numbers = len(self.losses), self.spots * self.network.config.genes
        self.optimizer.zero_grad()
        total = 0.0
        with memory_errors():
            for number, piece in enumerate(pieces):
                torch.manual_seed(step_seed(self.settings.seed, epoch, number))
                error = self.network.squared_error(self._with_features(piece, number))
                (error / numbers).backward()
                total += float(error.detach())
        loss = total / numbers
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
        self._modules.eval()
        with torch.inference_mode():
            rows = [
                self.network.embed(self._with_features(piece, number))[: piece.core].cpu().numpy()
                for number, piece in enumerate(pieces)
            ]
        self._modules.train()
        return np.concatenate(rows)

    def _with_features(self, piece: Piece, number: int) -> Piece:
        piece = piece.to(self.device)
        if self.encoder is None:
            return piece
        return piece._replace(features=self.encoder(number))
