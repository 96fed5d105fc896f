"""The fast backends' rest of the encoder against the reference in float64.

Cells without entries make the cross-attention a constant, so that what is tested here is the
blocks alone; `test_attention` has what goes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cellpatch_fast.kernels import Encoded, EncoderWeights

from cellpatch_fast.cells import RaggedCells

MakeWeights = Callable[..., EncoderWeights]
MakeCells = Callable[..., RaggedCells]
Run = Callable[..., Encoded]
Compare = Callable[..., Encoded]


@pytest.mark.parametrize("self_blocks", [0, 1, 3])
@pytest.mark.parametrize(
    "dimensions",
    [
        pytest.param({"head_dim": 16, "patches": 64, "mlp_dim": 64, "projection": 10}, id="paper"),
        pytest.param({"projection": None}, id="without_projection"),
        pytest.param({"projection": 29}, id="projection_wider_than_the_model"),
        pytest.param({"heads": 3, "head_dim": 20, "patches": 37, "mlp_dim": 7}, id="narrow_mlp"),
        pytest.param({"heads": 7, "head_dim": 3, "patches": 17, "mlp_dim": 71}, id="many_heads"),
        pytest.param({"heads": 1, "head_dim": 2, "patches": 1, "mlp_dim": 1}, id="smallest"),
        pytest.param({"patches": 131}, id="more_patches_than_two_tiles"),
    ],
)
def test_blocks_are_the_reference_s(
    random_weights: MakeWeights,
    random_cells: MakeCells,
    compare: Compare,
    interpreted: bool,
    dimensions: dict[str, Any],
    self_blocks: int,
) -> None:
    weights = random_weights(5, **dimensions, self_blocks=self_blocks)
    if interpreted:
        compare(weights, random_cells([11]))
        return
    cells = random_cells([0, 11, 0, 83])
    compare(weights, cells)
    compare(weights, cells, attention=True)


def test_self_attention_to_one_patch_alone(
    random_weights: MakeWeights, random_cells: MakeCells, run: Run, compare: Compare
) -> None:
    """Scores among patches of hundreds: all but one weight underflow, none overflows."""
    weights = random_weights()
    weights.self_blocks[0].in_weight[:20] *= 12
    cells = random_cells([41, 0, 1])
    found = run(weights, cells, attention=True)
    assert found.self_attention is not None
    assert found.self_attention[0].min() < 1e-40
    compare(weights, cells)


def test_features_of_nearly_constant_state(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare
) -> None:
    """A norm whose deviation is near its epsilon, which both have to add in the same place."""
    weights = random_weights(self_blocks=0)
    for tensor in (weights.patches, weights.cross.out_weight, weights.cross.out_bias):
        tensor *= 1e-3
    compare(weights, random_cells([41, 0, 1]))


def test_mlps_of_different_widths_are_computed_or_refused(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare, backend: str
) -> None:
    weights = random_weights(mlp_dim=11)._replace(
        self_blocks=random_weights(mlp_dim=17).self_blocks
    )
    if backend == "numba":
        with pytest.raises(ValueError, match="numba backend needs blocks of one shape"):
            compare(weights, random_cells([5, 7]))
    else:
        compare(weights, random_cells([5, 7]))


def test_projection_without_bias(
    random_weights: MakeWeights, random_cells: MakeCells, compare: Compare
) -> None:
    compare(random_weights()._replace(projection_bias=None), random_cells([5, 7]))
