"""Training steps of what others have built: forward and backward, down to the same weights.

A step computes attended values (or features) from an encoder's weights, and gradients of those
weights for a given gradient of the output. Nothing is prepared but what depends on the cells'
lengths alone, because weights change with every step: queries are projected and repeated, and the
``projected`` form projects its tables anew. The baselines are those of `bench.peers.attention`
but FlexAttention, whose backward needs a dense table of blocks of queries by blocks of keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from cellpatch_fast.kernels import EncoderWeights
from torch import Tensor

from bench.measure import Call, Method
from bench.peers.attention import BASELINES, PADDED_TOKENS, Baseline, Form
from bench.peers.original import PaddedPathFormer
from cellpatch_fast import RaggedCells


def leaves_of(weights: EncoderWeights) -> list[Tensor]:
    """What the cross-attention has gradients of; biases of keys and values are one tensor."""
    assert weights.value_weight is not None
    assert weights.value_bias is not None
    embeddings = [weights.genes, weights.patches, weights.value_weight, weights.value_bias]
    return [*embeddings, weights.cross.in_weight, weights.cross.in_bias]


def training(weights: EncoderWeights, dtype: torch.dtype) -> EncoderWeights:
    """The weights as leaves that receive gradients."""
    tensors, structure = weights.flatten()
    leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors]
    return EncoderWeights.unflatten(leaves, structure)


def output_gradient(like: Tensor) -> Tensor:
    """The same random gradient for the same shape, whatever computes it."""
    generator = torch.Generator(like.device).manual_seed(0)
    drawn = torch.randn(like.shape, generator=generator, device=like.device)
    return drawn.to(like.dtype)


def step_of(forward: Callable[[], Tensor], leaves: list[Tensor], returned: int) -> Call:
    """A call of forward and backward; returns the output and the first of the gradients."""
    gradient: list[Tensor] = []  # drawn by the first call

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            output = forward()
        if not gradient:
            gradient.append(output_gradient(output))
        gradients = torch.autograd.grad(output, leaves, gradient[0])
        return output.detach(), *gradients[:returned]

    return step


def methods(weights: EncoderWeights, dtype: torch.dtype) -> Iterator[Method]:
    """Steps of the cross-attention, of every baseline in both forms."""
    leaves = training(weights, dtype)
    forms: tuple[Form, ...] = ("plain", "projected")
    for form in forms:
        make = _QueriesKeysValues(leaves, form)
        for baseline in BASELINES:
            if not baseline.name.startswith("FlexAttention"):
                yield Method(
                    "cross-attention, step",
                    baseline.name,
                    form,
                    functools.partial(_prepare, baseline, make),
                    padded_tokens=PADDED_TOKENS if baseline.padded else None,
                )


def _prepare(baseline: Baseline, make: _QueriesKeysValues, cells: RaggedCells) -> Call:
    patches, dim = make.weights.patches.shape
    attend = baseline.prepare(patches, cells)
    genes, values = cells.to_padded() if baseline.padded else (cells.genes, cells.values)
    genes = genes.int()

    def forward() -> Tensor:
        queries, keys, rows = make(genes, values)
        repeated = queries.repeat(len(cells), 1, 1)
        return attend(repeated, keys, rows).reshape(len(cells), patches, dim)

    leaves = leaves_of(make.weights)
    return step_of(forward, leaves, len(leaves))


class _QueriesKeysValues:
    """Queries [p, h, d], and keys and values [..., h, d] of genes and values [...]."""

    def __init__(self, weights: EncoderWeights, form: Form) -> None:
        self.weights, self.form = weights, form
        self.run = self._make
        if weights.genes.device.type == "cuda":  # fuses the look-up with the sum
            self.run = torch.compile(self._make, dynamic=True)

    def __call__(self, genes: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, both = self.run(genes, values)
        keys, rows = both.unflatten(-1, (2, self.weights.heads, -1)).unbind(-3)
        return queries.unflatten(-1, (self.weights.heads, -1)), keys, rows

    def _make(self, genes: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        table, patches, slope, constant, matrix, bias = leaves_of(self.weights)
        dim = patches.shape[1]
        queries = F.linear(patches, matrix[:dim], bias[:dim])
        matrix, bias = matrix[dim:], bias[dim:]  # of keys and values
        amounts = values.to(table.dtype).unsqueeze(-1)
        if self.form == "plain":
            embedded = F.embedding(genes, table) + (amounts * slope + constant)
            return queries, F.linear(embedded, matrix, bias)
        table = F.linear(table, matrix, bias + matrix @ constant)
        return queries, F.embedding(genes, table) + amounts * (matrix @ slope)


def original_method(model: PaddedPathFormer, padded_tokens: int) -> Method:
    """A step of the padded original's encoder, in float32 as it is."""
    leaves: dict[str, Tensor] = dict(model.named_parameters())
    first = {
        name: leaves.pop(name)
        for name in (
            *("gene2vector.weight", "pathway_token", "count2vector.weight", "count2vector.bias"),
            *("cross_extract_blocks_attn.in_proj_weight", "cross_extract_blocks_attn.in_proj_bias"),
        )
    }
    # the rest of the encoder: what is left has no gradient
    rest = [
        leaf
        for name, leaf in leaves.items()
        if not name.startswith(("decoder", "count2vector_norm"))
    ]

    def prepare(cells: RaggedCells) -> Call:
        genes, values = cells.to_padded()
        forward = functools.partial(model.get_mid_embeding, values.float(), genes)
        return step_of(forward, [*first.values(), *rest], len(first))

    return Method(
        "encoder, step",
        "padded original",
        "float32",
        prepare,
        padded_tokens=padded_tokens,
        attends_to_padding=True,
    )
