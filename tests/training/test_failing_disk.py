"""Training on a disk that fails: at every single change of a file, in turn.

After each failure the same call goes on and ends with the bits of an uninterrupted run, with its
results and nothing beside them, however often it is repeated. By default the disk fails once at
each kind of change to each file, and at some more, for good or in passing; at all and in both ways
with CELLPATCH_TESTS=thorough.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import pytest

from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary, InputError
from cellpatch_fast.model.storage import ORDER
from cellpatch_fast.training import finetune, pretrain
from cellpatch_fast.training.folder import RESULTS

from ..failing_files import THOROUGH, Call, FailingFiles, chosen
from .conftest import assert_same_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds files by /proc")

IGNORED = ("tensorboard",)  # written by a thread of TensorBoard's own
TABLES = ("steps.csv", "epochs.csv", "checkpoint.pt")  # compared without times, or not at all
PICTURES = ("training_curves.png", "training_curves.svg")  # of epochs.csv, with times in it

IN_A_ROW = 9  # failures, before a run comes to its end and is compared

Train = Callable[[Path], object]


@pytest.fixture
def train(
    request: pytest.FixtureRequest,
    labelled: anndata.AnnData,
    config: CellPatchConfig,
    small_vocabulary: GeneVocabulary,
) -> Train:
    """``train(folder)``: 2 epochs of 2 steps, with a checkpoint after each step."""
    commands: dict[str, Callable[..., object]] = {"pretrain": pretrain, "finetune": finetune}
    command = commands[request.param]
    settings = {"epochs": 2, "batch_size": 52, "validation": 0.1, "spectral": False}
    options: dict[str, Any] = {"config": config, "vocabulary": small_vocabulary}
    if command is finetune:
        settings |= {"linear": True, "test": 0.1}
        options |= {"label": "type"}
    options |= {"settings": settings, "checkpoint_minutes": 0, "progress": False}
    return lambda folder: command(labelled, folder / "run", **options)


def results(place: Path) -> dict[str, bytes]:
    """What a run leaves that has to be equal, and the names of what has not."""
    return {
        str(path.relative_to(place)): b""
        if path.name in (*TABLES, *PICTURES)
        else path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and not set(path.parts) & set(IGNORED)
    }


def alike(call: Call) -> str:
    """Results of one run are written, and those of another deleted, in one way."""
    name = Path(call.path).name
    kept = ("training", "checkpoint", "steps", "epochs", "model", "config", "vocabulary", "classes")
    if call.kind == "unlink" and name in (*ORDER, *RESULTS):
        return "unlink another run's"
    if call.path.startswith("run/") and not name.lstrip(".").startswith(kept):
        return f"{call.kind} result"
    return call.what


@pytest.mark.parametrize("train", ["pretrain", "finetune"], indirect=True)
def test_a_run_ends_with_the_same_bits_whatever_failed(train: Train, tmp_path: Path) -> None:
    """The disk fails again and again, each time at a later change; in between it recovers."""
    whole = tmp_path / "whole"
    whole.mkdir()
    with FailingFiles(whole, ignored=IGNORED) as files:
        train(whole)
    expected = results(whole)
    calls = chosen(files.calls, alike=alike)
    size = 1 if THOROUGH else IN_A_ROW
    for number, start in enumerate(range(0, len(calls), size)):
        some = calls[start : start + size]
        for for_good in (False, True) if THOROUGH else (bool(number % 2),):
            place = tmp_path / f"{number} {for_good}"
            place.mkdir()
            for call in some:
                _fail(train, place, call, for_good)
            with FailingFiles(place, ignored=IGNORED):  # where nothing has to reach the disk
                train(place)
            assert results(place) == expected, some
            assert_same_run(place / "run", whole / "run")


def _fail(train: Train, place: Path, call: Call, for_good: bool) -> None:
    fails_at = call.number if THOROUGH else call.what
    with (
        FailingFiles(place, fails_at=fails_at, for_good=for_good, ignored=IGNORED) as files,
        contextlib.suppress(OSError),
    ):
        train(place)
    assert files.failed is not None, call
    with contextlib.suppress(InputError):  # refused, or whole
        CellPatch.from_pretrained(place / "run")
