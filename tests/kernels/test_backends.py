"""Which backend computes, and what `encode` refuses: every message says what was found."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import (
    EncoderWeights,
    backends,
    encode,
    reference,
    resolve_backend,
)
from cellpatch_fast.kernels.cpu import encoder
from torch import Tensor

from cellpatch_fast.cells import RaggedCells

from .conftest import move

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture(autouse=True)
def _no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELLPATCH_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _nothing_known_of_gpus() -> Iterator[None]:
    """What was found about a GPU and warned of is kept for the process."""
    for clear in (True, False):
        backends._unfit.cache_clear()
        backends._warn_once.cache_clear()
        if clear:
            yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``gpu(8, 0)``: PyTorch says that there is a GPU of that compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")

    return pretend


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, triton_backend: None) -> list[str]:
    """The backends that computed, in order."""
    from cellpatch_fast.kernels.gpu import encoder as gpu_encoder

    calls: list[str] = []
    for module, name in (
        (reference, "reference"), (encoder, "numba"), (gpu_encoder, "triton")
    ):  # fmt: skip

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
        (None, None, CUDA, "triton"),
        (None, None, MPS, "reference"),
        (None, "", CPU, "numba"),
        (None, "reference", CPU, "reference"),
        (None, "triton", CUDA, "triton"),
        ("numba", "reference", CPU, "numba"),
        ("reference", "numba", CPU, "reference"),
        ("reference", None, CUDA, "reference"),
        ("triton", "reference", CUDA, "triton"),
    ],
)
def test_argument_then_environment_then_device(
    monkeypatch: pytest.MonkeyPatch,
    gpu: Callable[..., None],
    argument: str | None,
    environment: str | None,
    device: torch.device,
    expected: str,
) -> None:
    gpu(8, 0)
    if environment is not None:
        monkeypatch.setenv("CELLPATCH_BACKEND", environment)
    assert resolve_backend(argument, device) == expected


@pytest.mark.parametrize("in_environment", [False, True])
@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("cuda", CPU, "unknown backend 'cuda'.*: choose from reference, numba, triton"),
        ("triton", CPU, "runs on a CUDA GPU, but the tensors are on the CPU: move them, or choose"),
        ("triton", MPS, "runs on a CUDA GPU, but the tensors are on mps"),
        (
            "triton",
            CUDA,
            r"needs compute capability 8\.0 or newer, but cuda:0 \(Old GPU\) has 7\.5",
        ),
        ("numba", CUDA, "numba backend runs on the CPU, but the tensors are on cuda"),
    ],
)
def test_backends_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
    gpu: Callable[..., None],
    triton_backend: None,
    name: str,
    device: torch.device,
    message: str,
    in_environment: bool,
) -> None:
    gpu(7, 5)
    monkeypatch.setattr("cellpatch_fast.kernels.gpu.encoder.INTERPRETED", False)
    if in_environment:
        monkeypatch.setenv("CELLPATCH_BACKEND", name)
    with pytest.raises(ValueError, match=message):
        resolve_backend(None if in_environment else name, device)


@pytest.mark.parametrize(("backend", "device"), [(None, CUDA), ("triton", CUDA), ("triton", CPU)])
def test_triton_missing(
    monkeypatch: pytest.MonkeyPatch,
    gpu: Callable[..., None],
    backend: str | None,
    device: torch.device,
) -> None:
    """An error that says what to do, and not the slow reference without a word."""
    gpu(9, 0)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    with pytest.raises(ValueError, match=r"triton, which is not installed: pip install 'cellpatch"):
        resolve_backend(backend, device)


@pytest.mark.parametrize("capability", [(7, 5), (6, 1)])
def test_gpus_that_are_too_old_use_the_reference_with_one_warning(
    gpu: Callable[..., None], capability: tuple[int, int]
) -> None:
    gpu(*capability)
    with pytest.warns(UserWarning, match=r"Old GPU.*computing with the reference") as caught:
        found = [resolve_backend(None, CUDA) for _ in range(3)]
    assert found == 3 * ["reference"]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("reference", CUDA) == "reference"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_gpus_that_are_new_enough(gpu: Callable[..., None], capability: tuple[int, int]) -> None:
    gpu(*capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend(None, torch.device("cuda:1")) == "triton"


def test_gpus_of_another_maker_use_the_reference(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(9, 4)  # what PyTorch says of an MI300
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.warns(UserWarning, match=r"made for NVIDIA GPUs.*ROCm: computing with the refer"):
        assert resolve_backend(None, CUDA) == "reference"
    with pytest.raises(ValueError, match=r"ROCm: choose backend='reference'"):
        resolve_backend("triton", CUDA)


def test_encode_runs_the_backend_it_was_told(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    chosen: list[str],
    device_of: Callable[[str], torch.device],
) -> None:
    weights, cells = random_weights(), random_cells([3, 0, 2])
    for backend in (None, "reference", "numba"):
        run(weights, cells, backend=backend)
    device = device_of("triton")
    run(move(weights, device), cells.to(device), backend="triton")
    assert chosen == ["numba", "reference", "numba", "triton"]


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [None, "numba", "triton"])
@pytest.mark.parametrize("needs", ["values", "float64", "attention"])
def test_some_gradients_need_the_reference(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    chosen: list[str],
    monkeypatch: pytest.MonkeyPatch,
    needs: str,
    environment: str | None,
) -> None:
    """Which is chosen for them, unless another backend is named."""
    if environment is not None:
        monkeypatch.setenv("CELLPATCH_BACKEND", environment)
    dtype = torch.float64 if needs == "float64" else torch.float32
    weights, cells = random_weights(dtype=dtype), random_cells([3, 0, 2], bins=None)
    options = {"attention": needs == "attention"}
    leaf = cells.values if needs == "values" else weights.genes
    leaf.requires_grad_()
    run(weights, cells, **options).square().sum().backward()
    assert chosen == ["reference"]
    assert leaf.grad is not None
    assert leaf.grad.any()
    message = {
        "values": "gradients of values",
        "float64": "gradients in float64",
        "attention": "attention weights where gradients are needed",
    }
    with pytest.raises(
        ValueError, match=f"numba backend computes no {message[needs]}: use backend='reference'"
    ):
        run(weights, cells, backend="numba", **options)


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


@pytest.fixture(params=["reference", "numba", "triton"])
def checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that looks at every entry before it runs, as Triton does if it is asked."""
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
        monkeypatch.setenv("CELLPATCH_CHECK", "1")
    return request.param


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offsets": [0, 3, 4]}, "offsets must run from 0 to the number of entries, 5"),
        ({"offsets": [1, 3, 5]}, "offsets must run from 0 to the number of entries, 5"),
        ({"offsets": [0, 3, 6]}, "offsets must run from 0 to the number of entries, 5"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "offsets needs at least one element"),
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
    checked: str,
    device_of: Callable[[str], torch.device],
) -> None:
    device = device_of(checked)
    batch = [tensor.to(device) for tensor in changed(random_cells([3, 2]), **fields)]
    with pytest.raises(ValueError, match=message):
        encode(move(random_weights(), device), *batch, backend=checked)


@pytest.mark.parametrize("pads", [[1, 2, 3], [[1, 2]], [1, -1]])
def test_pads_that_do_not_fit(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    checked: str,
    device_of: Callable[[str], torch.device],
    pads: Any,
) -> None:
    device = device_of(checked)
    weights, cells = move(random_weights(), device), random_cells([3, 2]).to(device)
    with pytest.raises(ValueError, match="pads must hold one number, not negative, for each cell"):
        run(weights, cells, pads=torch.tensor(pads, device=device), backend=checked)


def test_values_that_are_no_bins(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    checked: str,
    device_of: Callable[[str], torch.device],
) -> None:
    device = device_of(checked)
    weights = move(random_weights(bins=4), device)
    with pytest.raises(ValueError, match=r"needs uint8 values, found torch.float32"):
        run(weights, random_cells([3, 2], bins=None).to(device), backend=checked)
    cells = random_cells([3, 2], bins=4).to(device)
    cells.values[2] = 4
    with pytest.raises(ValueError, match="the largest value is 4, but there are 4 value bins"):
        run(weights, cells, backend=checked)


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
