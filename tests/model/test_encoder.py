"""CellPatch computes what its definition says, refuses what does not fit, and is a good module."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cellpatch_fast.cells import RaggedCells
from cellpatch_fast.config import CellPatchConfig
from cellpatch_fast.errors import InputError
from cellpatch_fast.genes import GeneVocabulary
from cellpatch_fast.model import CellPatch, pool
from cellpatch_fast.model.original_names import original_name

SMALL = CellPatchConfig(max_genes=601, patches=7, dim=22, heads=2, mlp_dim=13, projection_dim=5)
LENGTHS = [3, 0, 31, 1, 17]
WB = ("weight", "bias")


def random_cells(seed: int = 0, genes: int = 600, bins: int | None = None) -> RaggedCells:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    entries = int(offsets[-1])
    tokens = torch.randint(1, genes, (entries,), generator=generator).to(torch.uint16)
    if bins is None:
        return RaggedCells(offsets, tokens, 5 * torch.rand(entries, generator=generator))
    values = torch.randint(0, bins, (entries,), generator=generator).to(torch.uint8)
    return RaggedCells(offsets, tokens, values)


@pytest.fixture
def model(vocabulary: GeneVocabulary) -> CellPatch:
    torch.manual_seed(11)
    return CellPatch(SMALL, vocabulary).eval()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


# --- right -------------------------------------------------------------------------------------


def test_original_outputs_alone(
    original: Any, files: Callable[..., Any], backend: str, device: torch.device
) -> None:
    model = CellPatch.from_original(**files(original)).to(device)
    with torch.inference_mode():
        features = model.encode(original.cells().to(device), backend=backend).cpu()
    for cell, expected in enumerate(original.alone("embedding")):
        assert_close(features[cell], expected)


def test_original_attention_alone(
    pretrain: Any, files: Callable[..., Any], backend: str, device: torch.device
) -> None:
    model, cells = CellPatch.from_original(**files(pretrain)).to(device), pretrain.cells()
    with torch.inference_mode():
        encoded = model.encode_with_attention(cells.to(device), backend=backend)
    assert encoded.cross_attention is not None
    cross = encoded.cross_attention.cpu()
    for cell, expected in enumerate(pretrain.alone("attention")):
        start, stop = cells.offsets[cell : cell + 2]
        assert_close(cross[start:stop].mean(1).T, expected)


def test_padded_length_reproduces_padded_outputs(
    original: Any, files: Callable[..., Any], backend: str, device: torch.device
) -> None:
    model = CellPatch.from_original(**files(original), padded_length=90).to(device)
    with torch.inference_mode():
        features = model.encode(original.cells().to(device), backend=backend)
    assert_close(features.cpu(), original.arrays["embedding_padded"])


def test_cells_beyond_padded_length_have_no_pads_and_are_not_cut(
    original: Any, files: Callable[..., Any]
) -> None:
    paths, cells = files(original), original.cells()
    with torch.inference_mode():
        padded = CellPatch.from_original(**paths, padded_length=50).encode(cells)
        plain = CellPatch.from_original(**paths).encode(cells)
    longer = cells.lengths >= 50
    assert longer.tolist() == [False, True, False, True]
    assert_close(padded[longer], plain[longer], tolerance=1e-6)
    assert (padded[~longer] - plain[~longer]).norm() > 0.01 * plain[~longer].norm()


def test_binned_values_equal_the_affine_values_of_their_bins(
    model: CellPatch, vocabulary: GeneVocabulary, backend: str, device: torch.device
) -> None:
    cells = random_cells(bins=6).to(device)
    model.to(device)
    binned = CellPatch(CellPatchConfig(**{**vars(SMALL), "value_embedding": "binned"}), vocabulary)
    binned.eval().to(device)
    assert isinstance(binned.value_embedding, nn.Embedding)
    with torch.no_grad():
        table = model.value_embedding(torch.arange(6.0, device=device)[:, None])
        state = {n: t for n, t in model.state_dict().items() if "value_embedding" not in n}
        binned.load_state_dict({**state, "value_embedding.weight": table})
        expected = model.encode(cells, backend=backend)
        assert_close(binned.encode(cells, backend=backend), expected, tolerance=1e-6)


def test_empty_cells_keep_their_row_and_are_finite(
    model: CellPatch, backend: str, device: torch.device
) -> None:
    cells = random_cells().to(device)
    model.to(device)
    with torch.inference_mode():
        features = model.encode(cells, backend=backend)
        nothing = model.encode(cells.slice(0, 0), backend=backend)
        empty = model.encode(cells.slice(1, 2), backend=backend)
    assert features.shape == (5, 7, 5)
    assert features.isfinite().all()
    assert_close(features[1], empty[0], tolerance=1e-6)
    assert nothing.shape == (0, 7, 5)


def test_double_precision(model: CellPatch) -> None:
    with torch.inference_mode():
        single = model.encode(random_cells(), backend="reference")
    model.double()
    with torch.inference_mode():
        double = model.encode(random_cells())
        fast = model.encode(random_cells(), backend="numba")
    assert double.dtype == torch.float64
    assert (single - double).norm() <= 1e-6 * double.norm()
    # computed in fp64, not cast: the fast backend's fp32 differs
    assert 1e-9 * double.norm() < (fast - double).norm() <= 1e-5 * double.norm()


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_results_have_the_parameters_dtype(
    model: CellPatch, backend: str, device: torch.device, dtype: torch.dtype, default: bool
) -> None:
    if (backend, device.type, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter computes bfloat16 products wrongly")
    model.to(device, dtype)
    with torch.inference_mode():
        encoded = model.encode_with_attention(
            random_cells().to(device), backend=None if default else backend
        )
    assert encoded.self_attention is not None
    tensors = [*encoded[:3], *encoded.self_attention]
    assert {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)} == {dtype}
    assert len(tensors) == 5


# --- gradients and training --------------------------------------------------------------------


def test_gradients_are_those_of_the_original(
    original: Any, files: Callable[..., Any], live: Callable[..., Any]
) -> None:
    """fp64, every encoder parameter; each cell alone in the original."""
    ours = CellPatch.from_original(**files(original)).double()
    theirs = live(original).double()
    torch.manual_seed(2)
    factors = torch.randn(4, 64, ours.config.output_dim, dtype=torch.float64)
    (ours.encode(original.cells()) * factors).sum().backward()
    for cell, length in enumerate(original.arrays["lengths"]):
        values = original.values[cell, None, :length].double()
        features = theirs.get_mid_embeding(values, original.genes[cell, None, :length])
        (features[0] * factors[cell]).sum().backward()
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(original_name(name)).grad.reshape(parameter.shape)
        assert parameter.grad is not None
        # the largest gradient sets the scale: that of the key biases is exactly 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)


def test_training_drops_attention_also_without_gradients(
    model: CellPatch, vocabulary: GeneVocabulary
) -> None:
    cells = random_cells()
    expected = model.encode(cells)
    model.train()
    with torch.no_grad():
        assert not torch.equal(model.encode(cells), model.encode(cells))
    without = CellPatch(CellPatchConfig(**{**vars(SMALL), "attention_dropout": 0.0}), vocabulary)
    without.load_state_dict(model.state_dict())
    assert_close(without.train().encode(cells), expected, tolerance=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_fast_backend_trains(vocabulary: GeneVocabulary, dropout: float) -> None:
    """A few steps towards a target, and with the same gradients as the reference's."""
    torch.manual_seed(3)
    config = CellPatchConfig(**{**vars(SMALL), "attention_dropout": dropout})
    model, cells = CellPatch(config, vocabulary).train(), random_cells()
    gradients = []
    for backend in ("numba", "reference"):
        model.zero_grad()
        model.encode(cells, backend=backend).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    if not dropout:
        for one, right in zip(*gradients, strict=True):
            assert_close(one, right, tolerance=1e-4)  # two float32 results
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = (model.encode(cells) - 1).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("gradients", [True, False])
def test_autocast_does_not_lower_the_precision(model: CellPatch, gradients: bool) -> None:
    cells = random_cells()
    with torch.set_grad_enabled(gradients):
        expected = model.encode(cells, backend="reference")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.encode(cells, backend="reference")
    assert_close(found, expected, tolerance=1e-6)


def test_new_models_are_initialised_as_the_original_is(vocabulary: GeneVocabulary) -> None:
    model = CellPatch(CellPatchConfig(), vocabulary)
    assert math.isclose(float(model.gene_embedding.weight.detach().std()), 1, rel_tol=0.01)
    assert math.isclose(float(model.patches.detach().std()), 1, rel_tol=0.1)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n}
    del matrices["patches"]
    for name, matrix in matrices.items():
        bound = math.sqrt(6 / sum(matrix.shape))  # Xavier uniform
        assert 0.9 * bound < matrix.abs().max() <= bound, name
    for name, parameter in model.named_parameters():
        if name.endswith("in_proj_bias"):
            assert not parameter.any()


def test_parameter_names(model: CellPatch) -> None:
    names = {name.replace("self_blocks.1", "self_blocks.0") for name in model.state_dict()}
    block = [
        *(f"attention.{n}" for n in ("in_proj_weight", "in_proj_bias")),
        *(f"attention.out_proj.{n}" for n in ("weight", "bias")),
        *(f"{m}.{n}" for m in ("attention_norm", "mlp.0", "mlp.2", "mlp_norm") for n in WB),
    ]
    assert names == {
        "gene_embedding.weight",
        *(f"value_embedding.{n}" for n in WB),
        "patches",
        *(f"{b}.{n}" for b in ("cross_block", "self_blocks.0") for n in block),
        *(f"projection.{n}" for n in WB),
    }


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint16, torch.uint32])
def test_tokens_beyond_the_table_are_refused(model: CellPatch, dtype: torch.dtype) -> None:
    tokens = torch.tensor([5, 600, 601], dtype=torch.int64).to(dtype)
    cells = RaggedCells(torch.tensor([0, 2, 3]), tokens, torch.ones(3))
    with pytest.raises(InputError, match=r"from 5 to 601, but .* tokens 0 to 600"):
        model.encode(cells)
    assert model.encode(cells.slice(0, 1)).shape == (1, 7, 5)


def test_negative_tokens_are_refused(model: CellPatch) -> None:
    cells = RaggedCells(torch.tensor([0, 1]), torch.tensor([-1]), torch.ones(1))
    with pytest.raises(InputError, match="tokens from -1"):
        model.encode(cells)


def test_offsets_beyond_the_entries_are_refused(model: CellPatch) -> None:
    cells = RaggedCells(torch.tensor([0, 5]), torch.tensor([1, 2]), torch.ones(2))
    with pytest.raises(ValueError, match="offsets must run from 0"):
        model.encode(cells)


def test_values_without_a_bin_are_refused(vocabulary: GeneVocabulary) -> None:
    config = CellPatchConfig(**{**vars(SMALL), "value_embedding": "binned"})
    model = CellPatch(config, vocabulary)
    with pytest.raises(InputError, match=r"binned values \(uint8\).*torch.float32"):
        model.encode(random_cells())
    with pytest.raises(InputError, match="values up to 6, but the model has bins 0 to 5"):
        model.encode(random_cells(bins=7))


def test_cells_on_another_device_are_refused(model: CellPatch) -> None:
    with pytest.raises(InputError, match="the cells are on meta, the model on cpu"):
        model.encode(random_cells().to("meta"))


def test_vocabulary_larger_than_the_embedding_is_refused(vocabulary: GeneVocabulary) -> None:
    with pytest.raises(InputError, match=r"tokens up to 599.*599 rows.*at least 600"):
        CellPatch(CellPatchConfig(max_genes=599), vocabulary)
    CellPatch(CellPatchConfig(max_genes=600), vocabulary)


def test_unknown_backend_is_refused(model: CellPatch) -> None:
    for recording in (True, False):
        with (
            torch.set_grad_enabled(recording),
            pytest.raises(ValueError, match="unknown backend 'nonsense'"),
        ):
            model.encode(random_cells(), backend="nonsense")


# --- pooling -----------------------------------------------------------------------------------


def test_pool() -> None:
    features = torch.randn(5, 7, 3, dtype=torch.float64)
    assert torch.equal(pool(features, "flatten"), features.reshape(5, 21))
    torch.testing.assert_close(pool(features, "mean"), features.mean(1))
    with pytest.raises(ValueError, match="'median': choose from flatten, mean"):
        pool(features, "median")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["flatten", "mean"])
def test_pooling_a_cell_does_not_depend_on_its_batch(how: Any) -> None:
    features = torch.randn(1009, 64, 10)
    together = pool(features, how)
    for size in (1, 7, 64):
        parts = torch.cat([pool(part, how) for part in features.split(size)])
        assert torch.equal(parts, together)


# --- a good module -----------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_parameters_of_their_own(
    model: CellPatch, duplicate: Callable[[CellPatch], CellPatch]
) -> None:
    other, cells = duplicate(model), random_cells()
    with torch.no_grad():
        before = model.encode(cells)
        assert torch.equal(other.encode(cells), before)
        other.patches.mul_(2)
        assert not torch.equal(other.encode(cells), before)
        assert torch.equal(model.encode(cells), before)
    assert (other.config, other.vocabulary) == (model.config, model.vocabulary)
