"""Which backend computes, and what `encode` refuses: every message says what was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import EncoderWeights, encode, reference, resolve_backend
from cellpatch_fast.kernels.cpu import encoder
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELLPATCH_BACKEND", raising=False)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that computed, in order."""
    calls: list[str] = []
    for module, name in ((reference, "reference"), (encoder, "numba")):

        def note(
            *arguments: Any, encode: Any = module.encode, name: str = name, **others: Any
        ) -> Any:
            calls.append(name)
            return encode(*arguments, **others)

        monkeypatch.setattr(module, "encode", note)
    return calls


def run(weights: EncoderWeights, cells: RaggedCells, **options: Any) -> Tensor:
    return encode(weights, cells.offsets, cells.genes, cells.values, **options).features


# --- the choice --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "environment", "device", "expected"),
    [
        (None, None, CPU, "numba"),
        (None, None, CUDA, "reference"),
        (None, "", CPU, "numba"),
        (None, "reference", CPU, "reference"),
        ("numba", "reference", CPU, "numba"),
        ("reference", "numba", CPU, "reference"),
        ("reference", None, CUDA, "reference"),
    ],
)
def test_argument_then_environment_then_device(
    monkeypatch: pytest.MonkeyPatch,
    argument: str | None,
    environment: str | None,
    device: torch.device,
    expected: str,
) -> None:
    if environment is not None:
        monkeypatch.setenv("CELLPATCH_BACKEND", environment)
    assert resolve_backend(argument, device) == expected


@pytest.mark.parametrize("in_environment", [False, True])
@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("cuda", CPU, "unknown backend 'cuda'.*: choose from reference, numba, triton"),
        ("triton", CPU, "triton backend is not built yet: use reference or numba"),
        ("triton", CUDA, "triton backend is not built yet: use reference or numba"),
        ("numba", CUDA, "numba backend runs on the CPU, but the tensors are on cuda"),
    ],
)
def test_backends_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    device: torch.device,
    message: str,
    in_environment: bool,
) -> None:
    if in_environment:
        monkeypatch.setenv("CELLPATCH_BACKEND", name)
    with pytest.raises(ValueError, match=message):
        resolve_backend(None if in_environment else name, device)


def test_encode_runs_the_backend_it_was_told(
    random_weights: MakeWeights, random_cells: MakeCells, chosen: list[str]
) -> None:
    weights, cells = random_weights(), random_cells([3, 0, 2])
    for backend in (None, "reference", "numba"):
        run(weights, cells, backend=backend)
    assert chosen == ["numba", "reference", "numba"]


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [None, "numba"])
@pytest.mark.parametrize("which", ["genes", "projection_weight", "values"])
def test_gradients_need_the_reference(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    chosen: list[str],
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    environment: str | None,
) -> None:
    if environment is not None:
        monkeypatch.setenv("CELLPATCH_BACKEND", environment)
    weights, cells = random_weights(), random_cells([3, 0, 2], bins=None)
    leaf = cells.values if which == "values" else getattr(weights, which)
    leaf.requires_grad_()
    run(weights, cells).square().sum().backward()
    assert chosen == ["reference"]
    assert leaf.grad is not None
    assert leaf.grad.any()


def test_numba_refuses_gradients(
    random_weights: MakeWeights, random_cells: MakeCells, chosen: list[str]
) -> None:
    weights, cells = random_weights(), random_cells([3, 0, 2])
    weights.genes.requires_grad_()
    with pytest.raises(ValueError, match=r"numba backend computes no gradients.*torch.no_grad\(\)"):
        run(weights, cells, backend="numba")
    assert not chosen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_numba_computes(
    random_weights: MakeWeights, random_cells: MakeCells, chosen: list[str], mode: Any
) -> None:
    weights, cells = random_weights(), random_cells([3, 0, 2], bins=None)
    weights.genes.requires_grad_()
    cells.values.requires_grad_()
    with mode():
        assert not run(weights, cells).requires_grad
        run(weights, cells, backend="numba")
    assert chosen == ["numba", "numba"]


def test_backends_agree_on_types(random_weights: MakeWeights, random_cells: MakeCells) -> None:
    """The reference computes in the weights' dtype, Numba in float32."""
    weights, cells = random_weights(dtype=torch.float64), random_cells([3, 0, 2])
    assert run(weights, cells, backend="reference").dtype == torch.float64
    assert run(weights, cells, backend="numba").dtype == torch.float32


# --- what does not fit -------------------------------------------------------------------------


def changed(cells: RaggedCells, **fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors = {name: getattr(cells, name) for name in ("offsets", "genes", "values")}
    tensors |= {
        name: value if isinstance(value, Tensor) else torch.tensor(value)
        for name, value in fields.items()
    }
    return tensors["offsets"], tensors["genes"], tensors["values"]


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offsets": [0, 3, 4]}, "offsets must run from 0 to the number of entries, 5"),
        ({"offsets": [1, 3, 5]}, "offsets must run from 0 to the number of entries, 5"),
        ({"offsets": [0, 3, 6]}, "offsets must run from 0 to the number of entries, 5"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "offsets must run from 0"),
        ({"offsets": [0, 4, 3, 5]}, "offsets must not decrease"),
        ({"offsets": [0, -1, 5]}, "offsets must not decrease"),
        ({"genes": [1, 2, 3, 4]}, "4 genes but 5 values"),
        ({"genes": [1, 2, 101, 4, 5]}, "run from 1 to 101, but the model has tokens 0 to 100"),
        ({"genes": [1, 2, -1, 4, 5]}, "run from -1 to 5, but the model has tokens 0 to 100"),
        (
            {"genes": torch.tensor([1, 2, 2**32 - 1, 4, 5]).to(torch.uint32)},
            "run from 1 to 4294967295, but",
        ),
    ],
)
def test_cells_that_do_not_fit(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    fields: dict[str, Any],
    message: str,
    backend: str,
) -> None:
    batch = changed(random_cells([3, 2]), **fields)
    with pytest.raises(ValueError, match=message):
        encode(random_weights(), *batch, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("pads", [[1, 2, 3], [[1, 2]], [1, -1]])
def test_pads_that_do_not_fit(
    random_weights: MakeWeights, random_cells: MakeCells, backend: str, pads: Any
) -> None:
    with pytest.raises(ValueError, match="pads must hold one number, not negative, for each cell"):
        run(random_weights(), random_cells([3, 2]), pads=torch.tensor(pads), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_values_that_are_no_bins(
    random_weights: MakeWeights, random_cells: MakeCells, backend: str
) -> None:
    weights = random_weights(bins=4)
    with pytest.raises(ValueError, match=r"needs uint8 values, found torch.float32"):
        run(weights, random_cells([3, 2], bins=None), backend=backend)
    cells = random_cells([3, 2], bins=4)
    cells.values[2] = 4
    with pytest.raises(ValueError, match="the largest value is 4, but there are 4 value bins"):
        run(weights, cells, backend=backend)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"values": [1, 2, 3, 4, 5]}, id="int64_values"),
        pytest.param({"values": [True, True, False, True, True]}, id="bool_values"),
        pytest.param({"genes": [1.0, 2.5, 3, 4, 5]}, id="float_genes"),
        pytest.param({"genes": [[1], [2], [3], [4], [5]]}, id="two_dimensional_genes"),
        pytest.param({"offsets": [0.0, 2.5, 5.0]}, id="float_offsets"),
    ],
)
def test_types_that_do_not_fit(
    random_weights: MakeWeights, random_cells: MakeCells, fields: dict[str, Any]
) -> None:
    """Refused before a backend is reached, so that any backend shows it."""
    batch = changed(random_cells([3, 2]), **fields)
    with pytest.raises(ValueError, match=r"values|genes|offsets"):
        encode(random_weights(), *batch, backend="reference")


def test_compiled_code_refuses_tokens_beyond_the_tables(
    random_weights: MakeWeights, random_cells: MakeCells
) -> None:
    weights, cells = random_weights(), random_cells([3, 2])
    compiled = torch.compile(
        lambda genes: encode(weights, cells.offsets, genes, cells.values).features,
        fullgraph=True,
        backend="eager",
    )
    genes = cells.genes.clone()
    genes[2] = 101  # one beyond
    with pytest.raises(ValueError, match="tokens 0 to 100"):
        compiled(genes)
