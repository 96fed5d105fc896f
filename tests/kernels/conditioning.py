"""How well float32 can know the gradients of ragged attention: by the size of what is summed.

The gradient of a score is w · (dp - delta): the weight w, dp = gradient · value, and delta, the
mean of dp over the cell. Where a cell's values are alike (every entry looks up one row, say), dp
and delta are nearly the same number, and their difference is known to the rounding of that number,
whatever the arithmetic. So an error is held against the sum of all that was added, without signs.
"""

from __future__ import annotations

import torch
from cellpatch_fast.kernels import reference
from cellpatch_fast.kernels.ragged import RaggedAttention
from torch import Tensor

UNIT = 2.0**-24  # of float32: the largest relative error of a rounding
ROUNDINGS = 4  # of a term: of w, of dp or delta, of their product, and of that with a query or key


@torch.no_grad()
def rounding(
    problem: RaggedAttention, gradient: Tensor, of_log_sum_exp: Tensor
) -> dict[str, float]:
    """Norm of the error that float32 may have in each gradient, by the name of its tensor.

    Parameters
    ----------
    problem
        Its floating tensors in float64, on the CPU.
    gradient, of_log_sum_exp
        Of the output [c, q, h, d] and of the log-sum-exp [c, h, q], in float64.
    """
    rows = torch.arange(problem.entries) if problem.ids is None else problem.ids.long()
    cell = torch.repeat_interleave(torch.arange(problem.cells), problem.offsets.diff())  # [n]
    asker = cell if len(problem.query) > 1 else torch.zeros_like(cell)
    keys, values = problem.key[rows], problem.value[rows]  # [n, h, d]
    amounts = problem.amounts
    if amounts is not None:
        assert problem.key_part is not None
        assert problem.value_part is not None
        keys = keys + reference._of_amounts(amounts, problem.key_part)
        values = values + reference._of_amounts(amounts, problem.value_part)
    output, log_sum_exp = reference.ragged_attention(problem)
    scores = torch.einsum("nqhd,nhd->nhq", problem.query[asker], keys) * problem.scale
    if problem.bias is not None:
        scores = scores + problem.bias[:, :, None]
    weights = torch.exp(scores - log_sum_exp[cell])  # [n, h, q]
    share = 1 / (1 - problem.dropout)  # of a weight that is not dropped
    products = torch.einsum("nqhd,nhd->nhq", gradient[cell], values).abs() * share
    delta = (gradient * output).sum(-1).transpose(1, 2).abs() + of_log_sum_exp.abs()  # [c, h, q]
    terms = weights * (products + delta[cell])  # [n, h, q]
    of_keys = torch.einsum("nhq,nqhd->nhd", terms, problem.query[asker].abs()) * problem.scale
    of_values = torch.einsum("nhq,nqhd->nhd", weights * share, gradient[cell].abs())
    of_queries = torch.einsum("nhq,nhd->nqhd", terms, keys.abs()) * problem.scale
    summed = {
        "query": torch.zeros_like(problem.query).index_add(0, asker, of_queries),
        "key": torch.zeros_like(problem.key).index_add(0, rows, of_keys),
        "value": torch.zeros_like(problem.value).index_add(0, rows, of_values),
        "bias": terms.sum(-1),
    }
    for name, of_entries in (("key_part", of_keys), ("value_part", of_values)):
        if amounts is None:
            continue
        if problem.binned:
            part = torch.zeros_like(getattr(problem, name))
            summed[name] = part.index_add(0, amounts.long(), of_entries)
        else:
            summed[name] = (amounts.double()[:, None, None] * of_entries).sum(0)
    return {name: ROUNDINGS * UNIT * float(total.norm()) for name, total in summed.items()}
