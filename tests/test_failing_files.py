"""The failing file system of the tests sees and fails what it says it does."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from .failing_files import FailingFiles, chosen

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds files by /proc")


def _rename(folder: Path) -> None:
    (folder / "new").write_text("content")
    os.replace(folder / "new", folder / "file")


def _cut(folder: Path) -> None:
    with (folder / "file").open("a+", encoding="utf-8", newline="") as file:
        file.truncate(3)
        os.fsync(file.fileno())


def _remove(folder: Path) -> None:
    (folder / "of/folders").mkdir(parents=True)
    (folder / "of/folders/file").touch()
    shutil.rmtree(folder / "of")


def _save(folder: Path) -> None:
    with (folder / "checkpoint.pt").open("wb") as file:
        torch.save({"weight": torch.ones(5)}, file)


def _store(folder: Path) -> None:
    zarr.create_array(folder / "store", data=np.arange(7), chunks=(3,))


@pytest.mark.parametrize(
    ("work", "kinds"),
    [
        (_rename, {"open", "write", "replace"}),
        (_cut, {"open", "truncate", "fsync"}),
        (_remove, {"open", "mkdir", "unlink", "rmdir"}),
        (_save, {"open", "write"}),
        (_store, {"open", "write", "replace", "mkdir"}),
    ],
)
def test_changes_are_seen_whoever_makes_them(
    work: Callable[[Path], None], kinds: set[str], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    with FailingFiles(tmp_path / "elsewhere") as elsewhere, FailingFiles(tmp_path) as files:
        work(tmp_path)
    assert {call.kind for call in files.calls} == kinds
    assert not elsewhere.calls


def test_the_call_that_is_named_fails_halfway_and_the_next_succeeds(tmp_path: Path) -> None:
    with FailingFiles(tmp_path, fails_at=2) as files:
        with pytest.raises(OSError, match="No space left") as error:
            (tmp_path / "file").write_bytes(b"12345678")
        assert error.value.errno == errno.ENOSPC
        assert (tmp_path / "file").read_bytes() == b"1234"
        (tmp_path / "file").unlink()
    assert files.failed == files.calls[1]


def test_nothing_arrives_after_a_failure_for_good_not_even_what_was_in_a_buffer(
    tmp_path: Path,
) -> None:
    with FailingFiles(tmp_path, fails_at=3, for_good=True):
        first, second = ((tmp_path / name).open("wb") for name in ("first", "second"))
        first.write(b"12345678")
        second.write(b"12345678")
        with pytest.raises(OSError, match="on purpose, write"):
            first.flush()
        with pytest.raises(OSError, match="on purpose, unlink"):
            (tmp_path / "first").unlink()
    with pytest.raises(OSError, match="on purpose, write"):
        second.close()
    with pytest.raises(OSError, match="on purpose, write"):
        first.close()
    assert (tmp_path / "first").read_bytes() == b"1234"
    assert (tmp_path / "second").read_bytes() == b""


def test_calls_are_chosen_once_for_each_kind_and_file(tmp_path: Path) -> None:
    with FailingFiles(tmp_path) as files:
        for number in range(100):
            (tmp_path / f"file{number}").write_bytes(b"content")
    expected = ["open file#", "write file#"]
    assert [call.what for call in chosen(files.calls, more=0)] == expected
    assert len(chosen(files.calls, more=3)) in range(2, 6)
