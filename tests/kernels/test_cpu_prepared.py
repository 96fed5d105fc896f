"""Tables are kept between calls, and always belong to the weights as they are now."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
import torch
from cellpatch_fast.kernels import EncoderWeights, encode, reference
from cellpatch_fast.kernels.cpu import encoder
from torch import Tensor, nn

from cellpatch_fast.cells import RaggedCells

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
AsType = Callable[[EncoderWeights, torch.dtype], EncoderWeights]
Errors = Callable[[Tensor, Tensor], Tensor]


def run(weights: EncoderWeights, cells: RaggedCells) -> Tensor:
    with torch.no_grad():
        return encode(weights, cells.offsets, cells.genes, cells.values, backend="numba").features


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    encoder.kept.forget()


@pytest.fixture
def assert_current(
    random_cells: MakeCells, as_type: AsType, cell_errors: Errors
) -> Callable[[EncoderWeights], Tensor]:
    """Asserts that features are those of the weights as they are now, and returns them."""
    cells = random_cells([5, 17, 2], genes=7)

    def check(weights: EncoderWeights) -> Tensor:
        with torch.no_grad():
            expected = reference.encode(
                as_type(weights, torch.float64), cells.offsets, cells.genes, cells.values
            )
        features = run(weights, cells)
        assert cell_errors(features, expected.features).max() <= 1e-5, "tables are out of date"
        return features

    return check


AssertCurrent = Callable[[EncoderWeights], Tensor]


def with_parameters(weights: EncoderWeights) -> tuple[EncoderWeights, nn.ParameterList]:
    tensors, structure = weights.flatten()
    parameters = nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])
    return EncoderWeights.unflatten([*parameters], structure), parameters


@pytest.mark.parametrize("bins", [None, 6])
def test_every_weight_changed_in_place_is_noticed(
    random_weights: MakeWeights, assert_current: AssertCurrent, bins: int | None
) -> None:
    weights, parameters = with_parameters(random_weights(bins=bins))
    before = assert_current(weights)
    for parameter in parameters:
        with torch.no_grad():
            parameter.mul_(1.5).add_(0.25)
        after = assert_current(weights)
        assert not torch.equal(after, before)
        before = after


def test_steps_of_an_optimizer_are_noticed(
    random_weights: MakeWeights, random_cells: MakeCells, assert_current: AssertCurrent
) -> None:
    weights, parameters = with_parameters(random_weights())
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    cells = random_cells([5, 17, 2])
    for _ in range(3):
        assert_current(weights)
        optimizer.zero_grad()
        encode(weights, cells.offsets, cells.genes, cells.values).features.square().sum().backward()
        optimizer.step()
    assert_current(weights)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_noticed(
    random_weights: MakeWeights, assert_current: AssertCurrent, assign: bool
) -> None:
    weights, parameters = with_parameters(random_weights())
    before = assert_current(weights)
    _, other = with_parameters(random_weights(seed=1))
    parameters.load_state_dict(other.state_dict(), assign=assign)
    loaded = EncoderWeights.unflatten([*parameters], weights.flatten()[1])
    assert not torch.equal(assert_current(loaded), before)


def test_changes_in_inference_mode_are_noticed(
    random_weights: MakeWeights, assert_current: AssertCurrent
) -> None:
    weights, parameters = with_parameters(random_weights())
    before = assert_current(weights)
    with torch.inference_mode():
        parameters[0].mul_(2)
        assert not torch.equal(assert_current(weights), before)


def test_inference_tensors_are_noticed(
    random_weights: MakeWeights, assert_current: AssertCurrent
) -> None:
    """They count no versions."""
    with torch.inference_mode():
        weights = random_weights()
        before = assert_current(weights)
        weights.genes.mul_(2)
        assert not torch.equal(assert_current(weights), before)


def test_a_new_tensor_at_an_old_address_is_noticed(
    random_weights: MakeWeights, assert_current: AssertCurrent
) -> None:
    weights = random_weights()
    addresses: set[int] = set()
    for _ in range(100):
        genes = torch.randn(101, 10)
        assert_current(weights._replace(genes=genes))
        if genes.data_ptr() in addresses:
            return
        addresses.add(genes.data_ptr())
    pytest.skip("this machine gives no address twice")


def test_new_data_of_a_parameter_is_noticed(
    random_weights: MakeWeights, assert_current: AssertCurrent
) -> None:
    """`p.data = ...` counts no version and frees memory, which the next data may get."""
    genes = nn.Parameter(torch.randn(101, 10))
    weights = random_weights()._replace(genes=genes)
    for _ in range(50):
        assert_current(weights)
        genes.data = torch.randn(101, 10)


def test_a_module_converted_there_and_back_is_noticed(
    random_weights: MakeWeights, assert_current: AssertCurrent
) -> None:
    """As `module.half().float()` does: it assigns .data twice, and the weights are rounded."""
    weights = random_weights()
    for _ in range(20):
        module = nn.ParameterList([nn.Parameter(torch.randn(101, 10))])
        assert_current(weights._replace(genes=module[0]))
        module.bfloat16().float()
        assert_current(weights._replace(genes=module[0]))


def test_a_transposed_view_is_another_weight(
    random_weights: MakeWeights, assert_current: AssertCurrent
) -> None:
    weights = random_weights()
    before = assert_current(weights)
    cross = weights.cross._replace(out_weight=weights.cross.out_weight.T)
    assert not torch.equal(assert_current(weights._replace(cross=cross)), before)


def test_heads_are_part_of_the_weights(
    random_weights: MakeWeights, assert_current: AssertCurrent
) -> None:
    weights = random_weights(heads=2, head_dim=5)
    before = assert_current(weights)
    assert not torch.equal(assert_current(weights._replace(heads=5)), before)


def test_only_the_last_two_sets_of_weights_are_kept(
    random_weights: MakeWeights, assert_current: AssertCurrent
) -> None:
    several = [random_weights(seed) for seed in range(4)]
    for weights in several:
        assert_current(weights)
    assert len(encoder.kept._kept) == 2
    kept = [weights.genes.data_ptr() for weights, *_ in encoder.kept._kept.values()]
    assert kept == [weights.genes.data_ptr() for weights in several[-2:]]
    assert encoder.kept.of(several[-1]) is encoder.kept.of(several[-1])
    encoder.kept.forget()
    assert len(encoder.kept._kept) == 0


def test_many_callers_with_many_weights(random_weights: MakeWeights) -> None:
    """None drops what another is using."""
    several = [random_weights(seed, genes=7) for seed in range(5)]
    failures: list[Exception] = []

    def call(step: int) -> None:
        try:
            for i in range(100):
                encoder.kept.of(several[(i * step) % 5])
        except KeyError as error:
            failures.append(error)

    encoder.kept.of(several[0])
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
