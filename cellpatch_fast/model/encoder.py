"""CellPatch: the encoder as a PyTorch module.

The module holds parameters and says what fits them; the computing is done by
`cellpatch_fast.kernels`, which sees plain tensors. Three decisions live here:

- Which backend runs: the fastest one for the device, in training too. Only float64, and
  attention weights where gradients are recorded, are left to the reference.
- The attention layers are `torch.nn.MultiheadAttention`, as containers only: their parameters
  have the names and the layout that every PyTorch user knows, their forward is never called.
- What goes into a kernel is checked first: a kernel reads table rows at the addresses that gene
  tokens name. On a GPU that would mean waiting for it before every batch, so there the kernels
  check what they read themselves, and what they find is raised by the next call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from .. import kernels
from ..cells import RaggedCells
from ..config import CellPatchConfig, ValueRounding
from ..errors import InputError
from ..kernels import BlockWeights, Encoded, EncoderWeights, reference
from ..kernels.checks import integer_range
from .storage import StoredModel

if TYPE_CHECKING:
    from ..genes import GeneVocabulary

Pool = Literal["flatten", "mean"]


class CellPatch(StoredModel):
    """A CellPatch encoder: ragged cells in, patch features out.

    A new model has random weights: Xavier uniform matrices, N(0, 1) gene embedding and patches,
    as the original. Its parameters may be moved and cast as those of any module
    (``model.double()``, ``model.to("cuda")``); cells must be on the same device.

    Parameters
    ----------
    config
        Architecture and preprocessing.
    vocabulary
        Which gene each row of the gene embedding stands for.

    Raises
    ------
    InputError
        If the vocabulary has more gene tokens than ``config.max_genes``.
    """

    def __init__(self, config: CellPatchConfig, vocabulary: GeneVocabulary) -> None:
        super().__init__()
        if vocabulary.size > config.max_genes:
            raise InputError(
                f"the vocabulary has gene tokens up to {vocabulary.size - 1}, but the model's "
                f"gene embedding has {config.max_genes} rows (max_genes): it needs a model with "
                f"max_genes of at least {vocabulary.size}"
            )
        self.config = config
        self.vocabulary = vocabulary
        self.gene_embedding = nn.Embedding(config.max_genes, config.dim)
        self.value_embedding: nn.Linear | nn.Embedding
        if config.value_embedding == "affine":
            self.value_embedding = nn.Linear(1, config.dim)
        else:
            self.value_embedding = nn.Embedding(config.value_bins, config.dim)
        self.patches = nn.Parameter(torch.empty(config.patches, config.dim))
        self.cross_block = Block(config)
        self.self_blocks = nn.ModuleList(Block(config) for _ in range(config.self_attention_blocks))
        self.projection: nn.Linear | None = None
        if config.projection_dim is not None:
            self.projection = nn.Linear(config.dim, config.projection_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new random weights from PyTorch's global generator."""
        nn.init.normal_(self.patches)
        draw_weights(self)

    @classmethod
    def from_original(
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        args: str | os.PathLike[str] | Mapping[str, Any],
        vocabulary: str | os.PathLike[str] | GeneVocabulary,
        value_rounding: ValueRounding = "truncate",
        padded_length: int | None = None,
    ) -> Self:
        """The encoder (or all of a `MaskedGeneModel`) of a checkpoint of the original code.

        Parameters
        ----------
        checkpoint
            The ``.pth`` file: a state dict, or ``{"model_state_dict": state dict}``.
        args
            The training run's arguments: their JSON file, or a mapping.
        vocabulary
            ``gene2tok.json``, or a vocabulary with the same tokens.
        value_rounding
            How values became integers when the model was trained; the released code truncates.
        padded_length
            See `CellPatchConfig`: the length that cells were padded to in training, for a model
            that shall attend to padding as it did then.

        Returns
        -------
        Self
            In evaluation mode. A log line says how many tensors were left out: decoder and
            annotation head are not part of an encoder.

        Raises
        ------
        InputError
            If a file is missing or malformed, the checkpoint holds pickled code (which is not
            run), or its tensors are not those that ``args`` describe (all are listed).
        """
        from .original import import_checkpoint

        return import_checkpoint(
            cls,
            checkpoint,
            args=args,
            vocabulary=vocabulary,
            value_rounding=value_rounding,
            padded_length=padded_length,
        )

    @classmethod
    def from_encoder(cls, encoder: CellPatch) -> Self:
        """A model with the weights of an encoder; what it has besides an encoder is new."""
        model = cls(encoder.config, encoder.vocabulary)
        model.load_state_dict(encoder.encoder_state(), strict=False)
        return model.to(encoder.patches.device, encoder.patches.dtype)

    def encode(
        self, cells: RaggedCells, *, mean: bool = False, backend: str | None = None
    ) -> Tensor:
        """Patch features of cells.

        Parameters
        ----------
        cells
            Gene tokens of the model's vocabulary, values prepared as its config says.
        mean
            Average the features over the patches.
        backend
            ``"reference"``, ``"numba"`` or ``"triton"``; None for the fastest that can do the
            job. Only the reference computes in fp64. Triton's tables have the parameters' dtype,
            or that of `torch.autocast` where it is on.

        Returns
        -------
        Tensor
            [cells, patches, output_dim], or [cells, output_dim] with ``mean``, in the parameters'
            dtype.

        Raises
        ------
        InputError
            If the cells do not fit the model: gene tokens beyond the table, values that a
            binned embedding has no bin for, another device. On a GPU, tokens and bins are not
            waited for: the next call raises a ValueError, or ``kernels.synchronize()``.
        ValueError
            If ``backend`` is unknown or cannot do the job.
        """
        return self._run(cells, mean=mean, backend=backend).features

    def encode_with_attention(self, cells: RaggedCells, *, backend: str | None = None) -> Encoded:
        """As `encode`, with the attention weights of every block.

        Returns
        -------
        Encoded
            ``features`` [cells, patches, output_dim], ``cross_attention`` [entries, heads,
            patches], ``pad_attention`` [cells, heads, patches], and ``self_attention``, one
            [cells, heads, patches, patches] per block.
        """
        return self._run(cells, attention=True, backend=backend)

    forward = encode

    def encoder_state(self) -> dict[str, Tensor]:
        """The state dict without what a subclass adds to the encoder."""
        return {n: t for n, t in self.state_dict().items() if not n.startswith(self._own_parts)}

    def encoder_weights(self) -> EncoderWeights:
        """The parameters as the kernels take them: the same tensors, no copies."""
        return gather_weights(
            lambda name: attrgetter(name)(self),
            heads=self.config.heads,
            self_blocks=self.config.self_attention_blocks,
            binned=self.config.value_embedding == "binned",
            projected=self.projection is not None,
        )

    def pads_of(self, cells: RaggedCells) -> Tensor | None:
        """Padding tokens that each cell attends to besides its entries, [cells]; None for none."""
        if self.config.padded_length is None:
            return None
        # a cell longer than the padded length has no pads; it is not cut
        return (self.config.padded_length - cells.lengths).clamp(min=0)

    def _run(
        self,
        cells: RaggedCells,
        *,
        backend: str | None,
        attention: bool = False,
        mean: bool = False,
    ) -> Encoded:
        return run_encoder(
            self.encoder_weights(),
            cells,
            pads=self.pads_of(cells),
            attention=attention,
            mean=mean,
            dropout=self.config.attention_dropout if self.training else 0.0,
            backend=backend,
        )


class Block(nn.Module):
    """Parameters of one post-norm block: attention, norm, MLP, norm."""

    def __init__(self, config: CellPatchConfig) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            config.dim, config.heads, dropout=config.attention_dropout, batch_first=True
        )
        self.attention_norm = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.mlp_dim), nn.GELU(), nn.Linear(config.mlp_dim, config.dim)
        )
        self.mlp_norm = nn.LayerNorm(config.dim)


def draw_weights(model: nn.Module) -> None:
    """New random weights for the layers in ``model``: Xavier uniform, embeddings N(0, 1)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):  # attention's output projections too
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)


def pool(features: Tensor, how: Pool) -> Tensor:
    """One vector per cell from its patch features [cells, patches, E].

    Parameters
    ----------
    features
        What `CellPatch.encode` returns.
    how
        ``"flatten"``: the patches side by side, [cells, patches · E]. ``"mean"``: their mean,
        [cells, E].
    """
    if how == "flatten":
        return features.flatten(1)
    if how == "mean":
        return reference.mean_over_patches(features)
    raise ValueError(f"unknown pooling {how!r}: choose from {', '.join(get_args(Pool))}")


def gather_weights(
    tensor: Callable[[str], Tensor],
    *,
    heads: int,
    self_blocks: int,
    binned: bool,
    projected: bool,
) -> EncoderWeights:
    """The kernels' view of an encoder whose parameters are looked up by `CellPatch`'s names."""
    return EncoderWeights(
        heads=heads,
        genes=tensor("gene_embedding.weight"),
        patches=tensor("patches"),
        cross=block_weights(tensor, "cross_block"),
        self_blocks=tuple(block_weights(tensor, f"self_blocks.{i}") for i in range(self_blocks)),
        value_weight=None if binned else tensor("value_embedding.weight")[:, 0],
        value_bias=None if binned else tensor("value_embedding.bias"),
        value_bins=tensor("value_embedding.weight") if binned else None,
        projection_weight=tensor("projection.weight") if projected else None,
        projection_bias=tensor("projection.bias") if projected else None,
    )


def block_weights(tensor: Callable[[str], Tensor], name: str) -> BlockWeights:
    """The kernels' view of the `Block` called ``name``, its parameters looked up by ``tensor``."""
    return BlockWeights(
        in_weight=tensor(f"{name}.attention.in_proj_weight"),
        in_bias=tensor(f"{name}.attention.in_proj_bias"),
        out_weight=tensor(f"{name}.attention.out_proj.weight"),
        out_bias=tensor(f"{name}.attention.out_proj.bias"),
        attention_norm_weight=tensor(f"{name}.attention_norm.weight"),
        attention_norm_bias=tensor(f"{name}.attention_norm.bias"),
        up_weight=tensor(f"{name}.mlp.0.weight"),
        up_bias=tensor(f"{name}.mlp.0.bias"),
        down_weight=tensor(f"{name}.mlp.2.weight"),
        down_bias=tensor(f"{name}.mlp.2.bias"),
        mlp_norm_weight=tensor(f"{name}.mlp_norm.weight"),
        mlp_norm_bias=tensor(f"{name}.mlp_norm.bias"),
    )


def run_encoder(
    weights: EncoderWeights,
    cells: RaggedCells,
    *,
    pads: Tensor | None,
    dropout: float,
    backend: str | None,
    attention: bool = False,
    mean: bool = False,
) -> Encoded:
    """Check the cells and run them on the backend that can do the job.

    Parameters
    ----------
    pads
        Padding tokens that each cell attends to, [cells]; None for none.
    dropout
        Probability of dropping an attention weight: 0 in evaluation.
    attention, mean
        See `kernels.encode`.
    """
    arguments = (weights, cells.offsets, cells.genes, cells.values)
    dtype = weights.patches.dtype
    if backend is None and dtype == torch.float64:
        backend = "reference"  # the others compute in float32
    _check_cells(weights, cells, kernels.resolve_backend(backend, cells.device))
    encoded = kernels.encode(
        *arguments, pads=pads, attention=attention, mean=mean, dropout=dropout, backend=backend
    )
    return _cast(encoded, dtype)


def _cast(encoded: Encoded, dtype: torch.dtype) -> Encoded:
    """Results in ``dtype``."""
    if encoded.features.dtype == dtype:
        return encoded
    features, cross, pad, blocks = encoded
    return Encoded(
        features.to(dtype),
        None if cross is None else cross.to(dtype),
        None if pad is None else pad.to(dtype),
        None if blocks is None else tuple(block.to(dtype) for block in blocks),
    )


def _check_cells(weights: EncoderWeights, cells: RaggedCells, backend: kernels.Backend) -> None:
    """One pass over the tokens (and the bins), so that no kernel reads beyond a table."""
    device = weights.patches.device
    if cells.device != device:
        raise InputError(
            f"the cells are on {cells.device}, the model on {device}: "
            "move one of them with .to(device)"
        )
    if weights.value_bins is not None and cells.values.dtype != torch.uint8:
        raise InputError(
            f"the model embeds binned values (uint8), but the cells have {cells.values.dtype}: "
            "prepare them with value_rounding 'round' or 'truncate'"
        )
    if torch.compiler.is_compiling():
        return  # while tracing there are no contents; the operators check what they are given
    if backend == "triton" and cells.device.type == "cuda":
        return  # the kernels check the rest; see kernels.gpu.faults
    cells.validate()
    lowest, highest = integer_range(cells.genes)
    if lowest < 0 or highest >= len(weights.genes):
        raise InputError(
            f"the cells have gene tokens from {lowest} to {highest}, but the model's gene "
            f"embedding holds tokens 0 to {len(weights.genes) - 1}: were they made with another "
            "vocabulary?"
        )
    if weights.value_bins is None:
        return
    highest = integer_range(cells.values)[1]
    if highest >= len(weights.value_bins):
        raise InputError(
            f"the cells have values up to {highest}, but the model has bins 0 to "
            f"{len(weights.value_bins) - 1}: clip the values as its config says"
        )
