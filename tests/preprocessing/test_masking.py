"""Masking: exact counts, uniform choices, and a cell's masks depend on its identity alone."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellpatch_fast.cells import RaggedCells
from cellpatch_fast.preprocessing.masking import MaskCounts, Masked, Masking, Measured, mask
from cellpatch_fast.preprocessing.masking_compiled import hash_integer

from .masked import (
    INPUTS,
    TYPES,
    VOCABULARY,
    assert_same,
    cells_of,
    draw_cells,
    draw_measured,
    draw_rows,
    pairs_of,
    run,
    tokens_of,
)


def predicted_of(hidden: int, masking: Masking) -> tuple[int, int]:
    """How many hidden entries and zeros a decoder is asked for, where there are enough."""
    zeros = math.floor(masking.zeros * hidden + 0.5)
    if hidden + zeros <= masking.max_decoder:
        return hidden, zeros
    kept = max(1, math.floor(masking.max_decoder / (1 + masking.zeros) + 0.5))
    return kept, masking.max_decoder - kept


def check(
    cells: RaggedCells, masked: Masked, masking: Masking, measured: Measured, inputs: list[int]
) -> None:
    """Everything that is promised of every cell, except that choices are random."""
    counts = Counter[str]()
    before, seen, asked = pairs_of(cells), pairs_of(masked.encoder), pairs_of(masked.decoder)
    assert len(before) == len(seen) == len(asked)
    for cell, shown, prompts, input_ in zip(before, seen, asked, inputs, strict=True):
        expressed = {token for token, _ in cell}
        zeros = [(token, value) for token, value in prompts if token not in expressed]
        hidden = [pair for pair in prompts if pair[0] in expressed]
        hide = math.floor(masking.hidden * len(expressed) + 0.5)
        hide = min(max(hide, 1), len(expressed) - 1) if len(expressed) > 1 else 0

        # The encoder sees entries of the cell, of other genes than the decoder is asked for.
        assert not Counter(shown) - Counter(cell)
        assert not Counter(hidden) - Counter(cell)
        assert not {token for token, _ in shown} & {token for token, _ in hidden}
        for entries in (shown, prompts):
            assert [token for token, _ in entries] == sorted(token for token, _ in entries)
        # Zeros are measured, not expressed, and each is there once.
        own = measured.tokens[measured.starts[input_] : measured.starts[input_ + 1]]
        assert {token for token, _ in zeros} <= set(own.tolist()) - expressed
        assert len({token for token, _ in zeros}) == len(zeros)
        assert all(value == 0 for _, value in zeros)

        assert len(shown) <= masking.max_encoder
        assert len(prompts) <= masking.max_decoder
        if len(expressed) == len(cell):  # otherwise it depends on which genes are hidden
            assert len(shown) == min(len(cell) - hide, masking.max_encoder)
            kept, wanted = predicted_of(hide, masking)
            assert len(hidden) == kept
            assert len(zeros) == min(wanted, len(set(own.tolist()) - expressed))
            counts["hidden"] += hide
            counts["missing_zeros"] += wanted - len(zeros)
            counts["unpredicted"] += hide - kept
        counts["unmasked_cells"] += len(expressed) < 2
        counts["zeros"] += len(zeros)
    found = masked.counts
    assert (found.zeros, found.unmasked_cells) == (counts["zeros"], counts["unmasked_cells"])
    assert found.hidden + found.unseen + masked.encoder.entries == cells.entries
    assert found.hidden - found.unpredicted + found.zeros == masked.decoder.entries
    if all(len(set(cell)) == len(cell) for cell in tokens_of(cells)):
        assert found.hidden == counts["hidden"]
        assert found.missing_zeros == counts["missing_zeros"]
        assert found.unpredicted == counts["unpredicted"]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300) | st.integers(0, 5), max_size=11),
    repeated=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    hidden=st.floats(0.01, 0.99),
    zeros=st.sampled_from([0.0, 0.5, 1.0, 7.3]) | st.floats(0, 3),
    max_encoder=st.integers(1, 400),
    max_decoder=st.integers(1, 400),
    seed=st.integers(0, 2**64 - 1),
    types=st.sampled_from([(torch.uint16, torch.uint8), (torch.int32, torch.float32)]),
    draw=st.randoms(use_true_random=False),
)
def test_every_cell_is_divided_exactly(
    lengths, repeated, hidden, zeros, max_encoder, max_decoder, seed, types, draw
) -> None:
    rows = draw_rows(lengths, seed % 1000, repeated)
    cells = cells_of(rows, genes=types[0], values=types[1])
    inputs = [draw.randrange(INPUTS) for _ in lengths]
    masking = Masking(hidden, zeros, max_encoder, max_decoder)
    measured = draw_measured()
    masked = mask(
        cells, np.arange(len(cells)), measured=measured, inputs=np.array(inputs, np.int64),
        masking=masking, seed=seed, epoch=seed % 5,
    )  # fmt: skip
    check(cells, masked, masking, measured, inputs)


@pytest.mark.parametrize(("genes", "values"), TYPES)
def test_every_type_is_kept_and_gives_the_same(genes: torch.dtype, values: torch.dtype) -> None:
    rows = draw_rows([0, 1, 2, 113, 211], repeated=0.1)
    cells = cells_of(rows, genes=genes, values=values)
    masked = run(cells)
    for part in (masked.encoder, masked.decoder):
        assert (part.genes.dtype, part.values.dtype) == (genes, values)
        assert part.offsets.dtype == torch.int64
    expected = run(cells_of(rows, genes=torch.uint16, values=torch.uint8))
    assert pairs_of(masked.encoder) == pairs_of(expected.encoder)
    assert pairs_of(masked.decoder) == pairs_of(expected.decoder)


class TestACellsMasksDependOnItsIdentityAlone:
    LENGTHS = (0, 401, 1, 2, 3, 113, 700, 5, 59, 0, 211)
    MASKING = Masking(max_encoder=97, max_decoder=89)

    def test_whatever_the_batch_and_the_order(self) -> None:
        cells = draw_cells([*self.LENGTHS], repeated=0.1)
        identities = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, len(cells))
        inputs = np.arange(len(cells)) % INPUTS
        whole = run(cells, identities, inputs=inputs, masking=self.MASKING)
        for order in ([3], [10, 1, 6], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 10]):
            some = torch.tensor(order)
            parts = run(
                cells.take(some), identities[order], inputs=inputs[order], masking=self.MASKING
            )
            assert_same(parts.encoder, whole.encoder.take(some))
            assert_same(parts.decoder, whole.decoder.take(some))

    def test_whatever_the_number_of_threads(self) -> None:
        cells = draw_cells([*self.LENGTHS] * 20)
        whole = run(cells, masking=self.MASKING)

        def part(start: int) -> Masked:
            identities = np.arange(start, start + 10)
            return run(cells.slice(start, start + 10), identities, masking=self.MASKING)

        with ThreadPoolExecutor(5) as threads:
            parts = list(threads.map(part, range(0, len(cells), 10)))
        assert_same(RaggedCells.concatenate([p.encoder for p in parts]), whole.encoder)
        assert_same(RaggedCells.concatenate([p.decoder for p in parts]), whole.decoder)
        assert sum((p.counts for p in parts), MaskCounts()) == whole.counts

    @pytest.mark.parametrize("change", ["seed", "epoch", "identity"])
    def test_and_they_change_with_it(self, change: str) -> None:
        cells = draw_cells([300])
        one = run(cells)
        identities = np.array([1 if change == "identity" else 0])
        seed, epoch = 6 if change == "seed" else 5, 3 if change == "epoch" else 2
        other = run(cells, identities, seed=seed, epoch=epoch)
        assert tokens_of(one.encoder) != tokens_of(other.encoder)
        assert tokens_of(one.decoder) != tokens_of(other.decoder)

    @pytest.mark.parametrize(("measured", "zeros"), [(22, (7, 15)), (41, (17, 33))])
    def test_they_are_the_same_on_every_machine_and_in_every_version(
        self, measured: int, zeros: tuple[int, ...]
    ) -> None:
        """Work that was interrupted ends as it would have, so these must never change."""
        cells = cells_of([list(range(0, 22, 2))], genes=torch.uint16, values=torch.uint8)
        table = np.arange(VOCABULARY)[None] < measured
        identities = np.array([12_345])
        masked = run(cells, identities, measured=Measured(table), seed=2**64 - 1, epoch=11)
        assert tokens_of(masked.encoder) == [(0, 2, 4, 6, 8, 14, 18, 20)]
        assert tokens_of(masked.decoder) == [tuple(sorted((10, 12, 16, *zeros)))]

    def test_the_hash_is_splitmix64(self) -> None:
        # the first outputs of Vigna's reference implementation from state 0
        state, found = 0, []
        for _ in range(3):
            found.append(int(hash_integer(np.uint64(state))))
            state = (state + 0x9E3779B97F4A7C15) % 2**64
        assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


class TestCaps:
    def test_the_papers_numbers(self) -> None:
        """5,000 genes: 1,500 hidden, 3,000 of 3,500 seen, 667 of 1,500 predicted, 333 zeros."""
        cells = cells_of([list(range(0, 15_000, 3))], genes=torch.uint16, values=torch.uint8)
        masked = run(cells, measured=Measured(np.ones((1, 20_011), bool)))
        assert (masked.encoder.entries, masked.decoder.entries) == (3_000, 1_000)
        assert masked.counts == MaskCounts(hidden=1_500, unseen=500, unpredicted=833, zeros=333)

    def test_a_decoder_that_has_room_for_one_entry_predicts_a_hidden_one(self) -> None:
        cells = draw_cells([100])
        masked = run(cells, masking=Masking(zeros=9, max_decoder=1))
        assert masked.counts == MaskCounts(hidden=30, unpredicted=29)
        assert set(tokens_of(masked.decoder)[0]) <= set(tokens_of(cells)[0])

    def test_what_is_hidden_but_not_predicted_stays_hidden(self) -> None:
        cells = draw_cells([100])
        capped, free = (run(cells, masking=Masking(max_decoder=most)) for most in (7, 1000))
        assert_same(capped.encoder, free.encoder)
        assert set(tokens_of(capped.decoder)[0]) - set(tokens_of(free.decoder)[0]) == set()


class TestSmallAndFullCells:
    def test_of_fewer_than_two_genes_nothing_is_hidden(self) -> None:
        cells = cells_of([[], [5], [7, 7]], genes=torch.uint16, values=torch.uint8)
        masked = run(cells, masking=Masking(hidden=0.99))
        assert_same(masked.encoder, cells)
        assert masked.decoder.lengths.tolist() == [0, 0, 0]
        assert masked.counts == MaskCounts(unmasked_cells=3)

    @pytest.mark.parametrize("hidden", [0.01, 0.99])
    def test_of_two_genes_one_is_hidden(self, hidden: float) -> None:
        masked = run(draw_cells([2]), masking=Masking(hidden, zeros=0))
        assert (masked.encoder.entries, masked.decoder.entries) == (1, 1)

    def test_no_cells(self) -> None:
        masked = run(draw_cells([]))
        assert (len(masked.encoder), len(masked.decoder)) == (0, 0)

    def test_where_all_measured_genes_are_expressed_zeros_are_missing(self) -> None:
        cells = cells_of([list(range(0, 40, 2))], genes=torch.uint16, values=torch.uint8)
        measured = Measured((np.arange(VOCABULARY) % 2 == 0)[None] & (np.arange(VOCABULARY) < 43))
        masked = run(cells, measured=measured)
        # 6 hidden, 3 zeros wanted; 40 and 42 are the only measured tokens that are not expressed
        assert masked.counts == MaskCounts(hidden=6, zeros=2, missing_zeros=1)
        assert {40, 42} <= set(tokens_of(masked.decoder)[0])

    def test_entries_of_one_gene_are_hidden_or_seen_together(self) -> None:
        """So that the encoder does not see a value of the gene that the decoder predicts."""
        rows = [[token for token in range(20) for _ in range(1 + token % 3)]] * 50
        cells = cells_of(rows, genes=torch.uint16, values=torch.uint8)
        masked = run(cells, masking=Masking(zeros=0))
        for cell, shown, prompts in zip(
            *map(tokens_of, (cells, masked.encoder, masked.decoder)), strict=True
        ):
            assert len(set(prompts)) == 6
            assert not set(shown) & set(prompts)
            assert sorted(shown + prompts) == list(cell)


class TestRefusals:
    def refuse(self, message: str, rows: list[list[int]], **options: object) -> None:
        cells = cells_of(rows, genes=torch.int32, values=torch.uint8)
        arguments = {"measured": draw_measured(), "seed": 0, "epoch": 0} | options
        with pytest.raises(ValueError, match=message):
            mask(cells, np.arange(len(cells)), **arguments)  # type: ignore[arg-type]

    def test_entries_out_of_order(self) -> None:
        self.refuse("cell 1 .* not ordered by gene: token 3 follows 5", [[1], [2, 5, 3]])

    @pytest.mark.parametrize("token", [-1, VOCABULARY])
    def test_a_token_outside_the_vocabulary(self, token: int) -> None:
        row = sorted([4, token])
        self.refuse(f"cell 2 .* token {token}, but .* 0 to {VOCABULARY - 1}", [[], [1], row])

    @pytest.mark.parametrize("input_", [-1, INPUTS])
    def test_an_unknown_input(self, input_: int) -> None:
        inputs = np.array([0, input_])
        self.refuse(f"cell 1 .* of input {input_}.* 0 to 2", [[1], [1]], inputs=inputs)

    def test_identities_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"2 cells need .* found \[3\] and \[2\]"):
            run(draw_cells([1, 2]), np.arange(3))

    @pytest.mark.parametrize("number", [-1, 2**64])
    @pytest.mark.parametrize("name", ["seed", "epoch"])
    def test_a_seed_or_an_epoch_outside_its_range(self, name: str, number: int) -> None:
        self.refuse(f"{name} must lie between", [[1, 2]], **{name: number})

    def test_tokens_that_the_type_cannot_hold(self) -> None:
        measured = Measured(np.ones((1, 65_537), bool))
        with pytest.raises(ValueError, match="uint16 cannot hold"):
            run(draw_cells([3]), measured=measured)

    @pytest.mark.parametrize("table", [np.ones(5, bool), np.ones((2, 5))])
    def test_a_table_that_is_none(self, table: np.ndarray) -> None:
        with pytest.raises(ValueError, match="measured must be a table"):
            Measured(table)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("hidden", 0.0), ("hidden", 1.0), ("hidden", math.nan),
            ("zeros", -0.1), ("zeros", math.inf), ("max_encoder", 0), ("max_decoder", 0),
        ],
    )  # fmt: skip
    def test_settings_without_meaning(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=name):
            Masking(**{name: value})  # type: ignore[arg-type]
