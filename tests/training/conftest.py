"""Small runs: cells that are labelled by what they express, and a model of a few patches."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cellpatch_fast import CellPatchConfig, GeneVocabulary
from cellpatch_fast.loading.inputs import Stream, open_stream
from cellpatch_fast.training import FinetuningSettings, PretrainingSettings, pretrain

from ..conftest import MakeCells

Settings = Callable[..., PretrainingSettings]
Pretrain = Callable[..., Path]

TIMED = {"seconds", "cells_per_second"}  # columns that differ from run to run


@pytest.fixture(scope="session")
def config(small_vocabulary: GeneVocabulary) -> CellPatchConfig:
    return CellPatchConfig(
        max_genes=small_vocabulary.size, patches=5, dim=14, heads=2, mlp_dim=11,
        self_attention_blocks=1, projection_dim=3,
    )  # fmt: skip


@pytest.fixture(scope="session")
def labelled(make_cells: MakeCells) -> anndata.AnnData:
    """149 cells: obs["type"] is a, b or c, and each type has 60 genes of its own."""
    adata = make_cells(149)[1:-1].copy()  # without the empty one and the one of all genes
    random = np.random.default_rng(1)
    types = random.integers(0, 3, adata.n_obs)
    counts = adata.X.toarray()
    for own in range(3):
        genes = slice(60 * own, 60 * own + 60)
        counts[types == own, genes] += random.poisson(4, ((types == own).sum(), 60))
    adata.X = counts
    adata.obs["type"] = np.array(["a", "b", "c"])[types]
    return adata


@pytest.fixture(scope="session")
def file(labelled: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "labelled.h5ad"
    labelled.write_h5ad(path)
    return path


@pytest.fixture
def pretraining() -> Settings:
    """Settings of 2 epochs of 3 steps."""

    def make(**changes: Any) -> PretrainingSettings:
        return PretrainingSettings(
            **{"epochs": 2, "batch_size": 43, "learning_rate": 1e-2, "validation": 0.1} | changes
        )

    return make


@pytest.fixture
def pretrained(
    file: Path, config: CellPatchConfig, small_vocabulary: GeneVocabulary, tmp_path: Path
) -> Pretrain:
    """``pretrained(name, settings, …)``: pretrains a new model; returns the folder."""

    def run(name: str, settings: PretrainingSettings, **options: Any) -> Path:
        options = {"config": config, "vocabulary": small_vocabulary, "data": file, **options}
        pretrain(options.pop("data"), tmp_path / name, settings=settings, **options)
        return tmp_path / name

    return run


def command_of(
    output: Path,
    file: Path,
    config: CellPatchConfig,
    settings: PretrainingSettings,
    vocabulary: GeneVocabulary,
    folder: Path,
) -> list[str]:
    """A command line that pretrains with these settings, checkpoints after each step."""
    model = {name: x for name, x in config.to_dict().items() if name != "format_version"}
    content = {"model": model, "training": settings.to_dict()}
    (folder / "config.json").write_text(json.dumps(content))
    vocabulary.save(folder / "vocabulary.json")
    command = ["pretrain", file, "--output", output, "--config", folder / "config.json"]
    command += ["--vocabulary", folder / "vocabulary.json", "--checkpoint-minutes", 0]
    return [str(word) for word in command]


@pytest.fixture
def finetuning() -> Callable[..., FinetuningSettings]:
    def make(**changes: Any) -> FinetuningSettings:
        defaults = {"epochs": 12, "batch_size": 16, "learning_rate": 3e-3, "patience": 0}
        return FinetuningSettings(**defaults | changes)

    return make


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Equal bits, in the tables (but for times) and in the model."""
    for name in ("steps.csv", "epochs.csv"):
        assert untimed(one / name) == untimed(other / name)
    found, expected = weights(one), weights(other)
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing
    for name in ("model.safetensors", "config.json", "vocabulary.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def untimed(table: Path) -> list[dict[str, str]]:
    """The rows of a table, without times."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    return [{name: x for name, x in row.items() if name not in TIMED} for row in rows]


def stream_of(
    data: Any, vocabulary: GeneVocabulary, config: CellPatchConfig
) -> AbstractContextManager[Stream]:
    """One input, opened for a model."""
    return contextlib.closing(open_stream(data, vocabulary, config))


@pytest.fixture(scope="session")
def unrounded(config: CellPatchConfig) -> CellPatchConfig:
    """The small model's configuration, with values as few cells have them."""
    return replace(config, value_rounding="none", value_clip=None)
