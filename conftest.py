"""What the tests and the benchmarks share: tests marked ``gpu`` are skipped without a GPU.

Where there is none, Triton's interpreter runs the kernels on the CPU. It is chosen by an
environment variable that Triton reads once, when it is imported, so it is set here, before any
test is. With a GPU it must not be set: everything would run in the interpreter there too.
Processes that the tests start inherit it; those that compile kernels have to drop it.

A shell that starts the tests in the background has Ctrl-C ignored by them and by all that they
start, so that the tests of Ctrl-C would wait for nothing. It is heard again here.
"""

from __future__ import annotations

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; this machine has none")
