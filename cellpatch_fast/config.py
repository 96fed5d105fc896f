"""CellPatchConfig: every choice that makes a model what it is, with the paper's numbers;
Preprocessing: those of them that turn counts into values. Reading: which matrix of an input is
read, and as what; Masking: how much of a cell pretraining hides.

The configuration holds the architecture *and* the preprocessing, because weights are only
meaningful together with the way values were prepared for them. It is what ``config.json`` in a
model directory holds.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import InputError

FORMAT_VERSION = 1

ValueEmbedding = Literal["affine", "binned"]
ValueRounding = Literal["round", "truncate", "none"]
Expected = Literal["auto", "counts", "lognorm"]
Backend = Literal["reference", "numba", "triton"]


@dataclass(frozen=True)
class CellPatchConfig:
    """Architecture and preprocessing of a CellPatch model.

    Parameters
    ----------
    max_genes
        Rows of the gene embedding: the largest gene token plus one. Token 0 is padding.
    patches, dim, heads, mlp_dim
        Learned patch tokens, their width, attention heads, width inside the MLPs.
    self_attention_blocks
        Self-attention blocks after the one cross-attention block.
    projection_dim
        Width of the final linear projection; None for no projection.
    value_embedding
        ``"affine"``: e(v) = v·w + b (the released model). ``"binned"``: e(v) = E[bin(v)], a
        table of ``value_bins`` rows (the paper's text); needs discrete values.
    value_bins
        Number of bins: values are 0 .. value_bins - 1.
    attention_dropout
        Dropout on the attention weights while training (0.1 in the original).
    padded_length
        The original code attends to its padding. A model trained that way may be run with
        the padding of a fixed length L: a cell with n genes gets (L - n) times the weight of
        token (gene 0, value 0). None: no padding.
    decoder_self_attention_blocks, decoder_dropout
        Of the decoder (pretraining): self-attention blocks among the genes to predict, and dropout
        before its last layer.
    head_dropout
        Dropout in the annotation head.
    temperature
        What the annotation head's logits are divided by before they become probabilities: found
        on validation cells, so that a probability is how often it is right.
    target_sum, value_clip, value_rounding
        Library size after normalisation; largest value after log1p (None: no clipping); how
        values become integers. ``"truncate"`` is what the released code does, ``"none"``
        leaves them continuous.
    """

    max_genes: int = 70_000
    patches: int = 64
    dim: int = 32
    heads: int = 2
    mlp_dim: int = 64
    self_attention_blocks: int = 2
    projection_dim: int | None = 10
    value_embedding: ValueEmbedding = "affine"
    value_bins: int = 6
    attention_dropout: float = 0.1
    padded_length: int | None = None
    decoder_self_attention_blocks: int = 1
    decoder_dropout: float = 0.1
    head_dropout: float = 0.1
    temperature: float = 1.0
    target_sum: float = 1e4
    value_clip: float | None = 5.0
    value_rounding: ValueRounding = "round"

    def __post_init__(self) -> None:
        for name in ("max_genes", "patches", "dim", "heads", "mlp_dim", "value_bins"):
            _require_integer(name, getattr(self, name), 1)
        for name in ("self_attention_blocks", "decoder_self_attention_blocks"):
            _require_integer(name, getattr(self, name), 0)
        if self.projection_dim is not None:
            _require_integer("projection_dim", self.projection_dim, 1)
        if self.padded_length is not None:
            _require_integer("padded_length", self.padded_length, 0)
        if self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        for name in ("attention_dropout", "decoder_dropout", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1): {getattr(self, name)}")
        if self.value_embedding not in get_args(ValueEmbedding):
            raise ValueError(f"value_embedding must be affine or binned: {self.value_embedding!r}")
        if self.value_rounding not in get_args(ValueRounding):
            raise ValueError(
                f"value_rounding must be round, truncate or none: {self.value_rounding!r}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite: {self.temperature}")
        if not 0 < self.target_sum < math.inf:
            raise ValueError(f"target_sum must be positive and finite: {self.target_sum}")
        if self.value_clip is not None and not 0 < self.value_clip < math.inf:
            raise ValueError(f"value_clip must be positive and finite: {self.value_clip}")
        if self.value_rounding != "none" and not 0 < (self.value_clip or 256) <= 255:
            raise ValueError("discrete values need a value_clip of at most 255: they are uint8")
        if self.value_embedding == "binned" and self.value_bins <= self._largest_value():
            raise ValueError(
                f"a binned value embedding needs discrete values below value_bins "
                f"({self.value_bins}); they are rounded by {self.value_rounding!r} and clipped "
                f"at {self.value_clip}"
            )

    def _largest_value(self) -> float:
        """The largest value that preprocessing makes."""
        if self.value_rounding == "none" or self.value_clip is None:
            return math.inf
        if self.value_rounding == "truncate":
            return int(self.value_clip)
        return round(self.value_clip)

    @classmethod
    def for_few_cells(cls, **changes: Any) -> CellPatchConfig:
        """For a new model that some hundred or thousand cells are all that it is trained on.

        Values are not rounded, and no attention weights are dropped: hiding genes in training
        serves the same end. (Neither made a clear difference on 700 cells; the settings of
        training did.)
        """
        fields = {"value_rounding": "none", "value_clip": None, "attention_dropout": 0.0}
        return cls(**fields | changes)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def output_dim(self) -> int:
        """Width of a patch feature: projection_dim, or dim without projection."""
        return self.dim if self.projection_dim is None else self.projection_dim

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CellPatchConfig:
        """The inverse of `to_dict`.

        Raises
        ------
        ValueError
            If the format is newer than this package, or fields are unknown or wrong.
        """
        fields = dict(fields)
        version = fields.pop("format_version", None)
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"model format version {version!r} is not supported (this package reads up to "
                f"{FORMAT_VERSION}): install a newer cellpatch-fast"
            )
        unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown configuration fields: {', '.join(sorted(unknown))}")
        return cls(**fields)


def _require_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, found {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, found {value}")


@dataclass(frozen=True)
class Preprocessing:
    """How counts become values.

    Parameters
    ----------
    target_sum
        Library size after normalisation.
    value_clip
        Largest value after log1p; None for none, which only continuous values may have.
    value_rounding
        ``"round"`` (half to even) or ``"truncate"`` to integers, kept as uint8, or ``"none"``
        for continuous values, kept as float32.
    """

    target_sum: float = 1e4
    value_clip: float | None = 5.0
    value_rounding: ValueRounding = "round"

    def __post_init__(self) -> None:
        if not 0 < self.target_sum < math.inf:
            raise ValueError(f"target_sum must be positive, found {self.target_sum}")
        if self.value_rounding not in get_args(ValueRounding):
            raise ValueError(
                f"value_rounding must be round, truncate or none, found {self.value_rounding!r}"
            )
        clip = math.inf if self.value_clip is None else self.value_clip
        if not clip > 0 or (self.discrete and clip > 255):
            raise ValueError(
                "value_clip must be positive, and at most 255 for discrete values (uint8); "
                f"found {self.value_clip}"
            )

    @property
    def discrete(self) -> bool:
        return self.value_rounding != "none"

    @classmethod
    def from_config(cls, config: CellPatchConfig) -> Preprocessing:
        """The preprocessing that a model was made for."""
        return cls(config.target_sum, config.value_clip, config.value_rounding)


@dataclass(frozen=True)
class Reading:
    """How inputs are read: which matrix, which names of genes, and what the values are.

    Parameters
    ----------
    layer
        Read this layer instead of X.
    use_raw
        Read raw instead of X.
    gene_column
        Column of var with Ensembl IDs or symbols; None for the one that fits best.
    input
        What the matrix holds: raw counts, log-normalised values, or (auto) what is found.

    Raises
    ------
    InputError
        If the options make no sense.
    """

    layer: str | None = None
    use_raw: bool = False
    gene_column: str | None = None
    input: Expected = "auto"

    def __post_init__(self) -> None:
        if self.layer is not None and self.use_raw:
            raise InputError("layer and use_raw exclude each other: choose one matrix")
        if self.input not in get_args(Expected):
            raise InputError(f"input must be auto, counts or lognorm, found {self.input!r}")

    def given(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def record(self) -> dict[str, Any]:
        """What a result depends on beside what its inputs hold, for what is kept with it."""
        return {
            "layer": self.layer or "",
            "use_raw": self.use_raw,
            "gene_column": self.gene_column or "",
        }


@dataclass(frozen=True)
class Masking:
    """How much is hidden, and how much the model is given at most. The paper's by default.

    Parameters
    ----------
    hidden
        Share of a cell's genes that the encoder does not see; between 0 and 1, both excluded.
    zeros
        Zeros that the decoder predicts for each hidden entry.
    max_encoder
        Most entries of a cell that the encoder sees.
    max_decoder
        Most entries of a cell that the decoder predicts, hidden ones and zeros together.
    """

    hidden: float = 0.3
    zeros: float = 0.5
    max_encoder: int = 3_000
    max_decoder: int = 1_000

    def __post_init__(self) -> None:
        if not 0 < self.hidden < 1:
            raise ValueError(f"hidden must lie between 0 and 1, found {self.hidden}")
        if not 0 <= self.zeros < math.inf:
            raise ValueError(f"zeros must be a number that is not negative, found {self.zeros}")
        for name in ("max_encoder", "max_decoder"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
