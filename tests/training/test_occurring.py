"""Training the gene rows that the data have comes to what training all rows does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cellpatch_fast import (
    CellLoader,
    CellPatch,
    CellPatchConfig,
    GeneVocabulary,
    MaskedGeneModel,
    RaggedCells,
)
from cellpatch_fast.loading import CellBatch
from cellpatch_fast.loading.inputs import Stream
from cellpatch_fast.training import FinetuningSettings, PretrainingSettings, finetune, pretrain
from cellpatch_fast.training.loop import Trainer
from cellpatch_fast.training.occurring import OccurringGenes
from cellpatch_fast.training.settings import TrainingSettings

from .conftest import assert_same_run, stream_of, untimed, weights

ROWS = 1_009  # of the gene embedding; the data have 307


class AllGenes(OccurringGenes):
    """Trains the whole table: what is to be matched."""

    def __init__(self, model: CellPatch, streams: Sequence[Stream]) -> None:
        pass

    def narrow(self, batch: CellBatch) -> CellBatch:
        return batch

    @contextlib.contextmanager
    def whole(self, left: float) -> Iterator[None]:
        yield

    def restore(self, left: float) -> None:
        pass


@pytest.fixture(scope="session")
def large(small_vocabulary: GeneVocabulary) -> GeneVocabulary:
    """The genes of the cells are scattered among others."""
    order = np.random.default_rng(0).permutation(ROWS - 1)
    size = len(small_vocabulary)
    names = [small_vocabulary.ensembl_ids[i] if i < size else f"other{i}" for i in order]
    symbols = [small_vocabulary.symbols[i] if i < size else f"OTHER{i}" for i in order]
    return GeneVocabulary(names, symbols)


@pytest.fixture(scope="session")
def exact(config: CellPatchConfig) -> CellPatchConfig:
    """Without dropout, and with rows beyond the vocabulary's."""
    return replace(
        config, max_genes=ROWS + 4, attention_dropout=0.0, decoder_dropout=0.0, head_dropout=0.0
    )


Run = Callable[..., Path]


@pytest.fixture
def run(file: Path, exact: CellPatchConfig, large: GeneVocabulary, tmp_path: Path) -> Run:
    """``run(name, settings, whole=False)``: trains a new model, the whole table if asked for."""

    def start(name: str, settings: Any, whole: bool = False, **options: Any) -> Path:
        options = {"config": exact, "vocabulary": large, "settings": settings, **options}
        with pytest.MonkeyPatch.context() as patch:
            if whole:
                patch.setattr("cellpatch_fast.training.loop.OccurringGenes", AllGenes)
            if isinstance(settings, PretrainingSettings):
                pretrain(file, tmp_path / name, **options)
            else:
                finetune(file, tmp_path / name, label="type", **options)
        return tmp_path / name

    return start


def measured_by(run: Path, small: GeneVocabulary) -> np.ndarray:
    """bool [rows]: which rows belong to the genes of the cells, or to padding."""
    names = CellPatch.from_pretrained(run).vocabulary.ensembl_ids
    found = np.zeros(ROWS + 4, bool)
    found[0] = True
    found[1:ROWS] = np.isin(names, small.ensembl_ids)
    return found


def drawn(settings: Any, config: CellPatchConfig, vocabulary: GeneVocabulary) -> Tensor:
    """The gene rows that a run starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return MaskedGeneModel(config, vocabulary).gene_embedding.weight.detach()


def weights_kept(run: Path, settings: TrainingSettings) -> float:
    """What decay leaves of a row without gradients in the model that the run has kept."""
    rows = untimed(run / "epochs.csv")
    if isinstance(settings, PretrainingSettings):
        scores = [-float(row["validation_loss"]) for row in rows]
    else:
        scores = [
            float(row["validation_accuracy"]) + float(row["validation_macro_f1"]) for row in rows
        ]
    steps, total = (int(row["step"]) for row in (rows[int(np.argmax(scores))], rows[-1]))
    rates = np.array([settings.rate(step, total) for step in range(steps)])
    return float(np.prod(1 - rates * settings.gene_rate * settings.weight_decay))


@pytest.mark.parametrize("kind", ["pretraining", "fine-tuning"])
def test_the_result_is_that_of_training_all_rows(
    run: Run, small_vocabulary: GeneVocabulary, exact: CellPatchConfig, large: GeneVocabulary,
    kind: str,
) -> None:  # fmt: skip
    """To rounding, which Adam's first steps, of the size of the rate, make larger by little."""
    changes: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 3.0, "gene_rate": 0.5}
    changes |= {"schedule": "cosine", "warmup_steps": 2, "learning_rate": 3e-3, "epochs": 2}
    settings: Any = PretrainingSettings(batch_size=43, **changes)
    if kind == "fine-tuning":
        settings = FinetuningSettings(batch_size=37, patience=0, **changes)
    found, expected = run("some", settings), run("all", settings, whole=True)
    for table in ("steps.csv", "epochs.csv"):
        for one, other in zip(untimed(found / table), untimed(expected / table), strict=True):
            assert one.keys() == other.keys()
            for column, number in one.items():
                assert float(number) == pytest.approx(float(other[column]), rel=1e-4), column
    rows, others = (weights(x)["gene_embedding.weight"] for x in (found, expected))
    assert rows.shape == (ROWS + 4, 14)
    measured = measured_by(found, small_vocabulary)
    assert measured.sum() == 308
    # those that no cell has: less by the same factor in every step
    assert (rows - others)[~measured].abs().max() <= 20 * 2.0**-23 * others.abs().max()
    start = drawn(settings, exact, large)
    kept = weights_kept(found, settings)
    assert kept < 0.99
    assert (rows - start * kept)[~measured].abs().max() <= 20 * 2.0**-23 * start.abs().max()
    # those that cells have moved much more than they differ
    moved = (rows - start)[measured].abs().max()
    assert (rows - others)[measured].abs().max() <= 1e-3 * moved


def test_adam_leaves_rows_as_they_were(
    run: Run, small_vocabulary: GeneVocabulary, exact: CellPatchConfig, large: GeneVocabulary,
    pretraining: Callable[..., PretrainingSettings],
) -> None:  # fmt: skip
    settings = pretraining(optimizer="adam", weight_decay=0.1)
    found = run("run", settings)
    rows, start = weights(found)["gene_embedding.weight"], drawn(settings, exact, large)
    measured = measured_by(found, small_vocabulary)
    assert torch.equal(rows[~measured], start[~measured])
    assert (rows != start)[measured].any(dim=1).sum() > 300


def test_a_frozen_encoder_keeps_all_rows(
    run: Run, exact: CellPatchConfig, large: GeneVocabulary
) -> None:
    settings = FinetuningSettings(
        epochs=1,
        batch_size=37,
        freeze_encoder=True,
        optimizer="adamw",
        weight_decay=3.0,
        patience=0,
    )
    rows = weights(run("run", settings))["gene_embedding.weight"]
    assert torch.equal(rows, drawn(settings, exact, large))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_interrupted_runs_end_with_the_same_bits(
    run: Run, pretraining: Callable[..., PretrainingSettings], monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
) -> None:  # fmt: skip
    settings = pretraining(optimizer=optimizer, weight_decay=1.0, schedule="cosine")
    whole = run("whole", settings)
    step = Trainer._step

    def interrupt(self: Trainer, batch: Any) -> tuple[float, float]:
        if self.place.step == 5:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("part", settings, checkpoint_minutes=0)
    checkpoint = torch.load(whole.parent / "part" / "checkpoint.pt", weights_only=True)
    assert checkpoint["model"]["gene_embedding.weight"].shape == (308, 14)
    assert_same_run(run("part", settings), whole)


def test_batches_name_the_same_genes_by_their_place(
    file: Path, exact: CellPatchConfig, large: GeneVocabulary
) -> None:
    """What is seen and what is to be predicted; features and predictions keep their bits."""
    model = MaskedGeneModel(exact, large).eval()
    with stream_of(file, large, exact) as stream:
        masking = PretrainingSettings().masking
        batch = next(iter(CellLoader([stream], batch_size=31, masking=masking)))
        assert batch.targets is not None
        table = model.gene_embedding.weight.detach().clone()

        def predicted(of: CellBatch) -> Tensor:
            assert of.targets is not None
            with torch.inference_mode():
                return model.predict(of.cells, of.targets)

        before = predicted(batch)
        genes = OccurringGenes(model, [stream])
        narrow = genes.narrow(batch)
        assert narrow.targets is not None
        assert model.gene_embedding.weight.shape == (308, 14)
        assert torch.equal(model.gene_embedding.weight[0], table[0])  # padding
        pairs: list[tuple[RaggedCells, RaggedCells]]
        pairs = [(narrow.cells, batch.cells), (narrow.targets, batch.targets)]
        for some, all_of_them in pairs:
            rows = model.gene_embedding.weight[some.genes.long()]
            assert torch.equal(rows, table[all_of_them.genes.long()])
            assert torch.equal(some.values, all_of_them.values)
            assert torch.equal(some.offsets, all_of_them.offsets)
        size = float(before.abs().max())
        assert (predicted(narrow) - before).abs().max() <= 1e-5 * size
        with genes.whole(0.5):
            measured = np.flatnonzero(stream.measured().any(axis=0))
            halved = table * 0.5
            halved[[0, *measured]] = table[[0, *measured]]
            assert torch.equal(model.gene_embedding.weight, halved)
        assert model.gene_embedding.weight.shape == (308, 14)
        assert model.gene_embedding.weight.requires_grad
        genes.restore(1.0)
        assert torch.equal(model.gene_embedding.weight, table)
        assert torch.equal(predicted(batch), before)
