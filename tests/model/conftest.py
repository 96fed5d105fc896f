"""The original's arrays, its live objects and its checkpoints, for the tests of the model."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cellpatch_fast.cells import RaggedCells
from cellpatch_fast.genes import GeneVocabulary

ROOT = Path(__file__).parents[2]
GENES = 600  # tokens of the arrays' models, padding included

ARGS = {
    "max_gene_num": GENES,
    "embedding_dim": 32,
    "max_trainning_length": 3000,
    "n_pathway": 64,
    "n_head": 2,
    "encoder_cross_attn_depth": 1,
    "encoder_self_attn_depth": 2,
    "encoder_projection_dim": 10,
    "decoder_projection_dim": 1,
    "log_transform": True,
    "learnning_rate": 1e-4,
}


class Original:
    """What is known of one of the original's models."""

    def __init__(self, kind: str, arrays: dict[str, Tensor]) -> None:
        self.kind = kind
        prefix = f"{kind}/"
        self.arrays = {n.removeprefix(prefix): t for n, t in arrays.items() if n.startswith(prefix)}
        self.state = {
            n.removeprefix("state/"): t for n, t in self.arrays.items() if n.startswith("state/")
        }
        self.projection = None if kind == "annotate" else 10
        self.args = {**ARGS, "encoder_projection_dim": self.projection}
        self.values, self.genes = self.arrays["values"], self.arrays["genes"]  # [4, 90]
        self.keep = torch.arange(self.genes.shape[1]) < self.arrays["lengths"][:, None]

    def cells(self) -> RaggedCells:
        return RaggedCells.from_padded(self.genes, self.values, self.keep)

    def alone(self, name: str) -> list[Tensor]:
        """An output of each cell, run without padding."""
        return [self.arrays[f"alone{cell}/{name}"] for cell in range(len(self.genes))]


@pytest.fixture(scope="module", params=["reference", "numba", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    return request.param


@pytest.fixture(scope="session")
def arrays() -> dict[str, Tensor]:
    with np.load(ROOT / "tests/data/original_outputs.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.fixture(params=["pretrain", "annotate", "annotate_projected"])
def original(request: pytest.FixtureRequest, arrays: dict[str, Tensor]) -> Original:
    interpreted = (
        "backend" in request.fixturenames
        and request.getfixturevalue("backend") == "triton"
        and not torch.cuda.is_available()
    )
    if interpreted and request.param != "pretrain":
        pytest.skip("takes Triton's interpreter long, and differs after the encoder only")
    return Original(request.param, arrays)


@pytest.fixture
def pretrain(arrays: dict[str, Tensor]) -> Original:
    return Original("pretrain", arrays)


@pytest.fixture(scope="session")
def vocabulary() -> GeneVocabulary:
    return GeneVocabulary([""] * (GENES - 1), [f"gene{i}" for i in range(1, GENES)])


@pytest.fixture(scope="session")
def peers() -> ModuleType:
    """bench/peers/original.py: the original's computation, under an importable name."""
    spec = importlib.util.spec_from_file_location("peers", ROOT / "bench/peers/original.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["peers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def live(peers: ModuleType) -> Callable[[Original], Any]:
    """Makes a live model object, as the original's code would, in evaluation mode."""

    def make(original: Original, **options: Any) -> Any:
        options = {"projection": original.projection, **options}
        if original.kind == "pretrain":
            model = peers.PaddedPathFormer(GENES, **options)
        else:
            model = peers.PaddedPathFormerLp(GENES, classes=11, **options)
        missing, unexpected = model.load_state_dict(original.state, strict=False)
        assert not unexpected
        # the large annotation head is kept once in the test data, for annotate_projected
        assert all(original.kind == "annotate" and name.startswith("lp_fc") for name in missing)
        return model.eval()

    return make


@pytest.fixture
def files(tmp_path: Path) -> Callable[[Original], dict[str, Path]]:
    """Writes a checkpoint, its arguments and its gene2tok.json: the arguments of from_original."""

    def write(original: Original) -> dict[str, Path]:
        paths = {
            "checkpoint": tmp_path / "best.pth",
            "args": tmp_path / "args.json",
            "vocabulary": tmp_path / "gene2tok.json",
        }
        torch.save({"model_state_dict": original.state}, paths["checkpoint"])
        paths["args"].write_text(json.dumps(original.args))
        paths["vocabulary"].write_text(json.dumps({f"gene{i}": i for i in range(1, GENES)}))
        return paths

    return write
