"""What ragged cells, and arguments of ragged attention, must be for a kernel to run on them."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .ragged import RaggedAttention
from .weights import DecoderWeights, EncoderWeights

OFFSET_DTYPES = (torch.int32, torch.int64)
GENE_DTYPES = (torch.uint16, torch.uint32, torch.int32, torch.int64)
VALUE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
ATTENTION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_types(offsets: Tensor, genes: Tensor, values: Tensor) -> None:
    """Refuse shapes and dtypes that ragged cells cannot have. Looks at no element.

    Raises
    ------
    ValueError
        Naming what does not fit.
    """
    for name, tensor, dtypes in (
        ("offsets", offsets, OFFSET_DTYPES),
        ("genes", genes, GENE_DTYPES),
        ("values", values, VALUE_DTYPES),
    ):
        if tensor.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional, found shape {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must have dtype {listed(dtypes)}; found {tensor.dtype}")
    if len(genes) != len(values):
        raise ValueError(f"{len(genes)} genes but {len(values)} values")


def check_kinds(
    weights: EncoderWeights, offsets: Tensor, genes: Tensor, values: Tensor, pads: Tensor | None
) -> None:
    """Refuse what does not fit, as far as shapes, dtypes and devices tell.

    Raises
    ------
    ValueError
        Naming what does not fit.
    """
    check_types(offsets, genes, values)
    if weights.value_bins is not None and values.dtype != torch.uint8:
        raise ValueError(f"a table of value bins needs uint8 values, found {values.dtype}")
    if len(offsets) == 0:
        raise ValueError("offsets needs at least one element: it has one more than the cells")
    if pads is not None and pads.shape != (len(offsets) - 1,):
        raise ValueError("pads must hold one number, not negative, for each cell")
    device = weights.patches.device
    named = (("offsets", offsets), ("genes", genes), ("values", values), ("pads", pads))
    for name, tensor in named:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} are on {tensor.device}, but the weights are on {device}")


def check_cells(
    weights: EncoderWeights, offsets: Tensor, genes: Tensor, values: Tensor, pads: Tensor | None
) -> None:
    """Refuse what would read outside a table or mean nothing. One pass over the entries.

    Raises
    ------
    ValueError
        Naming what does not fit.
    """
    check_kinds(weights, offsets, genes, values, pads)
    check_offsets_contents(offsets, len(genes))
    if pads is not None and bool((pads < 0).any()):
        raise ValueError("pads must hold one number, not negative, for each cell")
    if len(genes) == 0:
        return
    _check_tokens(genes, weights.genes)
    if weights.value_bins is not None and (largest := integer_range(values)[1]) >= len(
        weights.value_bins
    ):
        raise ValueError(
            f"the largest value is {largest}, but there are {len(weights.value_bins)} value bins"
        )


def check_prompts(
    weights: DecoderWeights,
    features: Tensor,
    offsets: Tensor,
    genes: Tensor,
    dropout: float,
    max_length: int | None,
) -> None:
    """Refuse prompts, or features, that the decoder cannot take.

    Contents are looked at on the CPU, and on a GPU where CELLPATCH_CHECK=1 asks for it.

    Raises
    ------
    ValueError
        Naming what does not fit.
    """
    check_offsets(offsets)
    cells, width = len(offsets) - 1, weights.input_dim
    if features.ndim != 3 or len(features) != cells or features.shape[2] != width:
        raise ValueError(
            f"features must be [cells, patches, {width}] of {cells} cells, as offsets has; found "
            f"shape {list(features.shape)}"
        )
    if genes.ndim != 1 or genes.dtype not in GENE_DTYPES:
        raise ValueError(
            f"genes must be [entries], {listed(GENE_DTYPES)}; found shape {list(genes.shape)}, "
            f"{genes.dtype}"
        )
    for name, tensor in (("features", features), ("offsets", offsets), ("genes", genes)):
        if tensor.device != weights.genes.device:
            raise ValueError(
                f"{name} are on {tensor.device}, but the weights are on {weights.genes.device}"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, found {dropout}")
    if looks_at_contents(features.device):
        check_span(offsets, len(genes), max_length)
        if len(genes):
            _check_tokens(genes, weights.genes)


def _check_tokens(genes: Tensor, table: Tensor) -> None:
    lowest, highest = integer_range(genes)
    if lowest < 0 or highest >= len(table):
        raise ValueError(
            f"gene tokens run from {lowest} to {highest}, but the model has tokens 0 to "
            f"{len(table) - 1}"
        )


def integer_range(integers: Tensor) -> tuple[int, int]:
    """Lowest and highest element; (0, 0) of none."""
    if len(integers) == 0:
        return 0, 0
    if integers.device.type == "cpu":  # NumPy takes a sixth of the time, and knows uint16
        array = integers.numpy()
        return int(array.min()), int(array.max())
    lowest, highest = torch.aminmax(integers.long())
    return int(lowest), int(highest)


def check_attention(problem: RaggedAttention, *, differentiable_amounts: bool) -> None:
    """Refuse arguments of ragged attention whose shapes, dtypes or devices do not fit.

    Looks at no element, so it costs no pass over the entries and waits for no GPU. Whether
    amounts may need a gradient depends on the backend.

    Raises
    ------
    ValueError
        Naming what does not fit.
    """
    query, key, ids = problem.query, problem.key, problem.ids
    if query.ndim != 4:
        raise ValueError(
            f"query must be [1 or cells, queries, heads, head_dim], found shape {list(query.shape)}"
        )
    check_offsets(problem.offsets)
    if query.shape[0] not in (1, problem.cells):
        raise ValueError(
            f"query has {query.shape[0]} sets of queries, but there are {problem.cells} cells: "
            "give one set for each, or one for all"
        )
    rows = "entries" if ids is None else "rows"
    width = [problem.heads, problem.head_dim]
    names = ("key", "value") if ids is None else ("key_table", "value_table")
    for name, tensor in zip(names, (key, problem.value), strict=True):
        if tensor.ndim != 3 or list(tensor.shape[1:]) != width or tensor.shape[0] != key.shape[0]:
            raise ValueError(
                f"{name} must be [{rows}, heads, head_dim] with {width} heads and head_dim, as "
                f"query has, and as many {rows} as its twin; found shape {list(tensor.shape)}"
            )
    if ids is not None and (ids.ndim != 1 or ids.dtype not in GENE_DTYPES):
        raise ValueError(
            f"ids must be [entries], {listed(GENE_DTYPES)}; found shape {list(ids.shape)}, "
            f"{ids.dtype}"
        )
    _check_parts(problem, differentiable_amounts)
    bias, entries = problem.bias, problem.entries
    if bias is not None and list(bias.shape) not in ([entries], [entries, problem.heads]):
        raise ValueError(
            f"bias must be [entries] or [entries, heads], here [{entries}] or "
            f"[{entries}, {problem.heads}]; found shape {list(bias.shape)}"
        )
    if not 0 <= problem.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, found {problem.dropout}")
    _check_alike(problem)


def check_offsets(offsets: Tensor) -> None:
    """Refuse a shape or dtype that offsets cannot have.

    Raises
    ------
    ValueError
        Saying what they must be.
    """
    if offsets.ndim != 1 or len(offsets) == 0 or offsets.dtype not in OFFSET_DTYPES:
        raise ValueError(
            "offsets must be int32 or int64 [cells + 1], with one element more than there are "
            f"cells; found shape {list(offsets.shape)}, {offsets.dtype}"
        )


def _check_parts(problem: RaggedAttention, differentiable_amounts: bool) -> None:
    amounts, part = problem.amounts, problem.key_part
    given = [x is not None for x in (amounts, part, problem.value_part)]
    if any(given) and not all(given):
        raise ValueError("amounts, key_part and value_part belong together: give all or none")
    if amounts is None or part is None or problem.value_part is None:
        return
    if amounts.requires_grad and torch.is_grad_enabled() and not differentiable_amounts:
        raise ValueError("amounts receive no gradient: use backend='reference', which gives one")
    if list(amounts.shape) != [problem.entries] or amounts.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"amounts must be [entries], here [{problem.entries}], {listed(VALUE_DTYPES)}; found "
            f"shape {list(amounts.shape)}, {amounts.dtype}"
        )
    width = [problem.heads, problem.head_dim]
    if part.shape != problem.value_part.shape or list(part.shape[-2:]) != width:
        raise ValueError(
            "key_part and value_part must both be [heads, head_dim] or [bins, heads, head_dim] "
            f"with {width} heads and head_dim; found shapes {list(part.shape)} and "
            f"{list(problem.value_part.shape)}"
        )
    if part.ndim == 3 and amounts.dtype != torch.uint8:
        raise ValueError(f"parts with a row for each bin need uint8 amounts, found {amounts.dtype}")
    if part.ndim == 3 and not 1 <= len(part) <= 256:
        raise ValueError(f"parts may have 1 to 256 bins, found {len(part)}")
    if part.ndim not in (2, 3):
        raise ValueError(f"key_part has {part.ndim} dimensions, not 2 or 3")


def _check_alike(problem: RaggedAttention) -> None:
    """One floating dtype and one device."""
    query = problem.query
    if query.dtype not in ATTENTION_DTYPES:
        raise ValueError(f"query must be {listed(ATTENTION_DTYPES)}; found {query.dtype}")
    for name in ("key", "value", "key_part", "value_part"):
        tensor = getattr(problem, name)
        if tensor is not None and tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, but query is {query.dtype}: they need one dtype "
                "(torch.autocast converts them)"
            )
    for name, tensor in problem._asdict().items():
        if isinstance(tensor, Tensor) and tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, but query is on {query.device}")


def check_attention_contents(problem: RaggedAttention) -> None:
    """Refuse offsets, ids and amounts that would read outside what they point into.

    Raises
    ------
    ValueError
        Naming what does not fit.
    """
    check_offsets_contents(problem.offsets, problem.entries)
    if problem.ids is not None and problem.entries:
        lowest, highest = integer_range(problem.ids)
        if lowest < 0 or highest >= len(problem.key):
            raise ValueError(
                f"ids run from {lowest} to {highest}, but the tables have rows 0 to "
                f"{len(problem.key) - 1}"
            )
    if problem.binned:
        assert problem.amounts is not None
        assert problem.key_part is not None
        largest = integer_range(problem.amounts)[1]
        if largest >= len(problem.key_part):
            raise ValueError(
                f"the largest amount is {largest}, but there are {len(problem.key_part)} bins"
            )


def check_offsets_contents(offsets: Tensor, entries: int) -> None:
    """Refuse offsets that do not divide the entries among cells.

    Raises
    ------
    ValueError
        Naming what does not fit.
    """
    if int(offsets[0]) != 0 or int(offsets[-1]) != entries:
        raise ValueError(
            f"offsets must run from 0 to the number of entries, {entries}; they run from "
            f"{int(offsets[0])} to {int(offsets[-1])}"
        )
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError("offsets must not decrease")


def check_span(offsets: Tensor, entries: int, max_length: int | None) -> None:
    """Refuse offsets, or the length of a longest cell, that do not fit the entries.

    Raises
    ------
    ValueError
        Naming what does not fit.
    """
    check_offsets_contents(offsets, entries)
    if max_length is not None and max_length < (found := longest(offsets)):
        raise ValueError(f"max_length is {max_length}, but a cell has {found} entries")


def longest(offsets: Tensor) -> int:
    """Entries of the longest cell; 0 without cells."""
    return int(offsets.diff().max()) if len(offsets) > 1 else 0


def listed(dtypes: tuple[torch.dtype, ...]) -> str:
    """Names of dtypes, as a message has them."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def looks_at_contents(device: torch.device) -> bool:
    """Whether contents of tensors are checked before computing.

    Not on a GPU, which would have to be waited for, unless CELLPATCH_CHECK=1 asks for it; and not
    while tracing, when there is nothing to look at.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("CELLPATCH_CHECK") == "1"
