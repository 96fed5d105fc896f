"""Training on a GPU: repeatable, resumable, and near the CPU's course."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cellpatch_fast import CellPatchConfig, GeneVocabulary
from cellpatch_fast.training import PretrainingSettings, pretrain
from cellpatch_fast.training.loop import Trainer

from .conftest import assert_same_run, untimed

pytestmark = pytest.mark.gpu

Settings = Callable[..., PretrainingSettings]
Pretrain = Callable[..., Path]


@pytest.fixture
def run(
    file: Path, config: CellPatchConfig, small_vocabulary: GeneVocabulary, tmp_path: Path
) -> Pretrain:
    """``run(name, settings, device=None)``: pretrains a new model; returns the folder."""
    # the widths that the kernels are made for
    config = replace(config, dim=32, patches=64, attention_dropout=0.0, decoder_dropout=0.0)

    def start(name: str, settings: PretrainingSettings, device: str | None = None) -> Path:
        options: dict[str, Any] = {"config": config, "vocabulary": small_vocabulary}
        pretrain(file, tmp_path / name, settings=settings, device=device, **options)
        return tmp_path / name

    return start


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in untimed(folder / "steps.csv")]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        pytest.param({}, 1e-3, id="float32"),
        pytest.param({"precision": "bfloat16"}, 0.05, id="bfloat16"),
        pytest.param({"accumulate": 3}, 1e-3, id="parts"),
        pytest.param({"compile": True}, 1e-3, id="compiled"),
    ],
)
def test_the_course_is_nearly_that_on_a_cpu(
    run: Pretrain, pretraining: Settings, changes: dict[str, Any], tolerance: float
) -> None:
    on_cpu = run("cpu", pretraining(), device="cpu")
    on_gpu = run("gpu", pretraining(**changes))
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=tolerance)


def test_deterministic_runs_have_equal_bits_also_when_interrupted(
    run: Pretrain, pretraining: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pretraining(deterministic=True)
    whole = run("whole", settings)
    assert_same_run(run("again", settings), whole)
    step = Trainer._step

    def interrupt(self: Trainer, batch: Any) -> tuple[float, float]:
        if self.place.step == 4:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("part", settings)
    assert_same_run(run("part", settings), whole)
