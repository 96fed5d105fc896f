"""What a run says of itself: which epoch of how many, and how much time is left."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import pytest

from cellpatch_fast import CellPatchConfig, GeneVocabulary
from cellpatch_fast.progress import Pace, duration
from cellpatch_fast.training import FinetuningSettings, PretrainingSettings, pretrain
from cellpatch_fast.training.loop import Trainer
from cellpatch_fast.training.task import describe_epoch

ROW = {"epoch": 7, "step": 70, "training_loss": 0.25, "validation_loss": None, "seconds": 12.3}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"), (41.7, "42 s"), (89.4, "89 s"), (89.6, "1 min"), (125, "2 min"),
        (89 * 60, "89 min"), (90 * 60, "1.5 h"), (30 * 3600, "30.0 h"), (180_000, "2.1 days"),
    ],
)  # fmt: skip
def test_durations_are_as_exact_as_an_estimate(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_time_left_is_judged_by_what_this_run_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier one may have been faster, and says nothing of this."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace(10.5)
    assert pace.seconds_to(30, 10.5) is None
    now += 9
    assert pace.seconds_to(30, 12) == pytest.approx(9 / 1.5 * 18)
    assert pace.seconds_to(30, 30) == 0


def test_an_epoch_is_told_of_how_many_and_how_long_the_others_take() -> None:
    settings = PretrainingSettings(epochs=30)
    said = "epoch 7 of 30: training loss 0.2500 (12 s"
    assert describe_epoch(ROW, settings, 118.0) == f"{said}, about 2 min left)"
    assert describe_epoch(ROW, settings, None) == f"{said})"
    early = FinetuningSettings(epochs=30, patience=3)
    assert describe_epoch(ROW, early, 118.0) == f"{said}, at most about 2 min left)"


def test_log_lines_and_the_bar_say_how_far_the_run_is(
    labelled: anndata.AnnData,
    config: CellPatchConfig,
    small_vocabulary: GeneVocabulary,
    pretraining: Callable[..., PretrainingSettings],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also after an interruption while validating, when this run has no epoch to judge by."""
    caplog.set_level("INFO", "cellpatch_fast")
    options: dict[str, Any] = {"config": config, "vocabulary": small_vocabulary}
    options["settings"] = pretraining(epochs=3)
    validate = Trainer._validate

    def interrupt(self: Trainer) -> dict[str, float]:
        if self.place.epoch == 1:
            raise KeyboardInterrupt
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain(labelled, tmp_path, checkpoint_minutes=0, **options)
    pretrain(labelled, tmp_path, progress=True, **options)
    lines = [line for line in caplog.messages if line.startswith("epoch")]
    endings = [re.sub(r".*\(|\d+", "", line) for line in lines]
    assert [line[:12] for line in lines] == [f"epoch {number} of 3" for number in (1, 2, 3)]
    assert endings == [" s, about  s left)", " s)", " s)"]
    assert "epoch=3 of 3" in capsys.readouterr().err
