"""The encoder on a GPU: what `kernels.encode` calls. Launches the kernels of `cells.py`.

Cells are shared out one per program. A batch of few but long cells would leave multiprocessors
idle that way, so there the chunks of cells are summed in programs of their own first; the bits are
the same. What is launched depends on shapes alone, never on what tensors hold, so nothing waits
for the device and all of it can be captured in a CUDA graph.

The fused kernel is made for encoders whose tile of patches fits in registers (`fits`). Others get
the cross-attention from the kernel and the rest from PyTorch, and so do the weights of
self-attention: PyTorch's products choose their order of summation by the number of cells, so there
a cell's results depend on its batch, by rounding.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from typing import Any

import torch
import triton
from torch import Tensor

from .. import reference
from ..kept import Kept
from ..reference import Encoded
from ..weights import EncoderWeights
from .attention import CHUNK, EXTRA
from .cells import attend_chunks, encode_cells, weigh_entries
from .configuration import TYPES, Configuration, compiler_options, configuration_for
from .faults import faults, raise_faults
from .tables import LOG2_E, Sizes, Tables, make_tables

logger = logging.getLogger("cellpatch_fast")

INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python, on the CPU
FUSED_PATCHES, FUSED_DIM, FUSED_MLP = 64, 64, 128  # padded sizes up to which all fits in registers

kept = Kept(make_tables)


def encode(
    weights: EncoderWeights,
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    *,
    pads: Tensor | None = None,
    attention: bool = False,
    mean: bool = False,
    dtype: torch.dtype | None = None,
    split: bool | None = None,
    configuration: Configuration | None = None,
) -> Encoded:
    """As `reference.encode`, without gradients; features are float32.

    Parameters
    ----------
    mean
        Average the features over the patches: [cells, E].
    dtype
        Type of the tables: float32, bfloat16 or float16; None for that of the weights. Sums are
        float32 always.
    split
        Whether chunks of cells get programs of their own; None for what fills the GPU.
    configuration
        How kernels are compiled; None for what is shipped, or was tuned on this machine.

    Raises
    ------
    ValueError
        If an earlier batch was found to be wrong, or this one already was (in the interpreter).
    """
    launch = _Launch(weights, offsets, genes, values, pads, dtype, split, configuration)
    fused = fits(weights)
    if fused and not attention:
        return Encoded(launch.encode(mean))
    attended, normalizers = launch.attend()
    finished = reference.finish(_in_float32(weights), attended)
    if fused:  # once more, for the bits that features have without attention weights
        features = launch.encode(mean)
    else:
        features = finished.features
        features = reference.mean_over_patches(features) if mean else features
    if not attention:
        return Encoded(features)
    return finished._replace(
        features=features,
        cross_attention=launch.weigh(normalizers),
        pad_attention=launch.weigh_pads(normalizers),
    )


def patch_attention(
    weights: EncoderWeights,
    offsets: Tensor,
    genes: Tensor,
    values: Tensor,
    *,
    pads: Tensor | None = None,
    dtype: torch.dtype | None = None,
    split: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The cross-attention alone: attended [c, p, D] and log-sum-exp [c, h, p], float32."""
    launch = _Launch(weights, offsets, genes, values, pads, dtype, split)
    attended, (shifts, sums) = launch.attend()
    constants = reference.constant_scores(_in_float32(weights))
    return attended, shifts / LOG2_E + sums.log() + constants


def fits(weights: EncoderWeights) -> bool:
    """Whether the fused kernel is made for an encoder of this size."""
    sizes = Sizes.of(weights)
    widths = {len(block.up_bias) for block in (weights.cross, *weights.self_blocks)}
    return (
        sizes.PATCHES <= FUSED_PATCHES
        and max(sizes.DIM, sizes.OUTPUT) <= FUSED_DIM
        and sizes.MLP <= FUSED_MLP
        and len(widths) == 1
    )


class _Launch:
    """One batch and everything that its kernels are launched with."""

    def __init__(
        self,
        weights: EncoderWeights,
        offsets: Tensor,
        genes: Tensor,
        values: Tensor,
        pads: Tensor | None,
        dtype: torch.dtype | None,
        split: bool | None,
        configuration: Configuration | None = None,
    ) -> None:
        self.device = genes.device
        raise_faults(self.device)
        self.sizes = Sizes.of(weights)
        self.dtype = table_type(dtype or weights.patches.dtype)
        with self._current_device():
            self.tables: Tables = kept.of(weights, self.dtype)
        if values.dtype in (torch.float64, torch.bfloat16):
            values = values.float()
        self.cells, self.entries = len(offsets) - 1, len(genes)
        self.slots = self.cells + self.entries // CHUNK.value
        self.pads = None if pads is None else pads.contiguous()
        self.faults = faults(self.device)
        self.input = (offsets.contiguous(), genes.contiguous(), values.contiguous())
        length = self.entries / max(1, self.cells)
        self.configuration = configuration or configuration_for(
            architecture(self.device), self.dtype, length
        )
        if self.sizes.bins:  # their rows are added in registers: nothing is copied ahead of use
            self.configuration = self.configuration._replace(stages=1)
        if split is None:
            split = length > CHUNK.value and self.cells < 2 * _multiprocessors(self.device)
        self.split = split
        self.common = {
            "PATCHES": self.sizes.PATCHES,
            "HEADS": self.sizes.heads,
            "HEAD_DIM": self.sizes.HEAD_DIM,
            "BINNED": self.sizes.bins > 0,
            "TERMS": len(self.tables.query),
        }
        self.counts = (self.cells, self.entries, self.sizes.genes, self.sizes.bins)

    def encode(self, mean: bool) -> Tensor:
        """Features [c, p, E], or [c, E] averaged over the patches."""
        sizes = self.sizes
        shape = (self.cells, sizes.output_dim)
        features = self._empty(*(shape if mean else (shape[0], sizes.patches, shape[1])))
        self._encode_cells(features, features, dim=sizes.dim, DEPTH=sizes.depth, MEAN=mean)
        return features

    def attend(self) -> tuple[Tensor, Tensor]:
        """Attended values [c, p, D]; shifts of exponents and their sums [2, c, h, p]."""
        sizes = self.sizes
        attended = self._empty(self.cells, sizes.patches, sizes.dim)
        normalizers = self._empty(2, self.cells, sizes.heads, sizes.patches)
        self._encode_cells(attended, normalizers, dim=sizes.head_dim, DEPTH=0, MEAN=False)
        return attended, normalizers

    def weigh(self, normalizers: Tensor) -> Tensor:
        """Attention weights of all entries [n, h, p]."""
        weights = self._empty(self.entries, self.sizes.heads, self.sizes.patches)
        self._run(
            weigh_entries, self.slots, *self.input, self.tables, normalizers, weights, self.faults,
            *self.counts, self.sizes.patches,
            **self.common, TILE=self.configuration.tile,
        )  # fmt: skip
        return weights

    def weigh_pads(self, normalizers: Tensor) -> Tensor:
        """Attention weights of all of a cell's pads together [c, h, p]."""
        shifts, sums = normalizers
        if self.pads is None:
            return torch.zeros_like(sums)
        scores = self.tables.pad_score[:, : self.sizes.patches]
        number = self.pads.float()[:, None, None]
        # in float64, so that no rounding of PyTorch's depends on a cell's place in the batch
        weights = number.double() * torch.exp2((scores - shifts).double()) / sums
        return torch.where(number > 0, weights, 0.0).float()

    def _encode_cells(self, features: Tensor, normalizers: Tensor, **choices: Any) -> None:
        tile, _, stages = self.configuration
        partials = features
        if self.split:
            per_patch = 1 + EXTRA.value + self.sizes.HEAD_DIM
            partials = self._empty(self.slots * self.sizes.heads * self.sizes.PATCHES * per_patch)
            self._run(
                attend_chunks, self.slots, *self.input, self.tables, partials, self.faults,
                *self.counts, **self.common, TILE=tile, STAGES=stages,
            )  # fmt: skip
        sizes, dim = self.sizes, choices.pop("dim")
        pads = self.input[0] if self.pads is None else self.pads  # not read where there are none
        self._run(
            encode_cells, self.cells, *self.input, pads, self.tables, partials,
            features, normalizers, self.faults, *self.counts,
            sizes.patches, dim, sizes.output_dim,
            **self.common, DIM=sizes.DIM, MLP=sizes.MLP, OUTPUT=sizes.OUTPUT, **choices,
            PADDED=self.pads is not None, PROJECTED=sizes.projected, SPLIT=self.split,
            TILE=tile, STAGES=stages,
        )  # fmt: skip

    def _run(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        if programs == 0:
            return
        key = (kernel.__name__, self.device, self.dtype, *constants.items())
        started = time.perf_counter()
        with self._current_device():
            kernel[(programs,)](
                *arguments,
                **constants,
                **compiler_options(architecture(self.device), self.configuration),
            )
        note_compilation(key, time.perf_counter() - started)
        if self.device.type == "cpu":  # nothing is asynchronous there
            raise_faults(self.device)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _current_device(self) -> contextlib.AbstractContextManager[Any]:
        # Triton launches on the current device, whatever device the tensors are on
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return contextlib.nullcontext()


def table_type(dtype: torch.dtype) -> torch.dtype:
    """The type of the tables for weights of ``dtype``."""
    if INTERPRETED and dtype == torch.bfloat16:
        raise ValueError(
            "Triton's interpreter computes bfloat16 products wrongly: use float32 or float16"
        )
    return dtype if dtype in TYPES else torch.float32


def _in_float32(weights: EncoderWeights) -> EncoderWeights:
    tensors, structure = weights.flatten()
    return EncoderWeights.unflatten([tensor.detach().float() for tensor in tensors], structure)


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability, such as 90; the oldest that is supported in the interpreter."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


_compiled: set[Any] = set()


def note_compilation(key: Any, seconds: float) -> None:
    """Say why a first call took long: kernels are compiled, or read from Triton's cache."""
    if key not in _compiled:
        _compiled.add(key)
        if seconds > 1 and not INTERPRETED:
            logger.info(
                "compiled the GPU kernel %s in %.1f s; Triton keeps it on disk", key[0], seconds
            )
