"""Runs that are repeated, interrupted, killed or made longer end with equal bits."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cellpatch_fast import (
    CellPatchConfig,
    GeneVocabulary,
    InputError,
    cli,
)
from cellpatch_fast.training.loop import Trainer
from cellpatch_fast.training.repeating import step_seed

from .conftest import Pretrain, Settings, assert_same_run, command_of, weights


def test_equal_runs_have_equal_bits_and_other_seeds_others(
    pretrained: Pretrain, pretraining: Settings
) -> None:
    one, two = (pretrained(name, pretraining(deterministic=True)) for name in ("one", "two"))
    assert_same_run(one, two)
    other = pretrained("other", pretraining(seed=1))
    assert not torch.equal(weights(one)["patches"], weights(other)["patches"])


@pytest.mark.parametrize("interrupted_at", [1, 5])
def test_interrupted_runs_end_with_the_bits_of_uninterrupted_ones(
    pretrained: Pretrain,
    pretraining: Settings,
    monkeypatch: pytest.MonkeyPatch,
    interrupted_at: int,
) -> None:
    """With a schedule; from a checkpoint of the last step, and from one older than the tables."""
    settings = pretraining(schedule="cosine", warmup_steps=2)
    whole = pretrained("whole", settings)
    step = Trainer._step

    def interrupt(self: Trainer, batch: Any) -> tuple[float, float]:
        if self.place.step == interrupted_at:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrained("part", settings, checkpoint_minutes=0 if interrupted_at != 5 else 10)
    assert_same_run(pretrained("part", settings), whole)
    assert (pretrained("part", settings) / "epochs.csv").stat().st_mtime  # finished: nothing to do


def test_another_number_of_threads_is_told(
    pretrained: Pretrain, pretraining: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU, sums are split by it, so the last bits can differ."""
    before = torch.get_num_threads()
    pretrained("run", pretraining(epochs=1))
    torch.set_num_threads(before + 1)
    try:
        pretrained("run", pretraining(epochs=2))
    finally:
        torch.set_num_threads(before)
    assert f"interrupted with {before} threads and goes on with {before + 1}" in caplog.text
    caplog.clear()
    pretrained("run", pretraining(epochs=3))  # written with one more
    assert f"goes on with {before}:" in caplog.text


def test_runs_interrupted_while_validating_end_with_the_same_bits_too(
    pretrained: Pretrain, pretraining: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps of the epoch are done, but it is not: the checkpoint is of its last step."""
    settings = pretraining(schedule="cosine")
    whole = pretrained("whole", settings)
    validate = Trainer._validate

    def interrupt(self: Trainer) -> dict[str, float]:
        if self.place.epoch == 1:
            raise KeyboardInterrupt
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrained("part", settings, checkpoint_minutes=0)
    assert_same_run(pretrained("part", settings), whole)


@pytest.mark.skipif(sys.platform != "linux", reason="needs kill -9")
def test_killed_runs_end_with_the_bits_of_uninterrupted_ones(
    pretrained: Pretrain, pretraining: Settings, file: Path, config: CellPatchConfig,
    tmp_path: Path, small_vocabulary: GeneVocabulary,
) -> None:  # fmt: skip
    settings = pretraining(epochs=4)
    whole = pretrained("whole", settings)
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


def test_runs_can_be_made_longer(pretrained: Pretrain, pretraining: Settings) -> None:
    """Not where the schedule ends with them."""
    whole = pretrained("whole", pretraining(epochs=3))
    pretrained("longer", pretraining(epochs=1))
    assert_same_run(pretrained("longer", pretraining(epochs=3)), whole)
    pretrained("scheduled", pretraining(epochs=1, schedule="cosine"))
    with pytest.raises(InputError, match=r"other settings.*\n  epochs: was 1, is now 3"):
        pretrained("scheduled", pretraining(epochs=3, schedule="cosine"))


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
    pretrained: Pretrain, pretraining: Settings, damage: Callable[[Path], None], message: str
) -> None:
    path = pretrained("run", pretraining(epochs=1)) / "checkpoint.pt"
    damage(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        pretrained("run", pretraining(epochs=2))
    assert path.read_bytes() == before
    pretrained("run", pretraining(epochs=1), overwrite=True)


def change(path: Path, **fields: Any) -> None:
    torch.save(torch.load(path, weights_only=True) | fields, path)


def test_steps_and_processes_have_random_numbers_of_their_own() -> None:
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
