"""What the models of the comparison compute: from which genes, and whether a batch matters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cellpatch_fast import CellPatchConfig, RaggedCells

CLASSES = 11
BERTS = ("geneformer-v1", "geneformer-v2", "langcell")
RANKED_OR_FIRST = ("cellpatch-original", "scbert", *BERTS, "scfoundation", "scfoundation-decoder")
KEYS = (*RANKED_OR_FIRST, "ours", "cellpatch-flash", "scgpt", "uce-4", "tosica")
CONFIG = CellPatchConfig(projection_dim=None)


Makers = dict[str, Callable[[], Any]]


@pytest.fixture(scope="module")
def toys(peers: SimpleNamespace) -> Makers:
    """How to make each model narrow, shallow and with a low cap."""
    bert, small = (
        peers.bert,
        {"vocabulary": 2003, "layers": 2, "dim": 12, "heads": 3, "mlp_dim": 17},
    )
    scfoundation = peers.scfoundation.Sizes(
        genes=83, layers=2, dim=12, heads=3, bins=7, decoder_layers=1, decoder_dim=10,
        decoder_heads=1, hidden=5,
    )  # fmt: skip
    uce = peers.uce.Sizes(
        layers=2, dim=12, heads=3, mlp_dim=17, protein_dim=19, genes=997, chromosomes=5, drawn=47
    )
    made = {
        "cellpatch-original": lambda: peers.padded.PaddedCellPatch(CLASSES, CONFIG, cap=79),
        "scbert": lambda: peers.scbert.ScBERT(
            CLASSES, peers.scbert.Sizes(genes=89, layers=2, dim=10, heads=1, hidden=(13, 7))
        ),
        "scgpt": lambda: peers.scgpt.ScGPT(
            CLASSES, peers.scgpt.Sizes(2003, layers=2, dim=12, heads=3, mlp_dim=17, sequence=72)
        ),
        "scfoundation": lambda: peers.scfoundation.ScFoundation(CLASSES, False, scfoundation),
        "scfoundation-decoder": lambda: peers.scfoundation.ScFoundation(
            CLASSES, True, scfoundation
        ),
        "uce-4": lambda: peers.uce.UCE(CLASSES, uce),
        "tosica": lambda: peers.tosica.TOSICA(
            CLASSES, peers.tosica.Sizes(genes=997, sets=13, share=0.1, dim=12)
        ),
        "ours": lambda: peers.ours.CellPatch(CLASSES, CONFIG),
        "cellpatch-flash": lambda: peers.flash_cellpatch.FlashCellPatch(CLASSES, CONFIG),
    }
    for key, sizes in zip(
        BERTS, (bert.GENEFORMER_V1, bert.GENEFORMER_V2, bert.LANGCELL), strict=True
    ):
        start = None if sizes.start is None else min(sizes.start, 2002)
        toy = replace(sizes, positions=73, start=start, **small)
        made[key] = partial(bert.Bert, toy, CLASSES)
    return made


@pytest.fixture
def make_toy(toys: Makers) -> Callable[[str], Any]:
    def make(key: str) -> Any:
        torch.manual_seed(2)
        return toys[key]().eval()

    return make


def draw(lengths: list[int], seed: int = 0) -> RaggedCells:
    """Cells of these lengths; the genes of a cell are distinct and ascend."""
    generator = torch.Generator().manual_seed(seed)
    genes = [torch.randperm(900, generator=generator)[:n].sort().values + 1 for n in lengths]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.randint(0, 6, (int(offsets[-1]),), generator=generator, dtype=torch.uint8)
    return RaggedCells(offsets, torch.cat(genes).to(torch.uint16), values)


@torch.inference_mode()
def annotate(model: Any, cells: RaggedCells) -> Tensor:
    logits: Tensor = model(*model.prepare(cells))
    return logits


@pytest.mark.parametrize("key", RANKED_OR_FIRST)
def test_genes_beyond_the_cap_do_not_matter_and_those_below_do(
    key: str, make_toy: Callable[[str], Any]
) -> None:
    model = make_toy(key)
    caps = {"cellpatch-original": 79, "scbert": 89, "geneformer-v1": 73, "geneformer-v2": 71}
    cap = {**caps, "langcell": 72}.get(key, 83)
    genes = torch.arange(1, cap + 12, dtype=torch.int32)
    values = torch.full((len(genes),), 4, dtype=torch.uint8)
    values[cap:] = 1  # the lowest ranks, and the last
    offsets = torch.tensor([0, len(genes)])
    expected = annotate(model, RaggedCells(offsets, genes, values))

    beyond = genes.clone()
    beyond[cap:] += 300
    # bit by bit: they are dropped
    assert torch.equal(annotate(model, RaggedCells(offsets, beyond, values)), expected)
    for place in (0, cap - 1):
        below = genes.clone()
        below[place] += 300
        assert not torch.equal(annotate(model, RaggedCells(offsets, below, values)), expected)


def test_scgpt_samples_genes_without_repeating_any(
    peers: SimpleNamespace, make_toy: Callable[[str], Any]
) -> None:
    model, cells = make_toy("scgpt"), draw([500, 71, 13])
    genes, values, inside = model.prepare(cells)
    assert inside.sum(1).tolist() == [72, 72, 14]
    of_cells = [set(part.tolist()) for part in cells.genes.long().split(cells.lengths.tolist())]
    for sampled, mask, cell in zip(genes, inside, of_cells, strict=True):
        assert sampled[0] == peers.scgpt.CELL
        found = sampled[1:][mask[1:]].tolist()
        assert len(set(found)) == len(found)
        assert set(found) <= cell
    again = model.prepare(cells)[0]
    assert not torch.equal(genes[0], again[0])  # another sample
    assert set(genes[1].tolist()) == set(again[1].tolist())  # the cell has no other genes
    assert (values[:, 0] == peers.scgpt.NO_VALUE).all()


def test_uce_draws_expressed_genes_and_orders_them_by_chromosome(
    peers: SimpleNamespace, make_toy: Callable[[str], Any]
) -> None:
    model, cells = make_toy("uce-4"), draw([500, 13])
    sizes = model.sizes
    (tokens,) = model.prepare(cells)
    of_cells = cells.genes.long().split(cells.lengths.tolist())
    for sentence, cell in zip(tokens.tolist(), of_cells, strict=True):
        assert sentence.pop(0) == peers.uce.CELL
        opened: list[int] = []
        genes: list[int] = []
        for token in sentence:
            if token == peers.uce.CLOSE:
                assert genes == sorted(genes)
            elif token < sizes.start:
                genes = []
                opened.append(token - 4)
            else:
                genes.append(token - sizes.start)
                assert genes[-1] * sizes.chromosomes // sizes.genes == opened[-1]
                assert genes[-1] + 1 in cell
        assert sorted(opened) == list(range(sizes.chromosomes))
        assert sum(token >= sizes.start for token in sentence) == sizes.drawn


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("lengths", [[1], [37, 37], [160, 1, 71]], ids=str)
def test_logits_are_finite_and_one_per_cell_and_class(
    key: str, lengths: list[int], make_toy: Callable[[str], Any]
) -> None:
    logits = annotate(make_toy(key), draw(lengths))
    assert logits.shape == (len(lengths), CLASSES)
    assert logits.isfinite().all()


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("cellpatch-original", "uce-4")])
def test_a_cell_does_not_depend_on_its_batch(key: str, make_toy: Callable[[str], Any]) -> None:
    model, cells = make_toy(key), draw([53, 31, 67])  # all below the caps: scGPT drops none
    together = annotate(model, cells)
    for cell in range(len(cells)):
        alone = annotate(model, cells.slice(cell, cell + 1))
        assert (alone[0] - together[cell]).norm() <= 1e-5 * alone.norm()


def test_the_original_depends_on_its_padding(make_toy: Callable[[str], Any]) -> None:
    model, cells = make_toy("cellpatch-original"), draw([53, 31, 67])
    alone = annotate(model, cells.slice(1, 2))
    assert (alone[0] - annotate(model, cells)[1]).norm() > 1e-3 * alone.norm()


@pytest.mark.parametrize("lengths", [[53, 31, 67], [41, 41]], ids=["ragged", "equal"])
def test_flash_attention_computes_what_ours_does(
    lengths: list[int], make_toy: Callable[[str], Any]
) -> None:
    ours, flash = make_toy("ours"), make_toy("cellpatch-flash")
    flash.load_state_dict(ours.state_dict())
    cells = draw(lengths)
    found = annotate(flash, cells), annotate(ours, cells)
    with torch.inference_mode():
        expected = ours.model.double().logits(cells, backend="reference")
    for logits in found:
        assert (logits - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.gpu
def test_flash_attention_over_ragged_keys(make_toy: Callable[[str], Any]) -> None:
    """Padded in float16 on a CPU, the model errs by three roundings; it may by eight."""
    flash, cells = make_toy("cellpatch-flash"), draw([53, 31, 67])
    expected = annotate(flash, cells)
    found = annotate(flash.to("cuda", torch.float16), cells).float().cpu()
    assert (found - expected).norm() <= 8 * 2**-11 * expected.norm()


@pytest.mark.parametrize("key", BERTS)
def test_berts_take_pytorch_s_attention(key: str, make_toy: Callable[[str], Any]) -> None:
    model = make_toy(key)
    assert model.bert.config._attn_implementation == "sdpa"
    assert model.bert.pooler is None
