"""Pretraining: right, the same on any number of devices, and refused where it makes no sense."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from cellpatch_fast import (
    CellLoader,
    CellPatch,
    CellPatchConfig,
    GeneVocabulary,
    InputError,
    MaskedGeneModel,
    RaggedCells,
)
from cellpatch_fast.training import PretrainingSettings, data
from cellpatch_fast.training.pretraining import MaskedGenes

from .conftest import Pretrain, Settings, command_of, untimed, weights


@pytest.fixture
def batch(
    labelled: anndata.AnnData, config: CellPatchConfig, small_vocabulary: GeneVocabulary
) -> tuple[RaggedCells, RaggedCells]:
    """What is seen of 23 cells, and what is to be predicted."""
    settings = PretrainingSettings()
    options: dict[str, Any] = {"batch_size": 23, "masking": settings.masking}
    with CellLoader(labelled, small_vocabulary, config, **options) as loader:
        found = next(iter(loader))
    assert found.targets is not None
    return found.cells, found.targets


def test_gradients_of_every_parameter_are_those_of_the_definition_in_fp64(
    config: CellPatchConfig,
    small_vocabulary: GeneVocabulary,
    batch: tuple[RaggedCells, RaggedCells],
) -> None:
    torch.manual_seed(0)
    model = MaskedGeneModel(config, small_vocabulary).eval()  # without dropout
    cells, targets = batch
    gradients = []
    for dtype, backend in ((torch.float32, "numba"), (torch.float64, "reference")):
        model = model.to(dtype)
        error = model.predict(cells, targets, backend=backend) - targets.values
        gradients.append(torch.autograd.grad(error.square().mean(), list(model.parameters())))
    for (name, parameter), found, expected in zip(
        model.named_parameters(), *gradients, strict=True
    ):
        # keys' biases cancel in the softmax: their gradients are 0, and rounding of the others'
        scale = max(float(expected.abs().max()), 1e-3)
        assert (found - expected).abs().max() <= 1e-4 * scale, name
        assert found.shape == parameter.shape


def test_loss_is_that_of_hidden_genes_and_sampled_zeros(
    pretrained: Pretrain, pretraining: Settings, file: Path, config: CellPatchConfig
) -> None:
    """The first step's, computed by hand from the loader's batch."""
    config = replace(config, attention_dropout=0.0, decoder_dropout=0.0)
    settings = pretraining(epochs=1, batch_size=149 - 2, validation=0)
    folder = pretrained("run", settings, config=config)
    first = float(untimed(folder / "steps.csv")[0]["loss"])
    vocabulary = MaskedGeneModel.from_pretrained(folder).vocabulary
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = MaskedGeneModel(config, vocabulary).double()
    options: dict[str, Any] = {"batch_size": 147, "shuffle": True, "masking": settings.masking}
    with CellLoader(file, vocabulary, config, **options) as loader:
        batch = next(iter(loader))
    targets = batch.targets
    assert targets is not None
    zeros = (targets.values == 0).float().mean()
    assert 0.3 < zeros < 0.4  # half as many as hidden genes
    expected = (model.predict(batch.cells, targets) - targets.values).square().mean()
    assert first == pytest.approx(expected.item(), rel=1e-5)


def test_two_processes_take_the_course_of_one(
    pretrained: Pretrain, pretraining: Settings, file: Path, config: CellPatchConfig,
    tmp_path: Path, small_vocabulary: GeneVocabulary,
) -> None:  # fmt: skip
    """Of one with the double batch: a batch is a batch, whoever computes its parts."""
    config = replace(config, attention_dropout=0.0, decoder_dropout=0.0)
    settings = pretraining(whitened=True, gene_rate=3.0, encoder_rate=0.5)
    alone = pretrained("alone", settings, config=config)
    command = command_of(tmp_path / "two", file, config, settings, small_vocabulary, tmp_path)
    command += ["--devices", "2", "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "cellpatch_fast.cli", *command], check=True)
    for name, columns in {
        "steps.csv": ["loss", "gradient_norm"],
        "epochs.csv": ["training_loss", "validation_loss", "validation_pearson"],
    }.items():
        one, two = untimed(alone / name), untimed(tmp_path / "two" / name)
        assert len(one) == len(two)
        for column in columns:
            found, expected = ([float(row[column]) for row in rows] for rows in (two, one))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_training_does_not_import_the_compiler(
    pretraining: Settings, file: Path, config: CellPatchConfig, tmp_path: Path,
    small_vocabulary: GeneVocabulary,
) -> None:  # fmt: skip
    """Nor does going on with a run: it takes a second of each process."""
    code = """if True:
        import sys
        from cellpatch_fast import cli
        for _ in range(2):
            print(cli.main(sys.argv[1:]), "torch._dynamo" in sys.modules)
    """
    settings = pretraining(optimizer="adamw")
    command = command_of(tmp_path / "run", file, config, settings, small_vocabulary, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    assert re.findall(r"^0 \w+$", done.stdout, re.MULTILINE) == ["0 False"] * 2


def test_parts_of_a_batch_add_up_to_it(
    pretrained: Pretrain, pretraining: Settings, config: CellPatchConfig
) -> None:
    config = replace(config, attention_dropout=0.0, decoder_dropout=0.0)
    whole = pretrained("whole", pretraining(), config=config)
    parts = pretrained("parts", pretraining(accumulate=3), config=config)
    for one, other in zip(*(untimed(x / "steps.csv") for x in (whole, parts)), strict=True):
        for column in ("loss", "gradient_norm"):
            assert float(one[column]) == pytest.approx(float(other[column]), rel=1e-4)


def test_validation_is_of_cells_that_are_not_trained_on(
    pretrained: Pretrain, pretraining: Settings, file: Path
) -> None:
    """Its numbers are NumPy's, for the same masks in every epoch."""
    settings = pretraining(epochs=1, validation=0.2)
    folder = pretrained("run", settings)
    model = MaskedGeneModel.from_pretrained(folder)
    rows = data.split_blocks(147, settings)
    assert len(rows[1]) == 29
    assert sorted(np.concatenate(rows)[:, 0]) == list(range(147))
    options: dict[str, Any] = {"masking": settings.masking, "seed": settings.seed}
    with CellLoader(file, model.vocabulary, model.config, rows=rows[1], **options) as loader:
        batch = next(iter(loader))
    assert batch.targets is not None
    with torch.inference_mode():
        predicted = model.double().predict(batch.cells, batch.targets).numpy()
    true = batch.targets.values.numpy().astype(float)
    row = untimed(folder / "epochs.csv")[0]
    assert float(row["validation_loss"]) == pytest.approx(((predicted - true) ** 2).mean(), 1e-5)
    expected = np.corrcoef(predicted, true)[0, 1]
    assert float(row["validation_pearson"]) == pytest.approx(expected, abs=1e-5)


def test_numbers_go_to_tensorboard_too(pretrained: Pretrain, pretraining: Settings) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = pretrained("run", pretraining())
    events = loading.EventAccumulator(str(folder / "tensorboard")).Reload()
    for table, column in (("steps", "loss"), ("epochs", "validation_pearson")):
        rows = untimed(folder / f"{table}.csv")
        found = [(event.step, event.value) for event in events.Scalars(f"{table}/{column}")]
        assert [step for step, _ in found] == [int(row["step"]) for row in rows]
        expected = [float(row[column]) for row in rows]
        assert [value for _, value in found] == pytest.approx(expected, rel=1e-6)


def test_training_stops_when_nothing_improves_and_keeps_the_best(
    pretrained: Pretrain, pretraining: Settings
) -> None:
    """With a learning rate of nearly 0, rounding decides."""
    settings = pretraining(epochs=40, learning_rate=1e-12, validation=0.2, patience=2)
    rows = untimed(pretrained("run", settings) / "epochs.csv")
    losses = [float(row["validation_loss"]) for row in rows]
    assert len(losses) == int(np.argmin(losses)) + 1 + 2 < 40


def test_pretrained_models_are_embedded_with_and_pretrained_further(
    pretrained: Pretrain, pretraining: Settings, labelled: anndata.AnnData
) -> None:
    first = pretrained("first", pretraining())
    encoder = CellPatch.from_pretrained(first)
    options: dict[str, Any] = {"config": None, "vocabulary": None}
    further = pretrained("further", pretraining(epochs=1), model=first, data=labelled, **options)
    assert not torch.equal(weights(further)["patches"], encoder.patches)
    assert (
        float(untimed(further / "steps.csv")[0]["loss"])
        < float(untimed(first / "steps.csv")[0]["loss"]) / 1.5
    )
    # an encoder alone gets a new decoder
    encoder.save_pretrained(first.parent / "encoder")
    pretrained("other", pretraining(epochs=1), model=first.parent / "encoder", **options)
    with pytest.raises(InputError, match="own configuration and vocabulary"):
        pretrained("neither", pretraining(), model=first)


def test_a_run_does_not_replace_the_model_that_it_starts_from(
    pretrained: Pretrain, pretraining: Settings
) -> None:
    """Else a kill would leave nothing to start from again."""
    folder = pretrained("run", pretraining(epochs=1))
    given: dict[str, Any] = {"config": None, "vocabulary": None, "model": folder}
    with pytest.raises(InputError, match="holds the model to start from"):
        pretrained("run", pretraining(epochs=1), overwrite=True, **given)
    assert weights(folder)


def test_new_genes_get_tokens_if_asked_for(
    pretrained: Pretrain, pretraining: Settings, config: CellPatchConfig
) -> None:
    size = config.max_genes
    with pytest.raises(InputError, match=f"room for 0 .max_genes = {size}"):
        pretrained("small", pretraining(), add_genes=True)
    folder = pretrained(
        "run", pretraining(epochs=1), add_genes=True, config=replace(config, max_genes=size + 3)
    )
    assert CellPatch.from_pretrained(folder).vocabulary.size == size + 3


def test_a_loss_that_is_not_finite_stops_before_anything_is_learnt_from_it(
    pretrained: Pretrain, pretraining: Settings, config: CellPatchConfig,
    small_vocabulary: GeneVocabulary, tmp_path: Path,
) -> None:  # fmt: skip
    model = MaskedGeneModel(config, small_vocabulary)
    with torch.no_grad():
        model.decoder.output.weight[0, 3] = torch.nan
    options: dict[str, Any] = {"config": None, "vocabulary": None, "model": model}
    with pytest.raises(
        InputError, match=r"loss is nan at step 1 \(epoch 1\).*decoder\.output\.weight is not"
    ):
        pretrained("run", pretraining(), **options)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    with torch.no_grad():
        model.decoder.output.weight.fill_(1e38)
    with pytest.raises(InputError, match=r"at step 1 .*: the gradient of \S+ is not finite"):
        pretrained("other", pretraining(), **options)


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_a_gradient_that_is_not_finite_is_named_though_others_are_finite(
    pretrained: Pretrain, pretraining: Settings, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    """The root of 0 has a value, but no gradient."""
    loss = MaskedGenes.loss

    def rooted(self: MaskedGenes, part: Any) -> torch.Tensor:
        bias = self.model.decoder.output.bias
        return loss(self, part) + (bias - bias.detach()).abs().sqrt().sum()

    monkeypatch.setattr(MaskedGenes, "loss", rooted)
    name = r"gradient of decoder\.output\.bias is not finite"
    with pytest.raises(InputError, match=r"loss is \d.* at step 1 .*" + name):
        pretrained("run", pretraining(gradient_clip=clip))


def test_what_cannot_be_trained_on_is_refused_before_any_work(
    pretrained: Pretrain, pretraining: Settings, labelled: anndata.AnnData, tmp_path: Path
) -> None:
    settings = pretraining()
    with pytest.raises(
        InputError, match="only 132 cells are left to train on, too few for batches of 256"
    ):
        pretrained("run", pretraining(batch_size=256))
    empty = labelled.copy()
    empty.X = sparse.csr_matrix(empty.shape, dtype=np.float32)
    with pytest.raises(InputError, match="all cells are empty"):
        pretrained("run", settings, data=empty)
    with pytest.raises(InputError, match="precision bfloat16 is for GPUs"):
        pretrained("run", pretraining(precision="bfloat16"), device="cpu")
    with pytest.raises(InputError, match="no input"):
        pretrained("run", settings, data=[])
    with pytest.raises(InputError, match="unknown backend 'cuda'"):
        pretrained("run", pretraining(backend="cuda"))
    with pytest.raises(InputError, match="3 devices were asked for, but this run has 1"):
        pretrained("run", settings, devices=3)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        pretrained("file", settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other things"):
        pretrained("other", settings, overwrite=True)
    with pytest.raises(OSError, match="Not a directory"):
        pretrained("file/run", settings)
