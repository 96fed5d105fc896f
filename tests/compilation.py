"""What compiles once for all workers of a test run, so that none does what another is doing."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher


@contextlib.contextmanager
def compiled_by_one_process(folder: Path) -> Iterator[None]:
    """Numba compiles a function that it keeps on disk in one process; others wait, and load it.

    Locks are files in ``folder``, one for each function. The compiler's own lock is taken first:
    Numba takes it too, and in another order two threads would wait for each other.
    """
    compile_now = Dispatcher.compile

    def compile_or_load(function: Any, signature: Any) -> Any:
        name = f"{function.py_func.__module__}.{function.py_func.__qualname__}"
        lock = FileLock(folder / f"{hashlib.sha256(name.encode()).hexdigest()}.lock")
        kept = function.stats.cache_path is not None
        with global_compiler_lock, lock if kept else contextlib.nullcontext():
            return compile_now(function, signature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatcher, "compile", compile_or_load)
        yield
