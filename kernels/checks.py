"""What ragged cells must be for a kernel to run on them."""

from __future__ import annotations

import torch
from torch import Tensor

from .weights import EncoderWeights

OFFSET_DTYPES = (torch.int32, torch.int64)
GENE_DTYPES = (torch.uint16, torch.uint32, torch.int32, torch.int64)
VALUE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must have dtype {allowed}; found {tensor.dtype}")
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
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(genes):
        raise ValueError(f"offsets must run from 0 to the number of entries, {len(genes)}")
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError("offsets must not decrease")
    if pads is not None and bool((pads < 0).any()):
        raise ValueError("pads must hold one number, not negative, for each cell")
    if len(genes) == 0:
        return
    lowest, highest = integer_range(genes)
    if lowest < 0 or highest >= len(weights.genes):
        raise ValueError(
            f"gene tokens run from {lowest} to {highest}, but the model has tokens 0 to "
            f"{len(weights.genes) - 1}"
        )
    if weights.value_bins is not None and (largest := integer_range(values)[1]) >= len(
        weights.value_bins
    ):
        raise ValueError(
            f"the largest value is {largest}, but there are {len(weights.value_bins)} value bins"
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
