"""The public functions of ragged attention: what they compute, and what they refuse."""

from __future__ import annotations

import doctest
import math
from typing import Any

import numpy as np
import pytest
import torch
from cellpatch_fast.kernels import (
    attention,
    ragged_cross_attention,
    ragged_gather_cross_attention,
    reference,
)
from cellpatch_fast.kernels.ragged import RaggedAttention
from torch import Tensor, nn

LENGTHS = [5, 0, 19, 1]
CELLS, ENTRIES, ROWS, QUERIES, HEADS, HEAD_DIM = len(LENGTHS), sum(LENGTHS), 11, 7, 3, 13
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(*shape, generator=generator)


Given = dict[str, Any]  # arguments by name; all but a few are tensors


def per_entry(shared: bool = True) -> Given:
    return {
        "query": normal(1 if shared else CELLS, QUERIES, HEADS, HEAD_DIM),
        "key": normal(ENTRIES, HEADS, HEAD_DIM),
        "value": normal(ENTRIES, HEADS, HEAD_DIM, seed=1),
        "offsets": OFFSETS,
    }


def gathered() -> Given:
    return {
        "query": normal(1, QUERIES, HEADS, HEAD_DIM),
        "key_table": normal(ROWS, HEADS, HEAD_DIM),
        "value_table": normal(ROWS, HEADS, HEAD_DIM, seed=1),
        "ids": (normal(ENTRIES).abs() * 100).long() % ROWS,
        "offsets": OFFSETS,
        "amounts": normal(ENTRIES, seed=2).abs(),
        "key_part": normal(HEADS, HEAD_DIM),
        "value_part": normal(HEADS, HEAD_DIM, seed=1),
        "bias": normal(ENTRIES, HEADS, seed=3),
    }


def on(device: torch.device, given: Given, *gradients: str) -> Given:
    """The arguments on a device, new leaves for those that shall have gradients."""
    there = {name: tensor.to(device) for name, tensor in given.items()}
    return {
        name: tensor.clone().requires_grad_() if name in gradients else tensor
        for name, tensor in there.items()
    }


def assert_near(found: Tensor, expected: Tensor) -> None:
    difference = (found.cpu().double() - expected.cpu().double()).norm()
    assert difference <= 1e-5 * expected.double().norm()


# --- what is computed --------------------------------------------------------------------------


def by_definition(given: Given) -> tuple[np.ndarray, np.ndarray]:
    """Loops in NumPy."""
    a = {name: tensor.double().numpy() for name, tensor in given.items()}
    offsets = OFFSETS.numpy()
    output = np.zeros((CELLS, QUERIES, HEADS, HEAD_DIM))
    log_sum_exp = np.full((CELLS, HEADS, QUERIES), -np.inf)
    for c in range(CELLS):
        for h in range(HEADS):
            for q in range(QUERIES):
                query = a["query"][c if len(a["query"]) > 1 else 0, q, h]
                scores, rows = [], []
                for i in range(offsets[c], offsets[c + 1]):
                    if "ids" in a:
                        row, amount = int(a["ids"][i]), a["amounts"][i]
                        key = a["key_table"][row, h] + amount * a["key_part"][h]
                        value = a["value_table"][row, h] + amount * a["value_part"][h]
                    else:
                        key, value = a["key"][i, h], a["value"][i, h]
                    bias = a["bias"][i, h] if "bias" in a else 0
                    scores.append(query @ key / math.sqrt(HEAD_DIM) + bias)
                    rows.append(value)
                if scores:
                    weights = np.exp(scores)
                    log_sum_exp[c, h, q] = np.log(weights.sum())
                    output[c, q, h] = weights @ rows / weights.sum()
    return output, log_sum_exp


@pytest.mark.parametrize("shared", [True, False], ids=["learned_queries", "queries_per_cell"])
def test_cross_attention_is_its_definition(
    backend: str, device: torch.device, shared: bool
) -> None:
    given = per_entry(shared)
    for name in ("reference", backend):
        found = ragged_cross_attention(**on(device, given), backend=name)
        output, log_sum_exp = by_definition(given)
        assert_near(found.output, torch.from_numpy(output))
        torch.testing.assert_close(
            found.log_sum_exp.cpu().double(), torch.from_numpy(log_sum_exp), rtol=1e-5, atol=1e-5
        )


def test_gather_is_its_definition(backend: str, device: torch.device) -> None:
    given = gathered()
    for name in ("reference", backend):
        found = ragged_gather_cross_attention(**on(device, given), backend=name)
        output, _ = by_definition(given)
        assert_near(found.output, torch.from_numpy(output))


def test_a_cell_without_entries_attends_to_nothing(backend: str, device: torch.device) -> None:
    given = on(device, per_entry(), "query", "key", "value")
    found = ragged_cross_attention(**given, backend=backend)
    assert torch.equal(found.output[1], torch.zeros_like(found.output[1]))
    assert (found.log_sum_exp[1] == -math.inf).all()
    found.output.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in given.values() if tensor.requires_grad)


def test_bins_are_rows_of_the_parts(backend: str, device: torch.device) -> None:
    given = gathered()
    bins = (given["amounts"] * 2).to(torch.uint8) % 5
    parts = {name: normal(5, HEADS, HEAD_DIM, seed=s) for s, name in enumerate(PARTS)}
    found = ragged_gather_cross_attention(
        **on(device, {**given, "amounts": bins, **parts}), backend=backend
    )
    for name in PARTS:  # the same by hand: a row of the table for each pair of row and bin
        table = given[name.replace("part", "table")]
        given[name.replace("part", "table")] = (table[:, None] + parts[name]).flatten(0, 1)
    given["ids"] = given["ids"] * 5 + bins
    expected = ragged_gather_cross_attention(
        **{name: tensor for name, tensor in given.items() if name not in (*PARTS, "amounts")},
        backend="reference",
    )
    assert_near(found.output, expected.output)


PARTS = ("key_part", "value_part")
TENSORS = ("query", "key_table", "value_table", *PARTS, "bias")


def gradients_of(given: Given, backend: str, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(17)
    leaves = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
    found = ragged_gather_cross_attention(**given, backend=backend, **options)
    weight = normal(*found.output.shape).to(found.output)
    total = (found.output * weight).sum() + found.log_sum_exp[[0, 2, 3]].square().sum()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_the_definition(
    backend: str, device: torch.device, dropout: float
) -> None:
    """Of the output and of the log-sum-exp, with the same weights dropped."""
    found = gradients_of(on(device, gathered(), *TENSORS), backend, dropout=dropout)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in gathered().items()}
    if device.type == "cpu":  # the seed of dropped weights comes from the device's generator
        expected = gradients_of(on(device, exact, *TENSORS), "reference", dropout=dropout)
        for name in TENSORS:
            assert_near(found[name], expected[name])
    assert all(gradient.any() for gradient in found.values())


def test_the_reference_has_the_right_gradients() -> None:
    """Against finite differences, with everything that has a gradient."""
    given = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in gathered().items()
    }
    given["bias"][3] = -math.inf

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        found = ragged_gather_cross_attention(
            **{**given, **dict(zip(TENSORS[:-1], tensors, strict=True))},
            dropout=0.2, backend="reference",
        )  # fmt: skip
        return found.output, found.log_sum_exp[[0, 2, 3]]

    leaves = [given[name].clone().requires_grad_() for name in TENSORS[:-1]]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_softmaxes_over_parts_combine_to_the_whole(backend: str, device: torch.device) -> None:
    """By their log-sum-exps, gradients included: what they are returned for."""
    given = on(device, per_entry(), "query", "key", "value")
    whole = ragged_cross_attention(**given, backend=backend)
    half = [5, 0, 6, 0]
    places = [range(first, first + n) for first, n in zip(OFFSETS.tolist(), half, strict=False)]
    inside = torch.tensor([i for place in places for i in place], device=device)
    outside = torch.tensor(sorted(set(range(ENTRIES)) - set(inside.tolist())), device=device)
    counts = (half, [n - m for n, m in zip(LENGTHS, half, strict=True)])
    parts = [
        ragged_cross_attention(
            given["query"], given["key"][chosen], given["value"][chosen],
            torch.tensor([0, *count], device=device).cumsum(0), backend=backend,
        )
        for chosen, count in zip((inside, outside), counts, strict=True)
    ]  # fmt: skip
    cells = [0, 2, 3]  # the empty one has no parts
    shares = torch.softmax(torch.stack([part.log_sum_exp[cells] for part in parts]), 0)
    combined = sum(
        share.transpose(1, 2)[..., None] * part.output[cells]
        for share, part in zip(shares, parts, strict=True)
    )
    assert isinstance(combined, Tensor)
    assert_near(combined.detach(), whole.output[cells].detach())
    leaves = [given[name] for name in ("query", "key", "value")]
    expected = torch.autograd.grad(whole.output[cells].square().sum(), leaves)
    for one, right in zip(
        torch.autograd.grad(combined.square().sum(), leaves), expected, strict=True
    ):
        assert (one - right).norm() <= 1e-4 * right.norm()  # two float32 results


def test_dropped_weights_follow_pytorch_s_seed(backend: str, device: torch.device) -> None:
    given = on(device, per_entry())

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ragged_cross_attention(**given, dropout=0.5, backend=backend).output

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_philox_gives_the_published_words() -> None:
    """The known answers of the Random123 library."""
    words = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    found = reference._philox([torch.tensor([word]) for word in words], 0x299F31D0A4093822)
    assert [int(word) for word in found] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    ones = reference._philox([torch.tensor([2**32 - 1])] * 4, -1)
    assert [int(word) for word in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_kept_weights_are_as_many_as_asked_and_unlike_each_other() -> None:
    queries, heads = 5, 3
    given = RaggedAttention(
        torch.zeros(1, queries, heads, 2), torch.zeros(0, heads, 2), torch.zeros(0, heads, 2),
        OFFSETS, None, None, None, None, None, torch.tensor([7]), 1.0, 0.25,
    )  # fmt: skip
    kept = reference.kept(given, torch.arange(2).repeat_interleave(2000), torch.arange(4000) % 2000)
    assert abs(float(kept.double().mean()) - 0.75) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())
    columns = kept.unflatten(0, (2, 2000)).movedim(1, -1).flatten(0, -2)  # [cell · h · q, n]
    agreement = (columns[:, None] == columns[None]).double().mean(-1)
    assert agreement.fill_diagonal_(0).max() < 0.625 + 5 * math.sqrt(0.25 / 2000)


def test_autocast_chooses_the_type(device: torch.device, backend: str) -> None:
    given = on(device, gathered(), "key_table")
    with torch.autocast(device.type, torch.float16):
        found = ragged_gather_cross_attention(**given, backend=backend)
    assert found.output.dtype == torch.float16
    assert found.log_sum_exp.dtype == torch.float32
    found.output.float().square().sum().backward()
    assert given["key_table"].grad is not None
    assert given["key_table"].grad.dtype == torch.float32


def test_examples_in_docstrings_run() -> None:
    found = doctest.testmod(attention, extraglobs={"torch": torch})
    assert found.attempted > 10
    assert found.failed == 0


# --- in another code base ----------------------------------------------------------------------


class Pooling(nn.Module):
    """Set Transformer's pooling by multihead attention: seeds attend over a set's elements."""

    def __init__(self, dim: int, heads: int, seeds: int) -> None:
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(1, seeds, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def attend(self, sets: list[Tensor]) -> Tensor:
        """As everybody writes it: pad, and mask the padding."""
        padded = nn.utils.rnn.pad_sequence(sets, batch_first=True)
        lengths = torch.tensor([len(one) for one in sets])
        beyond = torch.arange(padded.shape[1]) >= lengths[:, None]
        seeds = self.seeds.expand(len(sets), -1, -1)
        return self.attention(seeds, padded, padded, key_padding_mask=beyond)[0]

    def forward(self, sets: list[Tensor]) -> Tensor:
        return self.norm(self.seeds + self.attend(sets))


class RaggedPooling(Pooling):
    """The same with the attention replaced."""

    backend: str | None = None

    def attend(self, sets: list[Tensor]) -> Tensor:
        weights = self.attention.in_proj_weight.chunk(3)
        biases = self.attention.in_proj_bias.chunk(3)
        elements = torch.cat(sets)
        query, key, value = (
            nn.functional.linear(x, weight, bias).unflatten(-1, (self.attention.num_heads, -1))
            for x, weight, bias in zip(
                (self.seeds, elements, elements), weights, biases, strict=True
            )
        )
        offsets = torch.tensor([0, *(len(one) for one in sets)]).cumsum(0)
        found = ragged_cross_attention(query, key, value, offsets, backend=self.backend)
        return self.attention.out_proj(found.output.flatten(2))


def test_a_set_transformer_trains_the_same(backend: str, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("the sets of this test are on the CPU")
    torch.manual_seed(5)
    plain = Pooling(dim=22, heads=2, seeds=3)
    ragged = RaggedPooling(dim=22, heads=2, seeds=3)
    ragged.load_state_dict(plain.state_dict())
    ragged.backend = backend
    sets = [normal(n, 22) for n in (5, 1, 17)]
    losses: list[list[float]] = []
    for model in (plain, ragged):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for _ in range(4):
            optimiser.zero_grad()
            loss = (model(sets) - 1).square().mean()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0][0] > losses[0][-1]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


# --- what is refused ---------------------------------------------------------------------------

WRONG: list[Any] = [
    pytest.param({"query": normal(QUERIES, HEADS, HEAD_DIM)}, r"query must be \[1 or", id="query"),
    pytest.param(
        {"query": normal(3, QUERIES, HEADS, HEAD_DIM)}, "3 sets of queries, but.* 4 cells",
        id="number_of_queries",
    ),
    pytest.param(
        {"key_table": normal(ROWS, HEADS, 12)}, r"key_table must be.*\[3, 13\].*12", id="head_dim"
    ),
    pytest.param(
        {"value_table": normal(10, HEADS, HEAD_DIM)}, r"value_table must be.*as many rows",
        id="rows",
    ),
    pytest.param({"ids": normal(ENTRIES)}, "ids must be.*float32", id="ids"),
    pytest.param({"ids": torch.full((ENTRIES,), ROWS)}, "ids run from 11 to 11, .*10", id="id"),
    pytest.param({"ids": torch.full((ENTRIES,), -1)}, "ids run from -1", id="negative_id"),
    pytest.param({"offsets": OFFSETS.float()}, "offsets must be int32 or int64", id="offsets"),
    pytest.param({"offsets": OFFSETS + 1}, "from 0 to the number of entries, 25", id="beyond"),
    pytest.param(
        {"offsets": torch.tensor([0, 6, 5, 24, 25])}, "offsets must not decrease", id="decreasing"
    ),
    pytest.param({"amounts": normal(3)}, r"amounts must be \[entries\], here \[25\]", id="amounts"),
    pytest.param({"value_part": None}, "belong together", id="half_of_the_parts"),
    pytest.param({"key_part": normal(HEADS, 5)}, "key_part and value_part must both", id="part"),
    pytest.param(
        {name: normal(5, HEADS, HEAD_DIM) for name in PARTS}, "bin need uint8 amounts",
        id="bins_of_floats",
    ),
    pytest.param(
        {
            **{name: normal(5, HEADS, HEAD_DIM) for name in PARTS},
            "amounts": torch.full((ENTRIES,), 5, dtype=torch.uint8),
        },
        "largest amount is 5, but there are 5 bins", id="bin",
    ),
    pytest.param({"bias": normal(ENTRIES, 2)}, r"bias must be.*\[25, 3\]; found.*2", id="bias"),
    pytest.param({"key_table": normal(ROWS, HEADS, HEAD_DIM).half()}, "one dtype", id="dtypes"),
    pytest.param({"dropout": 1.0}, "dropout must be at least 0 and below 1", id="dropout"),
    pytest.param({"backend": "cuda"}, "unknown backend 'cuda'", id="unknown_backend"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    for backend in ("reference", "numba"):
        with pytest.raises(ValueError, match=message):
            ragged_gather_cross_attention(**{**gathered(), "backend": backend, **change})


def test_integers_are_no_queries() -> None:
    with pytest.raises(ValueError, match=r"query must be float16.*found torch.int64"):
        ragged_cross_attention(**{name: tensor.long() for name, tensor in per_entry().items()})


def test_wide_heads_need_the_reference(backend: str, device: torch.device) -> None:
    given = on(device, {"query": normal(1, 2, 1, 129), "key": normal(3, 1, 129)})
    given |= {"value": given["key"], "offsets": torch.tensor([0, 3], device=device)}
    with pytest.raises(ValueError, match=r"head_dim of 1 to 128, found 129: use.*reference"):
        ragged_cross_attention(**given, backend=backend)
    assert ragged_cross_attention(**given, backend="reference").output.shape == (1, 2, 1, 129)


def test_float64_is_the_reference_s(backend: str, device: torch.device) -> None:
    given = {name: t.double() if t.is_floating_point() else t for name, t in per_entry().items()}
    given = on(device, given)
    assert ragged_cross_attention(**given).output.dtype == torch.float64
    with pytest.raises(ValueError, match=f"{backend} backend computes in float32"):
        ragged_cross_attention(**given, backend=backend)


def test_amounts_have_gradients_only_from_the_reference() -> None:
    given = on(torch.device("cpu"), gathered(), "amounts")
    with pytest.raises(ValueError, match="amounts receive no gradient: use backend='reference'"):
        ragged_gather_cross_attention(**given, backend="numba")
    ragged_gather_cross_attention(**given, backend="reference").output.sum().backward()
    assert given["amounts"].grad is not None
    assert given["amounts"].grad.any()
