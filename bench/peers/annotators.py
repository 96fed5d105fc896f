"""What every model of the comparison is, an `Annotator`, and how cells become its tokens.

`Annotator.prepare` is not timed: ranking, sampling, binning and padding happen there, which favours
the models that need them. Calling the annotator is: tokens that lie on the device in, one number
per class out.

Decisions that hold for all:

- Weights are random: speed does not depend on them.
- A gene token of ours stands for a gene of the other model's vocabulary, round and round: no gene
  is dropped for being unknown, so that a cell of n genes is n genes to every model.
- Cells of equal length need no mask, and get none, so that attention may take its fastest path.
- An entry counts as an expressed gene, though its value was rounded to 0. A cell has one at least.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellpatch_fast import RaggedCells

A = TypeVar("A", bound="Annotator")


class Annotator(nn.Module, ABC):
    """A model that tells the cell types of cells."""

    @abstractmethod
    def prepare(self, cells: RaggedCells) -> tuple[Tensor, ...]:
        """The tensors that the model is called with, on its device; it returns [cells, classes]."""

    def compile_kernels(self) -> None:
        """Where kernels have to be compiled, which is part of making the model: compile them."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def build(make: Callable[[], A], device: torch.device, dtype: torch.dtype) -> A:
    """A model that is made on the device, ready for inference."""
    with device:
        model = make()
    return model.to(device, dtype).eval()


def require(module: str, package: str) -> Any:
    """Import a module of a package that only the benchmarks need.

    Raises
    ------
    ImportError
        Naming the package and the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{package} is not installed, or cannot be imported ({error}): "
            "pip install 'cellpatch-fast[bench]'"
        ) from error


@contextlib.contextmanager
def without_package(name: str) -> Iterator[None]:
    """No top-level package of that name is found inside.

    transformers looks for the package `kernels`, and takes this repository's folder for it where
    the root is on the path: imported a second time, it would register its operators twice.
    """
    before = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(before)


class Layer(nn.Module):
    """A transformer layer as `nn.TransformerEncoderLayer` has it: post-norm, ReLU.

    In float32 on one core of a Xeon, 1,200 tokens of width 512 take it 82 ms; PyTorch's own layer
    takes 93 ms, and 112 ms on its fast path, whose attention keeps all scores in memory.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, inside: Tensor | None = None) -> Tensor:
        """``x`` [c, n, D]; ``inside`` [c, n] is true where a token is to be attended to."""
        x = self.attention_norm(
            x + self.out(attend(self.queries_keys_values(x), self.heads, inside))
        )
        return self.mlp_norm(x + self.down(F.relu(self.up(x))))


def attend(queries_keys_values: Tensor, heads: int, inside: Tensor | None = None) -> Tensor:
    """Self-attention [c, n, D] from queries, keys and values side by side, [c, n, 3 · D]."""
    parts = queries_keys_values.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys, values = parts  # [c, h, n, d]
    mask = None if inside is None else inside[:, None, None]
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


def keep(cells: RaggedCells, keys: Tensor, most: int | None = None) -> RaggedCells:
    """Each cell's entries by descending key [n], and of those ``most`` at most.

    Equal keys stay in order.
    """
    lengths = cells.lengths
    cell = torch.repeat_interleave(torch.arange(len(cells), device=cells.device), lengths)
    order = keys.argsort(descending=True, stable=True)
    order = order[cell[order].argsort(stable=True)]
    if most is not None:
        place = torch.arange(cells.entries, device=cells.device) - cells.offsets.long()[cell]
        order = order[place < most]
        lengths = lengths.clamp(max=most)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    return RaggedCells(offsets, cells.genes.long()[order], cells.values[order])


def first(cells: RaggedCells, most: int) -> RaggedCells:
    """At most the first ``most`` entries of each cell."""
    return keep(cells, torch.zeros(cells.entries, device=cells.device), most)


def into_vocabulary(genes: Tensor, size: int, start: int = 0) -> Tensor:
    """Tokens from ``start`` on of a vocabulary of so many genes, for our tokens from 1 on."""
    return start + (genes.long() - 1) % size


def pad(cells: RaggedCells) -> tuple[Tensor, ...]:
    """Genes and values [c, longest], and where lengths differ, where entries are, bool."""
    genes, values = cells.to_padded()
    lengths = cells.lengths
    if int(lengths.min()) == genes.shape[1]:
        return genes, values
    inside = torch.arange(genes.shape[1], device=cells.device) < lengths[:, None]
    return genes, values, inside
