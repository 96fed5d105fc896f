"""The public functions of ragged attention: what they compute, and of use to whom."""

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

from .ragged import (
    CELLS,
    ENTRIES,
    HEAD_DIM,
    HEADS,
    LENGTHS,
    OFFSETS,
    PARTS,
    QUERIES,
    Given,
    gathered,
    normal,
    on,
    per_entry,
)


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
    """The known answers of the Random123 library, for seven rounds."""
    words = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    found = reference._philox([torch.tensor([word]) for word in words], 0x299F31D0A4093822)
    assert [int(word) for word in found] == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]
    ones = reference._philox([torch.tensor([2**32 - 1])] * 4, -1)
    assert [int(word) for word in ones] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


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


def test_autocast_leaves_float64_alone() -> None:
    given = {n: t.double() if t.is_floating_point() else t for n, t in gathered().items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = ragged_gather_cross_attention(**given)
    assert found.output.dtype == torch.float64
    assert torch.equal(found.output, ragged_gather_cross_attention(**given).output)


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
