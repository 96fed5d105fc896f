"""What the Triton kernels read of one set of weights, see `Tables`.

Everything is projected in float64 and rounded once. Nothing here waits for the device, so that
tables can be made while a CUDA graph is captured. For 70,000 genes at the paper's sizes the rows
take 9 MB in bf16 and 18 MB in float32, and making them about a hundred small launches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import BlockWeights, EncoderWeights

LOG2_E = math.log2(math.e)
SMALLEST = 16  # of a dimension of a matrix product
GENES_AT_ONCE = 8192  # bounds memory while projecting


class Tables(NamedTuple):
    """Tensors, every dimension padded by zeros to a power of two; scores in powers of two.

    Terms are bfloat16 or float16: one tensor of the tables' type, or two float16 tensors that make
    up a float32 one (see `product`).
    """

    rows: Tensor  # terms [g, h, (key, value), term, d] of each gene, brought into range
    row_unscale: Tensor  # float32 [h]: the power of two that undoes this for values
    query: Tensor  # terms [term, h, p, d]: times log2(e) / sqrt(d), and what undoes this for keys
    slope: Tensor  # float32 [h, p]: of the score, by an affine value; 0 where binned
    highest: Tensor  # float32 [h, p]: bounds of the score but for an affine value part
    lowest: Tensor
    bin_rows: Tensor  # terms, as rows: of each bin; one row of zeros where affine
    value_row: Tensor  # float32 [h, d]: slope of the value, by an affine value; as rows
    constant_row: Tensor  # float32 [h, d]: what all values have in common
    pad_score: Tensor  # float32 [h, p]: of gene 0 with value 0
    pad_row: Tensor  # float32 [h, d], as rows
    patches: Tensor  # float32 [p, D]
    matrices: Tensor  # terms: see `blocks`; brought into range
    unscale: Tensor  # float32 []: the power of two that undoes this
    vectors: Tensor  # float32: see `blocks`


class Sizes(NamedTuple):
    """Dimensions as they are, and padded (capitals, as the kernels' parameters)."""

    genes: int
    bins: int  # 0 where affine
    patches: int
    heads: int
    head_dim: int
    output_dim: int
    depth: int
    projected: bool
    PATCHES: int
    HEAD_DIM: int
    DIM: int
    MLP: int
    OUTPUT: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @classmethod
    def of(cls, weights: EncoderWeights) -> Sizes:
        patches, dim = weights.patches.shape
        head_dim = dim // weights.heads
        return cls(
            genes=len(weights.genes),
            bins=0 if weights.value_bins is None else len(weights.value_bins),
            patches=patches,
            heads=weights.heads,
            head_dim=head_dim,
            output_dim=weights.output_dim,
            depth=1 + len(weights.self_blocks),
            projected=weights.projection_weight is not None,
            PATCHES=_padded(patches),
            HEAD_DIM=_padded(head_dim),
            DIM=_padded(dim),
            MLP=_padded(len(weights.cross.up_bias)),
            OUTPUT=_padded(weights.output_dim),
        )


def _padded(size: int) -> int:
    return max(SMALLEST, 1 << (size - 1).bit_length())


def make_tables(weights: EncoderWeights, dtype: torch.dtype) -> Tables:
    """Project the tables of ``weights``; those of terms in ``dtype``.

    Raises
    ------
    ValueError
        If the table of genes is too large for 32-bit positions.
    """
    sizes = Sizes.of(weights)
    if sizes.genes * sizes.heads * 4 * sizes.HEAD_DIM >= 1 << 31:
        raise ValueError(
            f"a table of {sizes.genes} genes with {sizes.heads} heads of {sizes.head_dim} is too "
            "large for the triton backend: use backend='reference'"
        )
    with torch.autocast(weights.genes.device.type, enabled=False):
        return _make_tables(weights, sizes, dtype)


def _make_tables(weights: EncoderWeights, sizes: Sizes, dtype: torch.dtype) -> Tables:
    heads, head_dim, binned = weights.heads, sizes.head_dim, sizes.bins > 0
    query_weight, key_weight, value_weight = weights.cross.in_weight.detach().double().chunk(3)
    query_bias, _, value_bias = weights.cross.in_bias.detach().double().chunk(3)

    def split(rows: Tensor) -> Tensor:
        """[..., D] to [..., h, d], head_dim padded."""
        return F.pad(rows.unflatten(-1, (heads, head_dim)), (0, sizes.HEAD_DIM - head_dim))

    def key_and_value(embedded: Tensor) -> Tensor:
        """[n, D] to [n, h, 2, d], float64."""
        embedded = embedded.detach().double()
        pair = split(embedded @ key_weight.T), split(embedded @ value_weight.T)
        return torch.stack(pair, 2)

    queries = weights.patches.detach().double() @ query_weight.T + query_bias
    queries = split(queries).transpose(0, 1) * (LOG2_E / math.sqrt(head_dim))  # [h, p, d]
    queries = F.pad(queries, (0, 0, 0, sizes.PATCHES - sizes.patches))

    parts = weights.genes.split(GENES_AT_ONCE)
    largest = torch.stack([_largest(key_and_value(part)) for part in parts]).amax(0)  # [h, 2]
    if binned:
        assert weights.value_bins is not None
        bins = key_and_value(weights.value_bins)
        largest = largest + _largest(bins)
    # Values are brought near 2^13; keys and queries share their magnitude, as their product
    # must keep its own.
    row_exponent = 13 - _exponent(largest[:, 1])
    key_exponent = (_exponent(queries.abs().amax((1, 2))) - _exponent(largest[:, 0])) // 2
    scale = torch.stack([_power_of_two(key_exponent), _power_of_two(row_exponent)], 1)[..., None]
    query = _terms(queries * _power_of_two(-key_exponent)[:, None, None], dtype, 0)
    rounded = query.float().sum(0)

    bounds, rows = [], query.new_empty((sizes.genes, heads, 2, len(query), sizes.HEAD_DIM))
    for part, to in zip(parts, rows.split(GENES_AT_ONCE), strict=True):
        to.copy_(_terms(key_and_value(part) * scale, dtype, -2))
        bounds.append(torch.aminmax(_scores(rounded, to), dim=0))
    lowest = torch.stack([bound.min for bound in bounds]).amin(0)  # [h, p]
    highest = torch.stack([bound.max for bound in bounds]).amax(0)

    constant = value_bias
    pad = rows[0].float().sum(-2)  # [h, 2, d]
    if binned:
        bin_rows = _terms(bins * scale, dtype, -2)
        scores = _scores(rounded, bin_rows)
        lowest, highest = lowest + scores.amin(0), highest + scores.amax(0)
        slope, value_row = torch.zeros_like(lowest), torch.zeros_like(pad[:, 1])
        # rounded as the kernel adds them
        pad = _terms(pad + bin_rows[0].float().sum(-2), dtype, -2).float().sum(-2)
    else:
        assert weights.value_weight is not None
        assert weights.value_bias is not None
        bin_rows = torch.zeros_like(rows[:1])
        direction = key_and_value(weights.value_weight[None])[0]  # [h, 2, d]
        slope = torch.einsum("hpd,hd->hp", queries, direction[:, 0]).float()
        value_row = (direction * scale)[:, 1].float()
        constant = constant + value_weight @ weights.value_bias.detach().double()
    block_tensors = list(_block_tensors(weights, sizes))
    matrices = [t for t in block_tensors if t.ndim > 1]
    vectors = torch.cat([t for t in block_tensors if t.ndim == 1])
    exponent = 13 - _exponent(torch.stack([t.abs().amax() for t in matrices]).amax())
    in_range = [_terms(t * _power_of_two(exponent), dtype, -3).flatten() for t in matrices]
    tables = Tables(
        rows=rows,
        row_unscale=_power_of_two(-row_exponent),
        query=query,
        slope=slope,
        highest=highest,
        lowest=lowest,
        bin_rows=bin_rows,
        value_row=value_row,
        constant_row=split(constant).float(),
        pad_score=torch.einsum("hpd,hd->hp", rounded, pad[:, 0]),
        pad_row=pad[:, 1],
        patches=_pad(weights.patches.detach().float(), sizes.PATCHES, sizes.DIM),
        matrices=torch.cat(in_range),
        unscale=_power_of_two(-exponent),
        vectors=vectors.float(),
    )
    return Tables(*(tensor.contiguous() for tensor in tables))


def _largest(key_and_value: Tensor) -> Tensor:
    """Largest magnitude of keys and of values [n, h, 2, d]: [h, 2]."""
    return key_and_value.abs().amax((0, 3))


def _exponent(magnitude: Tensor) -> Tensor:
    """e with 2^(e - 1) <= magnitude < 2^e, int32, within what `_power_of_two` can do."""
    return torch.frexp(magnitude).exponent.clamp(-100, 100)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, float32, exactly."""
    return ((exponent + 127) << 23).view(torch.float32)


def _terms(exact: Tensor, dtype: torch.dtype, place: int) -> Tensor:
    """Numbers as terms for tables of ``dtype``, stacked at dimension ``place``."""
    if dtype != torch.float32:
        return exact.to(dtype).unsqueeze(place)
    large = exact.half()
    return torch.stack([large, (exact - large).half()], place)


def _scores(query: Tensor, rows: Tensor) -> Tensor:
    """Scores [n, h, p] of the keys in rows [n, h, 2, term, d], from what the kernels will read."""
    return torch.einsum("hpd,nhd->nhp", query, rows[:, :, 0].float().sum(-2))


def _block_tensors(weights: EncoderWeights, sizes: Sizes) -> Iterator[Tensor]:
    """Matrices [in, out] and vectors in the order in which `blocks` reads each kind; float64."""
    HEAD_DIM, DIM, MLP = sizes.HEAD_DIM, sizes.DIM, sizes.MLP
    scale = LOG2_E / math.sqrt(sizes.head_dim)
    for number, block in enumerate((weights.cross, *weights.self_blocks)):
        w = BlockWeights(*(tensor.detach().double() for tensor in block))
        inputs = w.in_weight.unflatten(0, (3, sizes.heads, -1)).transpose(-1, -2)  # [3, h, D, d]
        biases = w.in_bias.unflatten(0, (3, sizes.heads, -1))  # [3, h, d]
        # queries take the softmax's scale with them
        inputs = torch.cat([inputs[:1] * scale, inputs[1:]])
        if number == 0:  # the cross-attention's are in `rows`: here they would only claim range
            inputs = torch.zeros_like(inputs)
        biases = torch.cat([biases[:1] * scale, biases[1:]])
        outputs = w.out_weight.T.unflatten(0, (sizes.heads, -1))  # [h, d, D]
        yield _pad(inputs, DIM, HEAD_DIM)
        yield _pad(outputs, HEAD_DIM, DIM)
        yield _pad(w.up_weight.T, DIM, MLP)
        yield _pad(w.down_weight.T, MLP, DIM)
        yield _pad(biases, HEAD_DIM).flatten()
        yield _pad(w.out_bias, DIM)
        yield _pad(w.attention_norm_weight, DIM)
        yield _pad(w.attention_norm_bias, DIM)
        yield _pad(w.up_bias, MLP)
        yield _pad(w.down_bias, DIM)
        yield _pad(w.mlp_norm_weight, DIM)
        yield _pad(w.mlp_norm_bias, DIM)
    if weights.projection_weight is not None:
        yield _pad(weights.projection_weight.detach().double().T, DIM, sizes.OUTPUT)
        if weights.projection_bias is not None:
            yield _pad(weights.projection_bias.detach().double(), sizes.OUTPUT)
        else:
            yield weights.projection_weight.new_zeros(sizes.OUTPUT, dtype=torch.float64)


def _pad(tensor: Tensor, *sizes: int) -> Tensor:
    """Zeros behind the last dimensions, up to ``sizes``."""
    missing = [size - found for size, found in zip(sizes, tensor.shape[-len(sizes) :], strict=True)]
    return F.pad(tensor, [pad for m in reversed(missing) for pad in (0, m)])
