"""A file system that fails: at the n-th change that is made to the files of a folder.

Databases are tested so: every single write, fsync and rename fails in turn, and after each failure
the work must go on to the same bytes as if nothing had happened. ::

    with FailingFiles(folder) as files:  # never fails, but counts
        work()
    for call in chosen(files.calls):
        with FailingFiles(folder, fails_at=call.number) as files, contextlib.suppress(OSError):
            work()
        assert files.failed
        work()  # goes on, and ends with the same bytes

Two ways to fail. An error that passes (the default): one call raises `OSError`, and the ones after
it succeed, as clean-up does on a full disk. And for good (``for_good=True``): no change arrives
from that call on, clean-up neither, so that what lies on the disk is what a kill at this very
moment would have left. A write that fails leaves half of its bytes, as on a disk that fills up.

What is intercepted: files opened for writing by `open`, `pathlib` and `os.fdopen` (opening,
each write below Python's buffers, truncating), and the functions of `os` in `CHANGES`, through
which `shutil`, `tempfile` and Zarr's local store go as well. What is not, because it is written
by native code: HDF5 (h5py), ``torch.save`` and safetensors' ``save_file`` given a *path* (given an
open file or bytes they are seen), ``ndarray.tofile`` and memory maps. Reading never fails. What
is to be on the disk (fsync) is only counted: nobody cuts the power, and it would take long.

Names are looked up when they are called, so code under test has to say ``os.replace``, not
``from os import replace``.
"""

from __future__ import annotations

import _io
import builtins
import errno
import io
import os
import random
import re
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHANGES = (  # functions of os whose first argument is the file, or a descriptor of it
    *("write", "fsync", "fdatasync", "truncate", "ftruncate", "link", "symlink"),
    *("mkdir", "rmdir", "unlink", "remove", "rename", "replace"),
)
SYNCS = {"fsync", "fdatasync"}
FULL = {"open", "write", "mkdir", "link", "symlink"}  # fail for want of space, others by damage
RANDOM = r"(?<=\.)[a-z0-9_]{8}(?=\.)|[0-9a-f]{8,}|[0-9]+"  # in names; the first is of `tempfile`
THOROUGH = os.environ.get("CELLPATCH_TESTS") == "thorough"  # every call, not a choice of them


@dataclass(frozen=True)
class Call:
    """One change of a file.

    Parameters
    ----------
    number
        Its place among all calls, from 1.
    kind
        ``"open"`` (for writing), or the name of a function of `CHANGES`.
    path
        Of the file, within the folder.
    """

    number: int
    kind: str
    path: str

    @property
    def what(self) -> str:
        """The kind and the file, without what differs from run to run or from shard to shard."""
        return f"{self.kind} {re.sub(RANDOM, '#', self.path)}"


def chosen(
    calls: Sequence[Call],
    *,
    more: int = 3,
    seed: int = 0,
    alike: Callable[[Call], str] = lambda call: call.what,
) -> list[Call]:
    """Calls to fail at: the first of those that are ``alike``, and ``more`` random ones.

    All calls, with CELLPATCH_TESTS=thorough in the environment.
    """
    if THOROUGH:
        return list(calls)
    first = {alike(call): call for call in reversed(calls)}
    picked = {*first.values(), *random.Random(seed).sample(calls, min(more, len(calls)))}
    return sorted(picked, key=lambda call: call.number)


class FailingFiles:
    """Counts the changes made to the files of a folder, and has one of them fail.

    A context manager, of all threads of this process.

    Parameters
    ----------
    folder
        Changes to other files are not counted, and do not fail.
    fails_at
        The call that fails: its number, from 1, or the first that is `Call.what`; None for none.
    for_good
        All calls after it fail too.
    ignored
        Names of folders or files within ``folder`` that are left alone.

    Attributes
    ----------
    calls
        What was counted so far.
    failed
        The call that failed first; None while there is none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fails_at: int | str | None = None,
        for_good: bool = False,
        ignored: Collection[str] = (),
    ) -> None:
        self.calls: list[Call] = []
        self.failed: Call | None = None
        self._folder = Path(os.path.realpath(folder))
        self._fails_at, self._for_good, self._ignored = fails_at, for_good, set(ignored)
        self._counting = threading.RLock()
        self._patch = pytest.MonkeyPatch()
        self._open = io.open

    def __enter__(self) -> FailingFiles:
        for module in (builtins, io, _io):
            self._patch.setattr(module, "open", self._opened)
        for name in CHANGES:
            self._patch.setattr(os, name, self._changed(name, getattr(os, name)))
        self._patch.setattr(os, "open", self._created(os.open))
        return self

    def __exit__(self, *exception: object) -> None:
        self._patch.undo()

    def check(self, kind: str, path: str, before: Callable[[], object] | None = None) -> None:
        """Count a call, and raise if it is to fail; ``before``: what it does nevertheless."""
        with self._counting:
            call = Call(len(self.calls) + 1, kind, path)
            self.calls.append(call)
            first = self.failed is None and self._fails_at in (call.number, call.what)
            if first:
                self.failed = call
        if first and before is not None:
            before()
        if first or (self.failed and self._for_good):
            number = errno.ENOSPC if kind in FULL else errno.EIO
            raise OSError(number, f"{os.strerror(number)} (on purpose, {kind})", path)

    def _within(self, file: Any, folder: int | None = None) -> str | None:
        """The path of a file within the folder; None if it is not there, or is ignored."""
        if isinstance(file, int):
            path = os.readlink(f"/proc/self/fd/{file}")
        else:
            start = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}")
            path = os.path.abspath(os.path.join(start, os.fsdecode(file)))
            head, name = os.path.split(path)
            path = os.path.join(os.path.realpath(head), name)
        if not Path(path).is_relative_to(self._folder):
            return None
        inside = Path(path).relative_to(self._folder)
        return None if self._ignored & set(inside.parts) else str(inside)

    def _changed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, *others: Any, **options: Any) -> Any:
            # of a renaming it is the new name that counts
            renames = kind in ("rename", "replace", "link", "symlink")
            folder = options.get("dst_dir_fd" if renames else "dir_fd")
            path = self._within(others[0] if renames else file, folder)
            if path is not None:
                self.check(kind, path)
                if kind in SYNCS:
                    return None
            return function(file, *others, **options)

        return call

    def _created(self, function: Callable[..., int]) -> Callable[..., int]:
        def call(file: Any, flags: int, *others: Any, **options: Any) -> int:
            path = self._within(file, options.get("dir_fd")) if flags & os.O_CREAT else None
            if path is not None:
                self.check("open", path)
            return function(file, flags, *others, **options)

        return call

    def _opened(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Callable[[str, int], int] | None = None,
    ) -> Any:
        path = self._within(file) if set(mode) & set("wax+") else None
        if path is None:
            return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        self.check("open", path)
        raw = _File(self, path, file, mode.translate({ord("b"): "", ord("t"): ""}), closefd, opener)
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw, size)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)


class _File(io.FileIO):
    """A file whose writes are counted; one that has failed for good stays so to its end.

    So what a failed run has left in a buffer never arrives, as after a kill.
    """

    def __init__(self, files: FailingFiles, path: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._files, self._path = files, path

    def write(self, data: Any, /) -> int:
        content = memoryview(data).cast("B")
        half = content[: len(content) // 2]
        self._files.check("write", self._path, before=lambda: super(_File, self).write(half))
        return super().write(content)

    def truncate(self, size: int | None = None, /) -> int:
        self._files.check("truncate", self._path)
        return super().truncate(size)
