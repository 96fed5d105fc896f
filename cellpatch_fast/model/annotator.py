"""CellPatchAnnotator: an encoder with a head that tells cell types.

The head is the paper's: the patch features side by side, two hidden layers, one number per class.
Where the encoder projects its features (to 10 numbers per patch), the original's annotator expands
them again before; an annotator that is made from an encoder leaves the projection out instead, as
the paper describes it: nothing is squeezed through 10 numbers on its way to the classes.

It may have a linear path beside the patches, see `linear`; then its probabilities are a mixture.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cells import RaggedCells
from ..config import CellPatchConfig, ValueRounding
from ..errors import InputError
from .encoder import CellPatch, draw_weights
from .linear import LinearPath
from .storage import CLASSES, parts_of

if TYPE_CHECKING:
    from ..genes import GeneVocabulary

HIDDEN = 512, 100  # units of the hidden layers
BLOCK_CELLS = (
    64  # that the head sees at a time; blocks of 16 took 6 times as long, of 256 0.8 times
)


class Head(nn.Module):
    """Patch features [cells, patches, output_dim] to logits [cells, classes]."""

    def __init__(self, config: CellPatchConfig, classes: int) -> None:
        super().__init__()
        self.expansion: nn.Linear | None = None
        if config.projection_dim is not None:
            self.expansion = nn.Linear(config.projection_dim, config.dim)
            self.expansion_norm = nn.LayerNorm(config.dim)
        self.first = nn.Linear(config.patches * config.dim, HIDDEN[0])
        self.second = nn.Linear(*HIDDEN)
        self.output = nn.Linear(HIDDEN[1], classes)
        self._dropout = config.head_dropout

    def forward(self, features: Tensor) -> Tensor:
        x = features  # [c, p, E]
        if self.expansion is not None:
            x = self.expansion_norm(self.expansion(x))
        x = F.dropout(F.relu(self.first(x.flatten(1))), self._dropout, self.training)
        x = F.dropout(F.relu(self.second(x)), self._dropout, self.training)
        logits: Tensor = self.output(x)
        return logits


class CellPatchAnnotator(CellPatch):
    """A CellPatch encoder with a head that annotates cells.

    Parameters
    ----------
    config, vocabulary
        As of `CellPatch`.
    classes
        Names of the classes, in the order of the logits.
    linear
        Whether it has a linear path.

    Raises
    ------
    InputError
        If there are fewer than two classes, or two of the same name.

    Examples
    --------
    >>> model = CellPatchAnnotator.from_pretrained("annotator/")  # doctest: +SKIP
    >>> cellpatch_fast.tl.annotate(adata, model)  # doctest: +SKIP
    """

    _own_parts = ("head.", "linear.")
    _extra_files = (CLASSES,)

    def __init__(
        self,
        config: CellPatchConfig,
        vocabulary: GeneVocabulary,
        classes: Sequence[str],
        linear: bool = False,
    ) -> None:
        super().__init__(config, vocabulary)
        self.classes = tuple(map(str, classes))
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise InputError(
                "an annotator needs two classes at least, each with a name of its own; found "
                f"{', '.join(self.classes) or 'none'}"
            )
        self.head = Head(config, len(self.classes))
        draw_weights(self.head)
        self.linear: LinearPath | None = None
        if linear:
            self.linear = LinearPath(config.max_genes, len(self.classes))

    @classmethod
    def from_encoder(  # type: ignore[override]
        cls, encoder: CellPatch, classes: Sequence[str], linear: bool = False
    ) -> Self:
        """An annotator with the weights of an encoder, without its projection, and a new head."""
        config = dataclasses.replace(encoder.config, projection_dim=None, temperature=1.0)
        model = cls(config, encoder.vocabulary, classes, linear)
        state = encoder.encoder_state()
        kept = {name: t for name, t in state.items() if not name.startswith("projection.")}
        model.load_state_dict(kept, strict=False)
        return model.to(encoder.patches.device, encoder.patches.dtype)

    @classmethod
    def from_original(  # type: ignore[override]
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        args: str | os.PathLike[str] | Mapping[str, Any],
        vocabulary: str | os.PathLike[str] | GeneVocabulary,
        classes: Sequence[str],
        value_rounding: ValueRounding = "truncate",
        padded_length: int | None = None,
    ) -> CellPatchAnnotator:
        """The annotator of a ``PathFormer_lp`` checkpoint of the original code.

        Parameters
        ----------
        checkpoint, args, vocabulary, value_rounding, padded_length
            As of `CellPatch.from_original`.
        classes
            Names of the classes in the order of its outputs, which the checkpoint does not hold.

        Raises
        ------
        InputError
            As `CellPatch.from_original`, or if there are more or fewer classes than outputs.
        """
        from .original import import_checkpoint

        return import_checkpoint(
            cls,
            checkpoint,
            args=args,
            vocabulary=vocabulary,
            value_rounding=value_rounding,
            padded_length=padded_length,
            classes=classes,
        )

    def logits(self, cells: RaggedCells, *, backend: str | None = None) -> Tensor:
        """One number per cell and class, [cells, classes]: what the network is trained by.

        Raises
        ------
        InputError, ValueError
            As `CellPatch.encode`.
        """
        logits: Tensor = self.head(self.encode(cells, backend=backend))
        return logits

    @torch.inference_mode()
    def probabilities(self, cells: RaggedCells, features: Tensor) -> Tensor:
        """Probabilities of the classes, float32 [cells, classes], in evaluation mode.

        Those of the network, from logits divided by ``config.temperature``, or its mixture with
        the linear path.

        The head sees blocks of `BLOCK_CELLS` cells, filled up with zeros: a matrix product of
        another size may round otherwise, and a cell's probabilities shall not depend on how many
        others it came with. (They may depend on the number of threads.)

        Parameters
        ----------
        cells
            The cells.
        features
            Their patch features [cells, patches, output_dim], from `encode`.
        """
        blocks = [features.new_empty((0, len(self.classes)), dtype=torch.float32)]
        for block in features.split(BLOCK_CELLS):
            missing = BLOCK_CELLS - len(block)
            filled = F.pad(block, (0, 0, 0, 0, 0, missing)) if missing else block
            logits = self.head(filled)[: len(block)]
            blocks.append(torch.softmax(logits.float() / self.config.temperature, 1))
        network = torch.cat(blocks)
        return network if self.linear is None else self.linear.mixture(cells, network)

    forward = logits  # type: ignore[assignment]

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        (save_directory / CLASSES).write_text(json.dumps(self.classes, indent=1) + "\n")

    @classmethod
    def _read_extras(cls, directory: Path) -> dict[str, Any]:
        path = directory / CLASSES
        try:
            classes = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise InputError(f"{path} must hold a list of the classes' names")
        return {"classes": classes, "linear": "linear." in parts_of(directory)}
