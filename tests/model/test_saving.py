"""A model directory is replaced as a whole, whatever fails, and whenever a process is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cellpatch_fast import InputError
from cellpatch_fast.model.saving import replace_together, settle
from cellpatch_fast.model.storage import _require_complete

from ..conftest import tree
from ..failing_files import FailingFiles

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds files by /proc")

ORDER = ("model.safetensors", "vocabulary.json", "classes.json", "config.json")
ANNOTATOR = {name: f"{name} of the annotator".encode() for name in ORDER}
ENCODER = {name: f"{name} of the encoder".encode() for name in ORDER if name != "classes.json"}


def save(directory: Path, files: dict[str, bytes]) -> None:
    replace_together(directory, ORDER, writing(files))


def writing(files: dict[str, bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    return write


def loads(directory: Path) -> bool:
    try:
        _require_complete(directory)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    [(ENCODER, ANNOTATOR), (ANNOTATOR, ENCODER), (None, ANNOTATOR)],
    ids=["encoder to annotator", "annotator to encoder", "new"],
)
def test_a_save_that_fails_anywhere_leaves_the_old_model_the_new_one_or_a_refused_one(
    old: dict[str, bytes] | None, new: dict[str, bytes], for_good: bool, tmp_path: Path
) -> None:
    """Never files of both. The next save, or what settles it, leaves nothing else behind."""
    with FailingFiles(tmp_path):  # where nothing has to reach the disk
        _fail_everywhere(old, new, for_good, tmp_path)


def _fail_everywhere(
    old: dict[str, bytes] | None, new: dict[str, bytes], for_good: bool, tmp_path: Path
) -> None:
    fails_at, states = 0, []
    while True:
        fails_at += 1
        place = tmp_path / str(fails_at)
        directory = place / "model"
        place.mkdir()
        if old is not None:
            save(directory, old)
        with (
            FailingFiles(place, fails_at=fails_at, for_good=for_good) as files,
            contextlib.suppress(OSError),
        ):
            save(directory, new)
        if files.failed is None:
            break
        if loads(directory):
            states.append(tree(directory))
            assert states[-1] in (old, new), files.failed
        settle(directory, ORDER)
        assert tree(directory) in (old or {}, new), files.failed
        assert {path.name for path in place.iterdir()} <= {"model"}, files.failed
        save(directory, new)
        assert tree(place) == {f"model/{name}": content for name, content in new.items()}
    assert fails_at > 20
    assert new in states
    assert old is None or old in states


def test_names_arrive_in_an_order_that_a_power_cut_cannot_change(tmp_path: Path) -> None:
    """Content before its name, config.json gone before anything and there after everything."""
    directory = tmp_path / "model"
    save(directory, ANNOTATOR)
    with FailingFiles(tmp_path) as files:
        save(directory, ENCODER)
    staged = ".model.#.unfinished"
    order = [call.what for call in files.calls]
    for name in ENCODER:
        assert order.index(f"fsync {staged}/{name}") < order.index("rename .model.#.complete")
    moves = order[order.index("rename .model.#.complete") :]
    assert moves[:6] == [
        *("rename .model.#.complete", "fsync .", "mkdir model", "unlink model/config.json"),
        *("unlink model/classes.json", "fsync model"),
    ]
    assert moves[6:12] == [
        f"{kind} model{file}"
        for name in ("model.safetensors", "vocabulary.json", "config.json")
        for kind, file in (("replace", f"/{name}"), ("fsync", ""))
    ]


def test_what_a_killed_process_was_writing_is_cleared_away_at_the_next_save(
    tmp_path: Path,
) -> None:
    """But not what a process is writing that lives, nor what is of another directory."""
    program = """
        import sys, time
        from pathlib import Path
        from cellpatch_fast.model.saving import replace_together

        def write(folder):
            (folder / "config.json").write_text("half of it")
            print("writing", flush=True)
            time.sleep(100)

        replace_together(Path(sys.argv[1]), ("config.json",), write)
    """
    program = "\n".join(line[8:] for line in program.splitlines())
    for name in ("model", "model.abcdefgh"):
        command = [sys.executable, "-c", program, str(tmp_path / name)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            [folder] = tmp_path.glob(f".{name}.*.unfinished")
            save(tmp_path / "model", ENCODER)
            assert (folder / "config.json").read_text() == "half of it"
            process.send_signal(signal.SIGKILL)
        save(tmp_path / "model", ENCODER)
        assert folder.exists() == (name != "model")
    save(tmp_path / "model.abcdefgh", ENCODER)
    assert sorted(os.listdir(tmp_path)) == ["model", "model.abcdefgh"]


def test_a_directory_that_waits_for_its_files_says_where_they_are(tmp_path: Path) -> None:
    save(tmp_path / "model", ENCODER)
    with FailingFiles(tmp_path) as files:
        save(tmp_path / "model", ENCODER)
    moved = next(c.number for c in files.calls if c.what == "replace model/vocabulary.json")
    with FailingFiles(tmp_path, fails_at=moved, for_good=True), pytest.raises(OSError, match="on"):
        save(tmp_path / "model", ANNOTATOR)
    [rest] = tmp_path.glob(".model.*.complete")
    with pytest.raises(InputError, match=r"config\.json is missing\. It was interrupted") as error:
        _require_complete(tmp_path / "model")
    assert str(rest) in str(error.value)
