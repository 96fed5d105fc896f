"""Tables are kept between calls, and always belong to the weights as they are now."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import Encoded, EncoderWeights, encode
from torch import Tensor, nn

from cellpatch_fast.cells import RaggedCells

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
ToDevice = Callable[[EncoderWeights, torch.device], EncoderWeights]
Compare = Callable[..., Encoded]


@pytest.fixture
def module(backend: str) -> Iterator[ModuleType]:
    """The backend's module that keeps tables."""
    module = importlib.import_module(
        f"cellpatch_fast.kernels.{'cpu' if backend == 'numba' else 'gpu'}.encoder"
    )
    module.kept.forget()
    yield module
    module.kept.forget()


@pytest.fixture
def choices(backend: str) -> tuple[torch.dtype, ...]:
    """What tables are made for besides weights."""
    return () if backend == "numba" else (torch.float32,)


@pytest.fixture
def on_device(
    random_weights: MakeWeights, to_device: ToDevice, device: torch.device
) -> MakeWeights:
    """Random weights where the backend computes."""

    def make(*arguments: Any, **options: Any) -> EncoderWeights:
        return to_device(random_weights(*arguments, **options), device)

    return make


def flat(tables: Any) -> list[Any]:
    """All arrays or tensors of nested tuples."""
    return [x for part in tables for x in flat(part)] if isinstance(tables, tuple) else [tables]


@pytest.fixture
def assert_current(
    module: ModuleType, choices: tuple[torch.dtype, ...]
) -> Callable[[EncoderWeights], Tensor]:
    """Asserts that kept tables are those of the weights as they are now, and returns them."""

    def check(weights: EncoderWeights) -> Tensor:
        with torch.no_grad():
            found = flat(module.kept.of(weights, *choices))
            expected = flat(module.kept._make(weights, *choices))
        numbers = []
        for one, other in zip(found, expected, strict=True):
            numbers.append(torch.as_tensor(one).double().flatten())
            same = torch.equal(numbers[-1], torch.as_tensor(other).double().flatten())
            assert same, "tables are out of date"
        return torch.cat(numbers)

    return check


AssertCurrent = Callable[[EncoderWeights], Tensor]


def test_changed_weights_change_features(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare
) -> None:
    """Tables that are kept are those that `encode` computes with."""
    weights, cells = random_weights(), random_cells([5, 2])
    before = compare(weights, cells).features
    for tensor in weights.tensors():
        tensor.mul_(1.5).add_(0.25)
    assert not torch.equal(compare(weights, cells).features, before)


def with_parameters(weights: EncoderWeights) -> tuple[EncoderWeights, nn.ParameterList]:
    tensors, structure = weights.flatten()
    parameters = nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])
    return EncoderWeights.unflatten([*parameters], structure), parameters


@pytest.mark.parametrize("bins", [None, 6])
def test_every_weight_changed_in_place_is_noticed(
    on_device: MakeWeights, assert_current: AssertCurrent, bins: int | None
) -> None:
    weights, parameters = with_parameters(on_device(bins=bins))
    before = assert_current(weights)
    for parameter in parameters:
        with torch.no_grad():
            parameter.mul_(1.5).add_(0.25)
        after = assert_current(weights)
        assert not torch.equal(after, before)
        before = after


def test_steps_of_an_optimizer_are_noticed(
    on_device: MakeWeights, random_cells: MakeCells, assert_current: AssertCurrent
) -> None:
    weights, parameters = with_parameters(on_device())
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    cells = random_cells([5, 17, 2]).to(weights.genes.device)
    for _ in range(3):
        assert_current(weights)
        optimizer.zero_grad()
        features = encode(weights, cells.offsets, cells.genes, cells.values).features
        features.square().sum().backward()
        optimizer.step()
    assert_current(weights)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_noticed(
    on_device: MakeWeights, assert_current: AssertCurrent, assign: bool
) -> None:
    weights, parameters = with_parameters(on_device())
    before = assert_current(weights)
    _, other = with_parameters(on_device(seed=1))
    parameters.load_state_dict(other.state_dict(), assign=assign)
    loaded = EncoderWeights.unflatten([*parameters], weights.flatten()[1])
    assert not torch.equal(assert_current(loaded), before)


def test_changes_in_inference_mode_are_noticed(
    on_device: MakeWeights, assert_current: AssertCurrent
) -> None:
    weights, parameters = with_parameters(on_device())
    before = assert_current(weights)
    with torch.inference_mode():
        parameters[0].mul_(2)
        assert not torch.equal(assert_current(weights), before)


def test_inference_tensors_are_noticed(
    on_device: MakeWeights, assert_current: AssertCurrent
) -> None:
    """They count no versions."""
    with torch.inference_mode():
        weights = on_device()
        before = assert_current(weights)
        weights.genes.mul_(2)
        assert not torch.equal(assert_current(weights), before)


def test_a_new_tensor_at_an_old_address_is_noticed(
    on_device: MakeWeights, assert_current: AssertCurrent, device: torch.device
) -> None:
    weights = on_device()
    addresses: set[int] = set()
    for _ in range(100):
        genes = torch.randn(101, 10, device=device)
        assert_current(weights._replace(genes=genes))
        if genes.data_ptr() in addresses:
            return
        addresses.add(genes.data_ptr())
    pytest.skip("this machine gives no address twice")


def test_new_data_of_a_parameter_is_noticed(
    on_device: MakeWeights, assert_current: AssertCurrent, device: torch.device
) -> None:
    """`p.data = ...` counts no version and frees memory, which the next data may get."""
    genes = nn.Parameter(torch.randn(101, 10, device=device))
    weights = on_device()._replace(genes=genes)
    for _ in range(50):
        assert_current(weights)
        genes.data = torch.randn(101, 10, device=device)


def test_a_module_converted_there_and_back_is_noticed(
    on_device: MakeWeights, assert_current: AssertCurrent, device: torch.device
) -> None:
    """As `module.half().float()` does: it assigns .data twice, and the weights are rounded."""
    weights = on_device()
    for _ in range(20):
        layer = nn.ParameterList([nn.Parameter(torch.randn(101, 10, device=device))])
        assert_current(weights._replace(genes=layer[0]))
        layer.bfloat16().float()
        assert_current(weights._replace(genes=layer[0]))


def test_a_transposed_view_is_another_weight(
    on_device: MakeWeights, assert_current: AssertCurrent
) -> None:
    weights = on_device()
    before = assert_current(weights)
    cross = weights.cross._replace(out_weight=weights.cross.out_weight.T)
    assert not torch.equal(assert_current(weights._replace(cross=cross)), before)


def test_heads_are_part_of_the_weights(
    on_device: MakeWeights, assert_current: AssertCurrent
) -> None:
    weights = on_device(heads=2, head_dim=5)
    before = assert_current(weights)
    assert not torch.equal(assert_current(weights._replace(heads=5)), before)


def test_only_the_last_two_sets_of_weights_are_kept(
    on_device: MakeWeights,
    assert_current: AssertCurrent,
    module: ModuleType,
    choices: tuple[torch.dtype, ...],
) -> None:
    several = [on_device(seed) for seed in range(4)]
    for weights in several:
        assert_current(weights)
    assert len(module.kept._kept) == 2
    kept = [weights.genes.data_ptr() for weights, *_ in module.kept._kept.values()]
    assert kept == [weights.genes.data_ptr() for weights in several[-2:]]
    assert module.kept.of(several[-1], *choices) is module.kept.of(several[-1], *choices)
    module.kept.forget()
    assert len(module.kept._kept) == 0


def test_many_callers_with_many_weights(
    on_device: MakeWeights, module: ModuleType, choices: tuple[torch.dtype, ...]
) -> None:
    """None drops what another is using."""
    several = [on_device(seed, genes=7) for seed in range(5)]
    failures: list[Exception] = []

    def call(step: int) -> None:
        try:
            for i in range(100):
                module.kept.of(several[(i * step) % 5], *choices)
        except KeyError as error:
            failures.append(error)

    module.kept.of(several[0], *choices)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    callers = [threading.Thread(target=call, args=(step,)) for step in (1, 2, 3, 4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    sys.setswitchinterval(before)
    for failure in failures:
        raise failure


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_steps_of_fused_optimizers_are_noticed(
    on_device: MakeWeights, assert_current: Callable[..., Tensor], optimizer: Callable[..., Any]
) -> None:
    """They change weights without counting it."""
    weights = on_device(genes=11)
    parameter = nn.Parameter(weights.genes)  # shares its memory
    weights = weights._replace(genes=parameter)
    before = assert_current(weights)
    parameter.grad = torch.ones_like(parameter)
    optimizer([parameter], lr=0.1, fused=True).step()
    assert not torch.equal(assert_current(weights), before)
