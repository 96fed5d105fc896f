"""Bad input of the Triton backend: found without waiting for the GPU, harmless to other cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import Encoded, EncoderWeights, encode, patch_attention
from cellpatch_fast.kernels.checks import check_kinds
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

from .conftest import errors_per_cell, move

encoder = pytest.importorskip("cellpatch_fast.kernels.gpu.encoder")
faults = pytest.importorskip("cellpatch_fast.kernels.gpu.faults")

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
Run = Callable[..., Encoded]

LENGTHS = [3, 5, 0, 4]
WRONG = 1  # the cell that is wrong
OTHERS = [0, 2, 3]

NO_GENE = "a gene token is not in the gene embedding"
NO_BIN = "a value has no bin"
OFFSETS = "offsets do not start at 0, decrease, or end beyond the entries"
PADS = "a number of pads is negative"


@pytest.fixture(scope="module")
def backend(triton_backend: None) -> str:
    return "triton"


@pytest.fixture(autouse=True)
def _nothing_found(device: torch.device) -> None:
    faults.faults(device).zero_()


@pytest.fixture
def raised_later(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[], None]:
    """As on a GPU, where the call that is wrong does not know it; raises when called."""
    monkeypatch.setattr(encoder, "raise_faults", lambda device: None)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        faults.raise_faults(device)

    return synchronize


def launch(
    weights: EncoderWeights, cells: RaggedCells, device: torch.device, **options: Any
) -> Any:
    there = cells.to(device)
    return encoder.encode(
        move(weights, device), there.offsets, there.genes, there.values, **options
    ).features.cpu()


@pytest.fixture(scope="module")
def sample(
    random_weights: MakeWeights, random_cells: MakeCells, device: torch.device
) -> tuple[EncoderWeights, RaggedCells, Tensor]:
    """Weights, cells, and their features."""
    weights, cells = random_weights(self_blocks=0), random_cells(LENGTHS)
    return weights, cells, launch(weights, cells, device)


Sample = tuple[EncoderWeights, RaggedCells, Tensor]


def with_token(cells: RaggedCells, token: int, dtype: torch.dtype) -> RaggedCells:
    tokens = cells.genes.long()
    tokens[5] = token
    return RaggedCells(cells.offsets, tokens.to(dtype), cells.values)


# --- what kernels find -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "dtype", "split"),
    [
        (101, torch.int32, False),
        (101, torch.int32, True),
        (2**31 - 1, torch.int32, False),
        (-1, torch.int32, True),
        (65_535, torch.uint16, False),
        (2**32 - 1, torch.uint32, True),
        (-(2**63), torch.int64, False),
        (2**32 + 5, torch.int64, True),
    ],
)
def test_gene_tokens_beyond_the_table(
    sample: Sample,
    device: torch.device,
    raised_later: Callable[[], None],
    token: int,
    dtype: torch.dtype,
    split: bool,
) -> None:
    weights, cells, expected = sample
    found = launch(weights, with_token(cells, token, dtype), device, split=split)
    with pytest.raises(ValueError, match=NO_GENE) as caught:
        raised_later()
    assert torch.equal(found[OTHERS], expected[OTHERS])
    assert all(other not in str(caught.value) for other in (NO_BIN, OFFSETS, PADS))
    raised_later()  # it is raised once


def test_values_without_a_bin(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    device: torch.device,
    raised_later: Callable[[], None],
) -> None:
    weights, cells = random_weights(bins=6, self_blocks=0), random_cells(LENGTHS)
    expected = launch(weights, cells, device)
    cells.values[5] = 6
    found = launch(weights, cells, device)
    with pytest.raises(ValueError, match=NO_BIN):
        raised_later()
    assert torch.equal(found[OTHERS], expected[OTHERS])


def test_negative_pads(
    sample: Sample, device: torch.device, raised_later: Callable[[], None]
) -> None:
    weights, cells, expected = sample
    pads = torch.tensor([0, -3, 0, 0], device=device)
    found = launch(weights, cells, device, pads=pads)
    with pytest.raises(ValueError, match=PADS):
        raised_later()
    assert torch.equal(found[OTHERS], expected[OTHERS])
    launch(weights, cells, device, pads=pads, attention=True)
    with pytest.raises(ValueError, match=PADS):
        raised_later()


@pytest.mark.parametrize(
    ("split", "attention"), [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize(
    "offsets",
    [
        pytest.param([0, 3, 8, 6, 12], id="decreasing"),
        pytest.param([1, 3, 8, 8, 12], id="not_from_0"),
        pytest.param([-1, 3, 8, 8, 12], id="from_below_0"),
        pytest.param([0, 3, 8, 8, 13], id="beyond_the_entries"),
        pytest.param([0, 3, 8, 8, 2**40], id="far_beyond_the_entries"),
        pytest.param([0, 3, -(2**40), 8, 12], id="far_below_0"),
    ],
)
def test_wrong_offsets(
    sample: Sample,
    device: torch.device,
    raised_later: Callable[[], None],
    offsets: list[int],
    split: bool,
    attention: bool,
) -> None:
    """Nothing is read or written where it must not be. Cells with right offsets are right.

    But for chunks in programs of their own: which cell a chunk is of follows from all offsets.
    """
    weights, cells, expected = sample
    wrong = RaggedCells(torch.tensor(offsets), cells.genes, cells.values)
    found = launch(weights, wrong, device, split=split, attention=attention)
    with pytest.raises(ValueError, match=OFFSETS):
        raised_later()
    if split:
        return
    right = [i for i in range(4) if offsets[i : i + 2] == cells.offsets[i : i + 2].tolist()]
    assert len(right) > 1
    if attention:  # PyTorch computes the rest
        assert errors_per_cell(found[right], expected[right]).max() <= 1e-5
    else:
        assert torch.equal(found[right], expected[right])


def test_entries_after_the_last_cell_are_nobody_s(
    sample: Sample, device: torch.device, raised_later: Callable[[], None]
) -> None:
    """So that a batch can lie in memory that has room for more."""
    weights, cells, expected = sample
    fewer = RaggedCells(cells.offsets[:3], cells.genes, cells.values)
    for split in (False, True):
        assert torch.equal(launch(weights, fewer, device, split=split), expected[:2])
    raised_later()


def test_everything_that_was_wrong_is_told(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    device: torch.device,
    raised_later: Callable[[], None],
) -> None:
    weights, cells = random_weights(bins=6, self_blocks=0), random_cells(LENGTHS)
    wrong = with_token(cells, 999, torch.int32)
    wrong.values[0] = 77
    launch(weights, wrong, device, pads=torch.tensor([0, 0, -1, 0], device=device))
    with pytest.raises(ValueError, match="CELLPATCH_CHECK=1") as caught:
        raised_later()
    assert all(part in str(caught.value) for part in (NO_GENE, NO_BIN, PADS))
    assert OFFSETS not in str(caught.value)


def test_a_call_that_is_wrong_raises_and_the_next_one_is_right(
    random_weights: MakeWeights, random_cells: MakeCells, run: Run
) -> None:
    """`run` synchronizes on a GPU; in the interpreter nothing is asynchronous."""
    weights, cells = random_weights(self_blocks=0), random_cells(LENGTHS)
    expected = run(weights, cells).features
    with pytest.raises(ValueError, match=NO_GENE):
        run(weights, with_token(cells, 101, torch.int64))
    assert torch.equal(run(weights, cells).features, expected)


# --- what is refused before anything runs ------------------------------------------------------


def batch(cells: RaggedCells, device: torch.device, **fields: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.as_tensor(fields.get(name, getattr(cells, name))).to(device)
        for name in ("offsets", "genes", "values")
    )


@pytest.mark.parametrize("operation", [encode, patch_attention])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"genes": torch.ones(5)}, "genes must have dtype uint16.*found torch.float32"),
        ({"values": torch.ones(5, dtype=torch.int64)}, "values must have dtype uint8.*torch.int64"),
        ({"offsets": torch.tensor([0.0, 3, 5])}, "offsets must have dtype int32.*torch.float32"),
        ({"genes": torch.ones(5, 1, dtype=torch.int32)}, r"genes must be one-dim.*shape \[5, 1\]"),
        ({"genes": torch.ones(4, dtype=torch.int32)}, "4 genes but 5 values"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "offsets needs at least one element"),
    ],
)
def test_types_and_shapes(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    device: torch.device,
    operation: Callable[..., Any],
    fields: dict[str, Tensor],
    message: str,
) -> None:
    weights = move(random_weights(), device)
    given = batch(random_cells([3, 2]), device, **fields)
    with pytest.raises(ValueError, match=message):
        operation(weights, *given, backend="triton")


@pytest.mark.parametrize("operation", [encode, patch_attention])
def test_bins_need_bytes(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    device: torch.device,
    operation: Callable[..., Any],
) -> None:
    given = batch(random_cells([3, 2], bins=None), device)
    with pytest.raises(ValueError, match=r"bins needs uint8 values, found torch.float32"):
        operation(move(random_weights(bins=4), device), *given, backend="triton")


@pytest.mark.parametrize("which", ["offsets", "genes", "values", "pads"])
def test_tensors_on_another_device(
    random_weights: MakeWeights, random_cells: MakeCells, which: str
) -> None:
    cells = random_cells([3, 2])
    given = {
        "offsets": cells.offsets, "genes": cells.genes, "values": cells.values,
        "pads": torch.tensor([1, 2]),
    }  # fmt: skip
    given[which] = given[which].to("meta")
    with pytest.raises(ValueError, match=rf"{which} are on meta, but the weights are on cpu"):
        check_kinds(random_weights(), **given)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["offsets", "genes", "values", "pads"])
@pytest.mark.parametrize("operation", [encode, patch_attention])
def test_tensors_on_the_cpu(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    operation: Callable[..., Any],
    which: str,
) -> None:
    """Refused, and never copied silently."""
    cells = random_cells([3, 2])
    tensors = {"offsets": cells.offsets, "genes": cells.genes, "values": cells.values}
    tensors["pads"] = torch.tensor([1, 2])
    given = {name: t if name == which else t.cuda() for name, t in tensors.items()}
    with pytest.raises(ValueError, match=r"the weights are on cuda|the tensors are on the CPU"):
        operation(move(random_weights(), torch.device("cuda")), **given, backend="triton")


@pytest.mark.parametrize("operation", [encode, patch_attention])
def test_a_full_check_before_the_launch_if_asked(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    operation: Callable[..., Any],
) -> None:
    monkeypatch.setenv("CELLPATCH_CHECK", "1")
    given = batch(with_token(random_cells([3, 5]), 101, torch.int32), device)
    with pytest.raises(ValueError, match="but the model has tokens 0 to 100"):
        operation(move(random_weights(), device), *given, backend="triton")
    assert not faults.faults(device).any()  # nothing was launched
