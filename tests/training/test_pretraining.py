"""Pretraining: right, repeatable, resumable, the same on any number of devices."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
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
    cli,
)
from cellpatch_fast.training import PretrainingSettings, data, pretrain
from cellpatch_fast.training.loop import Trainer
from cellpatch_fast.training.pretraining import MaskedGenes
from cellpatch_fast.training.repeating import step_seed

from .conftest import assert_same_run, untimed, weights

Settings = Callable[..., PretrainingSettings]
Pretrain = Callable[..., Path]


@pytest.fixture
def run(
    file: Path, config: CellPatchConfig, small_vocabulary: GeneVocabulary, tmp_path: Path
) -> Pretrain:
    """``run(name, settings, …)``: pretrains a new model; returns the folder."""

    def start(name: str, settings: PretrainingSettings, **options: Any) -> Path:
        options = {"config": config, "vocabulary": small_vocabulary, "data": file, **options}
        pretrain(options.pop("data"), tmp_path / name, settings=settings, **options)
        return tmp_path / name

    return start


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
    run: Pretrain, pretraining: Settings, file: Path, config: CellPatchConfig
) -> None:
    """The first step's, computed by hand from the loader's batch."""
    config = replace(config, attention_dropout=0.0, decoder_dropout=0.0)
    settings = pretraining(epochs=1, batch_size=149 - 2, validation=0)
    folder = run("run", settings, config=config)
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


def test_equal_runs_have_equal_bits_and_other_seeds_others(
    run: Pretrain, pretraining: Settings
) -> None:
    one, two = (run(name, pretraining(deterministic=True)) for name in ("one", "two"))
    assert_same_run(one, two)
    other = run("other", pretraining(seed=1))
    assert not torch.equal(weights(one)["patches"], weights(other)["patches"])


@pytest.mark.parametrize("interrupted_at", [1, 5])
def test_interrupted_runs_end_with_the_bits_of_uninterrupted_ones(
    run: Pretrain, pretraining: Settings, monkeypatch: pytest.MonkeyPatch, interrupted_at: int
) -> None:
    """With a schedule; from a checkpoint of the last step, and from one older than the tables."""
    settings = pretraining(schedule="cosine", warmup_steps=2)
    whole = run("whole", settings)
    step = Trainer._step

    def interrupt(self: Trainer, batch: Any) -> tuple[float, float]:
        if self.place.step == interrupted_at:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("part", settings, checkpoint_minutes=0 if interrupted_at != 5 else 10)
    assert_same_run(run("part", settings), whole)
    assert (run("part", settings) / "epochs.csv").stat().st_mtime  # finished: nothing to do


def test_another_number_of_threads_is_told(
    run: Pretrain, pretraining: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU, sums are split by it, so the last bits can differ."""
    before = torch.get_num_threads()
    run("run", pretraining(epochs=1))
    torch.set_num_threads(before + 1)
    try:
        run("run", pretraining(epochs=2))
    finally:
        torch.set_num_threads(before)
    assert f"interrupted with {before} threads and goes on with {before + 1}" in caplog.text
    caplog.clear()
    run("run", pretraining(epochs=3))  # written with one more
    assert f"goes on with {before}:" in caplog.text


def test_runs_interrupted_while_validating_end_with_the_same_bits_too(
    run: Pretrain, pretraining: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps of the epoch are done, but it is not: the checkpoint is of its last step."""
    settings = pretraining(schedule="cosine")
    whole = run("whole", settings)
    validate = Trainer._validate

    def interrupt(self: Trainer) -> dict[str, float]:
        if self.place.epoch == 1:
            raise KeyboardInterrupt
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("part", settings, checkpoint_minutes=0)
    assert_same_run(run("part", settings), whole)


@pytest.mark.skipif(sys.platform != "linux", reason="needs kill -9")
def test_killed_runs_end_with_the_bits_of_uninterrupted_ones(
    run: Pretrain, pretraining: Settings, file: Path, config: CellPatchConfig, tmp_path: Path,
    small_vocabulary: GeneVocabulary,
) -> None:  # fmt: skip
    settings = pretraining(epochs=4)
    whole = run("whole", settings)
    command = command_of(tmp_path / "killed", file, config, settings, small_vocabulary, tmp_path)
    # sums are split by the number of threads, and bits are promised for the same number
    program = f"""
        import sys, torch
        from cellpatch_fast import cli

        torch.set_num_threads({torch.get_num_threads()})
        sys.exit(cli.main(sys.argv[1:]))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), *command])
    table = tmp_path / "killed" / "steps.csv"
    while process.poll() is None and not (table.exists() and table.read_bytes().count(b"\n") > 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert cli.main(command) == 0
    assert_same_run(tmp_path / "killed", whole)


def test_two_processes_take_the_course_of_one(
    run: Pretrain, pretraining: Settings, file: Path, config: CellPatchConfig, tmp_path: Path,
    small_vocabulary: GeneVocabulary,
) -> None:  # fmt: skip
    """Of one with the double batch: a batch is a batch, whoever computes its parts."""
    config = replace(config, attention_dropout=0.0, decoder_dropout=0.0)
    settings = pretraining(whitened=True, gene_rate=3.0, encoder_rate=0.5)
    alone = run("alone", settings, config=config)
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


def test_training_does_not_import_the_compiler(
    pretraining: Settings, file: Path, config: CellPatchConfig, tmp_path: Path,
    small_vocabulary: GeneVocabulary,
) -> None:  # fmt: skip
    """Nor does going on with a run: it takes a second of each process."""
    code = """if True:
        import sys
        from cellpatch_fast import cli
        print(cli.main(sys.argv[1:]), "torch._dynamo" in sys.modules)
    """
    settings = pretraining(optimizer="adamw")
    command = command_of(tmp_path / "run", file, config, settings, small_vocabulary, tmp_path)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
        )
        assert done.stdout.split()[-2:] == ["0", "False"]


def test_parts_of_a_batch_add_up_to_it(
    run: Pretrain, pretraining: Settings, config: CellPatchConfig
) -> None:
    config = replace(config, attention_dropout=0.0, decoder_dropout=0.0)
    whole = run("whole", pretraining(), config=config)
    parts = run("parts", pretraining(accumulate=3), config=config)
    for one, other in zip(*(untimed(x / "steps.csv") for x in (whole, parts)), strict=True):
        for column in ("loss", "gradient_norm"):
            assert float(one[column]) == pytest.approx(float(other[column]), rel=1e-4)


def test_validation_is_of_cells_that_are_not_trained_on(
    run: Pretrain, pretraining: Settings, file: Path
) -> None:
    """Its numbers are NumPy's, for the same masks in every epoch."""
    settings = pretraining(epochs=1, validation=0.2)
    folder = run("run", settings)
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


def test_numbers_go_to_tensorboard_too(run: Pretrain, pretraining: Settings) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = run("run", pretraining())
    events = loading.EventAccumulator(str(folder / "tensorboard")).Reload()
    for table, column in (("steps", "loss"), ("epochs", "validation_pearson")):
        rows = untimed(folder / f"{table}.csv")
        found = [(event.step, event.value) for event in events.Scalars(f"{table}/{column}")]
        assert [step for step, _ in found] == [int(row["step"]) for row in rows]
        expected = [float(row[column]) for row in rows]
        assert [value for _, value in found] == pytest.approx(expected, rel=1e-6)


def test_training_stops_when_nothing_improves_and_keeps_the_best(
    run: Pretrain, pretraining: Settings
) -> None:
    """With a learning rate of nearly 0, rounding decides."""
    settings = pretraining(epochs=40, learning_rate=1e-12, validation=0.2, patience=2)
    rows = untimed(run("run", settings) / "epochs.csv")
    losses = [float(row["validation_loss"]) for row in rows]
    assert len(losses) == int(np.argmin(losses)) + 1 + 2 < 40


def test_runs_can_be_made_longer(run: Pretrain, pretraining: Settings) -> None:
    """Not where the schedule ends with them."""
    whole = run("whole", pretraining(epochs=3))
    run("longer", pretraining(epochs=1))
    assert_same_run(run("longer", pretraining(epochs=3)), whole)
    run("scheduled", pretraining(epochs=1, schedule="cosine"))
    with pytest.raises(InputError, match=r"other settings.*\n  epochs: was 1, is now 3"):
        run("scheduled", pretraining(epochs=3, schedule="cosine"))


def test_pretrained_models_are_embedded_with_and_pretrained_further(
    run: Pretrain, pretraining: Settings, labelled: anndata.AnnData
) -> None:
    first = run("first", pretraining())
    encoder = CellPatch.from_pretrained(first)
    options: dict[str, Any] = {"config": None, "vocabulary": None}
    further = run("further", pretraining(epochs=1), model=first, data=labelled, **options)
    assert not torch.equal(weights(further)["patches"], encoder.patches)
    assert (
        float(untimed(further / "steps.csv")[0]["loss"])
        < float(untimed(first / "steps.csv")[0]["loss"]) / 1.5
    )
    # an encoder alone gets a new decoder
    encoder.save_pretrained(first.parent / "encoder")
    run("other", pretraining(epochs=1), model=first.parent / "encoder", **options)
    with pytest.raises(InputError, match="own configuration and vocabulary"):
        run("neither", pretraining(), model=first)


def test_a_run_does_not_replace_the_model_that_it_starts_from(
    run: Pretrain, pretraining: Settings
) -> None:
    """Else a kill would leave nothing to start from again."""
    folder = run("run", pretraining(epochs=1))
    given: dict[str, Any] = {"config": None, "vocabulary": None, "model": folder}
    with pytest.raises(InputError, match="holds the model to start from"):
        run("run", pretraining(epochs=1), overwrite=True, **given)
    assert weights(folder)


def test_new_genes_get_tokens_if_asked_for(
    run: Pretrain, pretraining: Settings, config: CellPatchConfig
) -> None:
    size = config.max_genes
    with pytest.raises(InputError, match=f"room for 0 .max_genes = {size}"):
        run("small", pretraining(), add_genes=True)
    folder = run(
        "run", pretraining(epochs=1), add_genes=True, config=replace(config, max_genes=size + 3)
    )
    assert CellPatch.from_pretrained(folder).vocabulary.size == size + 3


def test_a_loss_that_is_not_finite_stops_before_anything_is_learnt_from_it(
    run: Pretrain, pretraining: Settings, config: CellPatchConfig,
    small_vocabulary: GeneVocabulary, tmp_path: Path,
) -> None:  # fmt: skip
    model = MaskedGeneModel(config, small_vocabulary)
    with torch.no_grad():
        model.decoder.output.weight[0, 3] = torch.nan
    options: dict[str, Any] = {"config": None, "vocabulary": None, "model": model}
    with pytest.raises(
        InputError, match=r"loss is nan at step 1 \(epoch 1\).*decoder\.output\.weight is not"
    ):
        run("run", pretraining(), **options)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    with torch.no_grad():
        model.decoder.output.weight.fill_(1e38)
    with pytest.raises(InputError, match=r"at step 1 .*: the gradient of \S+ is not finite"):
        run("other", pretraining(), **options)


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_a_gradient_that_is_not_finite_is_named_though_others_are_finite(
    run: Pretrain, pretraining: Settings, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    """The root of 0 has a value, but no gradient."""
    loss = MaskedGenes.loss

    def rooted(self: MaskedGenes, part: Any) -> torch.Tensor:
        bias = self.model.decoder.output.bias
        return loss(self, part) + (bias - bias.detach()).abs().sqrt().sum()

    monkeypatch.setattr(MaskedGenes, "loss", rooted)
    name = r"gradient of decoder\.output\.bias is not finite"
    with pytest.raises(InputError, match=r"loss is \d.* at step 1 .*" + name):
        run("run", pretraining(gradient_clip=clip))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda path: path.write_bytes(b"damaged"), "damaged", id="damaged"),
        pytest.param(lambda path: torch.save({"a": 1}, path), "no checkpoint of", id="foreign"),
        pytest.param(lambda path: torch.save(Path(), path), "code is never run", id="code"),
        pytest.param(lambda path: change(path, format_version=2), "format version 2", id="newer"),
        pytest.param(lambda path: change(path, kind="fine-tuning"), "of fine-tuning", id="kind"),
        pytest.param(lambda path: change(path, model={}), "does not fit its model", id="model"),
    ],
)
def test_checkpoints_that_are_damaged_or_foreign_are_refused(
    run: Pretrain, pretraining: Settings, damage: Callable[[Path], None], message: str
) -> None:
    path = run("run", pretraining(epochs=1)) / "checkpoint.pt"
    damage(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        run("run", pretraining(epochs=2))
    assert path.read_bytes() == before
    run("run", pretraining(epochs=1), overwrite=True)


def change(path: Path, **fields: Any) -> None:
    torch.save(torch.load(path, weights_only=True) | fields, path)


def test_what_cannot_be_trained_on_is_refused_before_any_work(
    run: Pretrain, pretraining: Settings, labelled: anndata.AnnData, tmp_path: Path
) -> None:
    settings = pretraining()
    with pytest.raises(
        InputError, match="only 132 cells are left to train on, too few for batches of 256"
    ):
        run("run", pretraining(batch_size=256))
    empty = labelled.copy()
    empty.X = sparse.csr_matrix(empty.shape, dtype=np.float32)
    with pytest.raises(InputError, match="all cells are empty"):
        run("run", settings, data=empty)
    with pytest.raises(InputError, match="precision bfloat16 is for GPUs"):
        run("run", pretraining(precision="bfloat16"), device="cpu")
    with pytest.raises(InputError, match="no input"):
        run("run", settings, data=[])
    with pytest.raises(InputError, match="unknown backend 'cuda'"):
        run("run", pretraining(backend="cuda"))
    with pytest.raises(InputError, match="3 devices were asked for, but this run has 1"):
        run("run", settings, devices=3)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        run("file", settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds other things"):
        run("other", settings, overwrite=True)
    with pytest.raises(OSError, match="Not a directory"):
        run("file/run", settings)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be at least 1"),
        ("batch_size", 0, "batch_size must be at least 1"),
        ("learning_rate", 0.0, "learning_rate must be positive"),
        ("learning_rate", float("nan"), "learning_rate must be positive"),
        ("schedule", "linear", "schedule must be constant or cosine"),
        ("precision", "float16", "precision must be float32 or bfloat16"),
        ("optimizer", "sgd", "optimizer must be adam or adamw"),
        ("validation", 1.0, "validation must be at least 0 and below 1"),
        ("epochs", 2.5, r"epochs must be a whole number, found 2\.5"),
        ("batch_size", True, "batch_size must be a whole number, found True"),
        ("learning_rate", "fast", "learning_rate must be a number, found 'fast'"),
        ("compile", 1, "compile must be true or false, found 1"),
        ("hidden", 1.5, "hidden must lie between 0 and 1"),
        ("pace", 3, "unknown training settings: pace"),
    ],
)
def test_settings_that_make_no_sense_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PretrainingSettings.from_dict({field: value})


def test_learning_rates_of_schedules() -> None:
    settings = PretrainingSettings(learning_rate=3.0, schedule="cosine", warmup_steps=2)
    rates = [settings.rate(step, 6) for step in range(6)]
    assert rates == pytest.approx([1.5, 3.0, 3.0, 2.56066, 1.5, 0.43934])
    assert PretrainingSettings(learning_rate=3.0).rate(5, 6) == 3.0


def test_steps_and_processes_have_random_numbers_of_their_own() -> None:
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
