"""Start a new model from its data: gene rows from principal components, attention by values.

Drawn at random, 60,000 gene rows say nothing of which genes belong together, and attention hardly
looks at values (its scores grow by 0.12 with one unit of them). Logistic regression on the features
of an *untrained* model tells the cells of PBMC 3k with an accuracy of 0.73 from a random start and
0.89 from this one. Architecture and checkpoints are what they are without it.

With M what attention of slope ½ sees of a cell (`expression.seen`):

- Gene dimensions 0 to dim - 2: the leading right singular vectors of (M - μ) · w, mapped back to
  genes (times w), each divided by the standard deviation of its scores, all by one factor, so that
  the mean square over expressed genes and dimensions is 1. Padding's row is 0. Where cells have
  labels, up to half of the dimensions come from a linear model of them instead (``guide``): the
  directions in which its scores tell the cells apart, with variance 1 too.
- The last dimension carries the value: value weight its unit vector, bias 0, gene rows 0 there.
- Keys: the first dimension of each head reads the value alone, no other reads it. Queries: that
  dimension is ½ · √head_dim for every patch, by the bias. So a score grows by v/2.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import nn

from ..errors import InputError
from ..model import CellPatch
from ..model.linear import SLOPE
from .expression import components, seen

logger = logging.getLogger("cellpatch_fast")


@torch.no_grad()
def start_from_data(
    model: CellPatch, values: csr_array, seed: int, guide: np.ndarray | None = None
) -> None:
    """Replace what a new model has drawn for genes, values, and how its patches look at them.

    Parameters
    ----------
    model
        A new model, on any device.
    values
        Of training cells [cells, gene tokens], see `expression.Expression`.
    seed
        Of the iteration that finds the components.
    guide
        Weights [gene tokens, classes] of a linear model of what is seen of cells; None for none.

    Raises
    ------
    InputError
        If the model's dim leaves no room for a component.
    """
    dim, heads = model.config.dim, model.config.heads
    if dim < 2:
        raise InputError(
            f"a spectral start needs a dim of at least 2 (a component and the value), found {dim}"
        )
    if model.config.value_rounding != "none":
        logger.info(
            "values are whole numbers here, and the spectral start is made of them: values that "
            "are not rounded tell genes apart more finely"
        )
    attention, _ = seen(values)
    rows = np.zeros((values.shape[1], 0))
    if guide is not None:
        rows = _directions(attention, guide)[:, : (dim - 1) // 2]
    principal = components(attention, dim - 1 - rows.shape[1], seed)
    deviations = principal.singular_values / np.sqrt(values.shape[0])
    rows = np.concatenate([rows, principal.loadings / deviations], axis=1)
    expressed = np.bincount(values.indices, minlength=values.shape[1])
    square = (expressed[:, None] * rows**2).sum() / max(1, expressed.sum()) / max(1, rows.shape[1])
    rows /= np.sqrt(square) if square > 0 else 1.0
    rows[0] = 0.0

    genes = model.gene_embedding.weight
    genes.zero_()
    genes[: len(rows), : rows.shape[1]] = torch.from_numpy(rows).to(genes)
    _carry_values(model.value_embedding)
    attending = model.cross_block.attention
    query, key, _ = attending.in_proj_weight.chunk(3)
    key[:, -1] = 0.0
    for first in range(0, dim, dim // heads):  # the first dimension of each head
        query[first] = 0.0
        key[first] = 0.0
        key[first, -1] = 1.0
        attending.in_proj_bias[first] = SLOPE * (dim // heads) ** 0.5


def _directions(attention: csr_array, guide: np.ndarray) -> np.ndarray:
    """Gene weights [genes, classes - 1] whose scores of the cells are uncorrelated, variance 1.

    The scores of a softmax have one direction too many: the same number for all classes.
    """
    scores = np.asarray(attention @ guide)  # [cells, classes]
    scores -= scores.mean(axis=0)
    _, sizes, axes = np.linalg.svd(scores, full_matrices=False)
    kept = sizes[: guide.shape[1] - 1] > 1e-9 * max(sizes[0], 1e-30)
    number = int(kept.sum())
    turned = guide @ axes[:number].T * (np.sqrt(len(scores)) / sizes[:number])
    strongest = np.abs(turned).argmax(axis=0)
    return turned * np.sign(turned[strongest, np.arange(number)])


def _carry_values(embedding: nn.Linear | nn.Embedding) -> None:
    """The last dimension of a value's embedding is the value, all others are 0."""
    embedding.weight.zero_()
    if isinstance(embedding, nn.Embedding):  # [bins, dim]
        embedding.weight[:, -1] = torch.arange(len(embedding.weight)).to(embedding.weight)
    else:  # [dim, 1]
        embedding.weight[-1] = 1.0
        embedding.bias.zero_()
