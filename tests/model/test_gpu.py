"""On a GPU the model, `accelerate` and moved models use the Triton backend without being asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cellpatch_fast.kernels import synchronize

from cellpatch_fast import CellPatch, CellPatchConfig
from cellpatch_fast.cells import RaggedCells
from cellpatch_fast.genes import GeneVocabulary
from cellpatch_fast.model import accelerate

pytestmark = pytest.mark.gpu


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each batch that the Triton backend encodes."""
    from cellpatch_fast.kernels.gpu import encoder

    calls: list[str] = []
    encode = encoder.encode

    def note(*arguments: Any, **options: Any) -> Any:
        calls.append("triton")
        return encode(*arguments, **options)

    monkeypatch.delenv("CELLPATCH_BACKEND", raising=False)
    monkeypatch.setattr(encoder, "encode", note)
    return calls


def test_a_model_on_the_gpu(vocabulary: GeneVocabulary, launches: list[str]) -> None:
    torch.manual_seed(0)
    model = CellPatch(CellPatchConfig(max_genes=vocabulary.size), vocabulary).eval()
    genes = torch.randint(1, 600, (400,)).to(torch.uint16)
    values = torch.randint(0, 6, (400,)).to(torch.uint8)
    cells = RaggedCells(torch.tensor([0, 300, 300, 301, 400]), genes, values)
    with torch.inference_mode():
        expected = model.encode(cells, backend="reference")
        assert not launches
        features = model.cuda().encode(cells.to("cuda"))
        mean = model.encode(cells.to("cuda"), mean=True)
    assert launches == ["triton"] * 2
    synchronize()
    assert (features.cpu() - expected).norm() <= 1e-5 * expected.norm()
    assert (mean.cpu() - expected.mean(1)).norm() <= 1e-5 * expected.mean(1).norm()


def test_an_accelerated_model_on_the_gpu(
    pretrain: Any, live: Callable[..., Any], launches: list[str]
) -> None:
    model = accelerate(live(pretrain).cuda())
    with torch.inference_mode():
        features = model.get_mid_embeding(pretrain.values.cuda(), pretrain.genes.cuda())
    assert launches == ["triton"]
    expected = pretrain.arrays["embedding_padded"]
    assert (features.cpu() - expected).norm() <= 1e-5 * expected.norm()


def test_unknown_tokens_are_raised_later(vocabulary: GeneVocabulary) -> None:
    model = CellPatch(CellPatchConfig(max_genes=600), vocabulary).eval().cuda()
    cells = RaggedCells(torch.tensor([0, 2]), torch.tensor([5, 700]), torch.ones(2)).to("cuda")
    with torch.inference_mode():
        model.encode(cells)
    with pytest.raises(ValueError, match="a gene token is not in the gene embedding"):
        synchronize()
