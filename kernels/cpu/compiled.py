"""What keeps compiled code on disk fresh, and says why a first call takes long.

Numba looks for changes in the file of a compiled function alone, though most of its code comes
from other files. So every function that is kept on disk (``cache=True``) is made by a function
that takes `digest()` and uses it: as a free variable it is part of the compiled function's
identity, and no stale code is ever run.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger("cellpatch_fast")


def digest() -> str:
    """SHA-256 of the backend's source files."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def announce_compilation(function: Any, seconds: int) -> None:
    """Say why the very first call of a compiled function on a machine takes long."""
    module = Path(function.py_func.__code__.co_filename).stem
    pattern = f"{module}.*{function.py_func.__name__}*.nbc"
    if not function.signatures and not any(Path(function.stats.cache_path).glob(pattern)):
        logger.info("compiling the CPU kernels for this machine, once (some %d s)", seconds)
