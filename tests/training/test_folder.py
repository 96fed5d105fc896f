"""A run's folder: the old run, or the new one, and each of them goes on."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary, InputError
from cellpatch_fast.io.stores.partial import LOCK
from cellpatch_fast.training.folder import BEGUN, CHECKPOINT, EPOCHS, SETTINGS, STEPS, RunFolder

from ..conftest import tree
from ..failing_files import FailingFiles

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds files by /proc")

COLUMNS = {STEPS: ["step", "loss"], EPOCHS: ["epoch", "step"]}
CHECKPOINT_FIELDS = ("model", "optimizer", "place", "best", "finished", "threads")
WITHOUT_TIMES = ("tensorboard", LOCK)  # what is compared and made to fail has neither

Open = Callable[..., RunFolder]


@pytest.fixture
def model(small_vocabulary: GeneVocabulary, config: CellPatchConfig) -> CellPatch:
    return CellPatch(config, small_vocabulary)


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """``opened(seed, **options)``: a run of that seed in the folder "run"."""

    def begin(seed: int, **options: Any) -> RunFolder:
        settings = {"seed": seed, "epochs": 3}
        return RunFolder(tmp_path / "run", "pretraining", settings, COLUMNS, **options)

    return begin


def checkpoint(step: int) -> dict[str, Any]:
    return dict.fromkeys(CHECKPOINT_FIELDS) | {"place": {"step": step}, "finished": False}


def finish(folder: RunFolder, model: CellPatch) -> None:
    """What training leaves at the end of an epoch."""
    with folder:
        folder.add_row(STEPS, {"step": 1, "loss": 0.5})
        folder.add_row(EPOCHS, {"epoch": 1, "step": 1})
        model.save_pretrained(folder.path)
        folder.save(checkpoint(1))
        (folder.path / "metrics.json").write_text("{}")


def content(run: Path) -> dict[str, bytes]:
    return {
        name: content for name, content in tree(run).items() if not name.startswith(WITHOUT_TIMES)
    }


@pytest.mark.parametrize("for_good", [False, True])
def test_overwriting_leaves_the_old_run_or_one_that_has_begun_and_no_model_to_load(
    opened: Open, model: CellPatch, tmp_path: Path, for_good: bool
) -> None:
    """Whichever change of a file fails, or comes after a kill; and the new run goes on."""
    run = tmp_path / "run"
    finish(opened(1), model)
    old = content(run)
    with FailingFiles(run, ignored=WITHOUT_TIMES) as files:
        opened(2, overwrite=True).close()
    expected = content(run)
    assert expected.keys() == {SETTINGS, STEPS, EPOCHS}
    for call in files.calls:
        with opened(3, overwrite=True) as folder:
            finish(folder, model)
        with opened(1, overwrite=True) as folder:
            finish(folder, model)
        assert content(run) == old
        with (
            FailingFiles(run, fails_at=call.number, for_good=for_good, ignored=WITHOUT_TIMES),
            contextlib.suppress(OSError),
        ):
            opened(2, overwrite=True).close()
        left = {name: x for name, x in content(run).items() if not name.endswith(".unfinished")}
        if left == old:
            continue
        with pytest.raises(InputError, match="without --overwrite, goes on with it"):
            CellPatch.from_pretrained(run)
        with pytest.raises(InputError, match="a run with other settings"):
            opened(1)
        opened(2).close()
        assert content(run) == expected, call


def test_a_kill_in_the_first_write_does_not_block_the_folder(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with FailingFiles(tmp_path / "run", ignored=WITHOUT_TIMES) as files:
        opened(1).close()
    first = next(call for call in files.calls if call.kind == "write")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    failing: dict[str, Any] = {"fails_at": first.number, "for_good": True}
    with (
        FailingFiles(tmp_path / "run", ignored=WITHOUT_TIMES, **failing),
        pytest.raises(OSError, match="on purpose"),
    ):
        opened(1)
    [left] = tmp_path.glob("run/.*.unfinished")
    assert BEGUN in left.name
    opened(1).close()
    assert content(tmp_path / "run").keys() == {SETTINGS, STEPS, EPOCHS}


@pytest.mark.parametrize("name", [STEPS, EPOCHS])
def test_tables_go_on_where_the_checkpoint_ends_however_often_a_run_is_killed(
    opened: Open, tmp_path: Path, name: str
) -> None:
    """Rows beyond the checkpoint are cut off; a checkpoint then knows the true size."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS[name], 1)
    with opened(1) as folder:
        folder.add_row(name, row)
        folder.save(checkpoint(1))
        folder.add_row(name, row)
        folder.add_row(name, row)
    for step in (2, 3):
        with opened(1) as folder:
            folder.save(checkpoint(step))
            folder.add_row(name, row)
    with opened(1):
        table = (tmp_path / "run" / name).read_text()
    assert table.splitlines() == [",".join(COLUMNS[name]), "1,1"]


def test_a_table_that_was_shortened_is_refused(opened: Open, tmp_path: Path) -> None:
    """Instead of being filled up with zero bytes."""
    with opened(1) as folder:
        folder.save(checkpoint(1))
    (tmp_path / "run" / STEPS).unlink()
    with pytest.raises(InputError, match=r"steps\.csv had 11 bytes .* and is shorter now"):
        opened(1)


def test_a_table_is_on_the_disk_before_the_checkpoint_that_knows_its_size(
    opened: Open, tmp_path: Path
) -> None:
    with opened(1) as folder, FailingFiles(tmp_path / "run") as files:
        folder.add_row(STEPS, {"step": 1, "loss": 0.5})
        folder.save(checkpoint(1))
    order = [call.what for call in files.calls]
    for name in (STEPS, EPOCHS):
        assert order.index(f"fsync {name}") < order.index(f"replace {CHECKPOINT}")
    assert order.index(f"fsync .{CHECKPOINT}.#.unfinished") < order.index(f"replace {CHECKPOINT}")
    assert order[order.index(f"replace {CHECKPOINT}") + 1] == "fsync ."


def test_a_folder_whose_disk_fails_can_be_opened_again_by_the_same_process(
    opened: Open, tmp_path: Path
) -> None:
    """No lock is left behind, though closing a table fails as well."""
    opened(1).close()
    with FailingFiles(tmp_path / "run", ignored=("tensorboard",)) as files:
        folder = opened(1)
        fails_at = len(files.calls) + 1
        folder.close()
    options: dict[str, Any] = {"fails_at": fails_at, "ignored": ("tensorboard",)}
    failing = FailingFiles(tmp_path / "run", for_good=True, **options)
    with failing, pytest.raises(OSError, match="on purpose"), opened(1) as folder:
        folder.add_row(STEPS, {"step": 1, "loss": 0.5})
    opened(1).close()
