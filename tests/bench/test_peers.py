"""The models of the comparison have the sizes, tokens and caps that are claimed for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.reporting.findings import TARGET_RATIOS
from cellpatch_fast import CellPatchConfig, RaggedCells

CLASSES = 11
CELLPATCH = ("ours", "cellpatch-flash", "cellpatch-original")
BERTS = ("geneformer-v1", "geneformer-v2", "langcell")
KEYS = (
    *CELLPATCH,
    *("scbert", "scgpt", "geneformer-v1", "geneformer-v2", "scfoundation", "scfoundation-decoder"),
    *("langcell", "uce-4", "uce-33", "tosica"),
)
CONFIG = CellPatchConfig(projection_dim=None)
NO_DEVICE = torch.device("meta")  # parameters without memory


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_all_are_registered_once_and_ours_first(peers: SimpleNamespace) -> None:
    assert tuple(peer.key for peer in peers.registry.PEERS) == KEYS
    assert [peer.ours for peer in peers.registry.PEERS] == [True] + [False] * (len(KEYS) - 1)
    assert len({peer.name for peer in peers.registry.PEERS}) == len(KEYS)


def test_the_targets_are_about_models_that_there_are(peers: SimpleNamespace) -> None:
    assert {peer.name for peer in peers.registry.PEERS} > set(TARGET_RATIOS)


@pytest.fixture(scope="module")
def full_size(peers: SimpleNamespace) -> Callable[[str], Any]:
    by_key = {peer.key: peer for peer in peers.registry.PEERS}
    return lambda key: by_key[key].make(NO_DEVICE, torch.float32, CLASSES)


def test_every_published_number_is_tested(peers: SimpleNamespace) -> None:
    published = {peer.key: peer.published for peer in peers.registry.PEERS if peer.published}
    assert published == {
        "geneformer-v1": 10_000_000,
        "geneformer-v2": 104_000_000,
        "scfoundation": 100_000_000,
        "uce-33": 650_000_000,
    }


def masked_gene_head(model: Any) -> int:
    """Parameters of the head that predicts masked genes, which the published counts include.

    Its last matrix is the embedding's.
    """
    dim, vocabulary = model.sizes.dim, model.sizes.vocabulary
    return dim * dim + dim + 2 * dim + vocabulary


def test_geneformer_v1_has_the_parameters_of_its_checkpoint(
    full_size: Callable[[str], Any],
) -> None:
    """The model of 10 million: its file model.safetensors has 41,183,536 bytes.

    Beside the parameters in float32, it holds the 2,048 positions in int64 and a list of names.
    """
    model = full_size("geneformer-v1")
    count = parameters(model.bert) + masked_gene_head(model)
    assert round(count, -6) == 10_000_000
    names = 41_183_536 - 4 * count - 8 * 2048
    assert 0 < names < 16_384


def test_geneformer_v2_has_104_million(full_size: Callable[[str], Any]) -> None:
    model = full_size("geneformer-v2")
    assert round(parameters(model.bert) + masked_gene_head(model), -6) == 104_000_000


def test_langcell_has_the_parameters_of_the_model_that_it_began_as(
    full_size: Callable[[str], Any],
) -> None:
    """Geneformer 12L-30M: 158,467,410 bytes, with names, positions and the head of masked genes.

    LangCell has one token more.
    """
    model = full_size("langcell")
    count = parameters(model.bert) + masked_gene_head(model) - (model.sizes.dim + 1)
    names = 158_467_410 - 4 * count - 8 * 2048
    assert 0 < names < 131_072


def test_scfoundation_has_100_million(full_size: Callable[[str], Any]) -> None:
    """Without the decoder, which has another 19 million, and without the classifier's 0.2."""
    model = full_size("scfoundation")
    assert round(parameters(model) - parameters(model.head), -6) == 100_000_000


def test_uce_has_650_million(full_size: Callable[[str], Any]) -> None:
    """In its 33 layers, and to the ten million, as it is stated.

    That leaves out what embeds proteins and what reads the cell's token: 2 % more.
    """
    model = full_size("uce-33")
    assert round(parameters(model.layers), -7) == 650_000_000
    assert parameters(model) < 1.02 * 650_000_000


def test_models_of_cellpatch_are_one_model(full_size: Callable[[str], Any]) -> None:
    ours, flash, original = (parameters(full_size(key)) for key in CELLPATCH)
    assert flash == ours
    assert original == ours + 2 * CONFIG.dim  # a norm that is in every checkpoint, and never used


Makers = dict[str, Callable[[], Any]]


@pytest.fixture(scope="module")
def narrow(peers: SimpleNamespace) -> Makers:
    """How to make each model with its own numbers of genes and tokens, but hardly any width."""
    bert, thin = peers.bert, {"layers": 1, "dim": 4, "heads": 1}
    scfoundation = replace(peers.scfoundation.PUBLISHED, bins=2, decoder_layers=1, decoder_dim=4,
                           decoder_heads=1, **thin)  # fmt: skip
    made: Makers = {
        "ours": lambda: peers.ours.CellPatch(2),
        "cellpatch-flash": lambda: peers.flash_cellpatch.FlashCellPatch(2),
        "cellpatch-original": lambda: peers.padded.PaddedCellPatch(2),
        "scbert": lambda: peers.scbert.ScBERT(2, replace(peers.scbert.PUBLISHED, **thin)),
        "scgpt": lambda: peers.scgpt.ScGPT(2, replace(peers.scgpt.PUBLISHED, **thin)),
        "scfoundation": lambda: peers.scfoundation.ScFoundation(2, sizes=scfoundation),
        "scfoundation-decoder": lambda: peers.scfoundation.ScFoundation(2, True, scfoundation),
        "tosica": lambda: peers.tosica.TOSICA(
            2, replace(peers.tosica.PUBLISHED, **thin | {"dim": 1})
        ),
    }
    for key, sizes in zip(
        BERTS, (bert.GENEFORMER_V1, bert.GENEFORMER_V2, bert.LANGCELL), strict=True
    ):
        slim = replace(sizes, mlp_dim=4, **thin)
        made[key] = partial(bert.Bert, slim, 2)
    for key, sizes in (("uce-4", peers.uce.SMALL), ("uce-33", peers.uce.PUBLISHED)):
        small = replace(sizes, mlp_dim=4, protein_dim=4, **thin)
        made[key] = partial(peers.uce.UCE, 2, small)
    return made


def computed(key: str, model: Any, genes: int) -> int:
    """The length of the sequence that a model is given for a cell of so many genes."""
    cells = RaggedCells(
        torch.tensor([0, genes]),
        torch.arange(1, genes + 1, dtype=torch.int32),
        torch.ones(genes, dtype=torch.uint8),
    )
    first = model.prepare(cells)[0]
    if key == "ours":
        return int(model.prepare(cells)[1].numel())
    if key == "tosica":
        return model.embedding.out_features // model.sizes.dim + model.cell.shape[1]
    if key == "scfoundation-decoder":
        return int(first.shape[1]) + len(model.genes.weight) - 1  # encoder and decoder
    return int(first.shape[1])


@pytest.mark.parametrize("key", KEYS)
def test_tokens_and_cap_are_those_of_the_model(
    key: str, peers: SimpleNamespace, narrow: Makers
) -> None:
    (peer,) = (peer for peer in peers.registry.PEERS if peer.key == key)
    model = narrow[key]().eval()
    most = peer.cap or 20_000
    for genes in (1, 700, most - 1, most, most + 1, most + 5000):
        assert computed(key, model, genes) == peer.tokens(genes)
    if peer.cap is not None:
        assert peer.tokens(most + 1) == peer.tokens(most)
    if peer.cap is not None and key not in ("scbert", "uce-4", "uce-33"):
        assert peer.tokens(most) == peer.tokens(most - 1) + 1


@pytest.mark.parametrize(
    ("key", "module", "package"),
    [
        *((key, "transformers", "transformers") for key in BERTS),
        ("scbert", "performer_pytorch", "performer-pytorch"),
        ("scfoundation-decoder", "performer_pytorch", "performer-pytorch"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_installs_it(
    key: str, module: str, package: str, peers: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (peer,) = (peer for peer in peers.registry.PEERS if peer.key == key)
    for name in list(sys.modules):
        if name.split(".")[0] == module:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert peer.package == package
    with pytest.raises(ImportError, match=rf"{package} is not .*cellpatch-fast\[bench\]"):
        peer.make(NO_DEVICE, torch.float32, CLASSES)
