"""Launches a kernel on the device its tensors are on, and reports what it found wrong."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import Tensor

from .configuration import Configuration, compiler_options
from .encoder import architecture, note_compilation
from .faults import raise_faults


def launch(
    device: torch.device,
    kernel: Any,
    programs: int,
    configuration: Configuration,
    *arguments: Any,
    **constants: Any,
) -> None:
    """Run so many programs of a kernel; none, if there are none.

    Raises
    ------
    ValueError
        In the interpreter, where nothing is asynchronous: if the kernel found its input wrong.
    """
    if programs == 0:
        return
    # Triton launches on the current device, whatever device the tensors are on
    on_gpu = device.type == "cuda"
    there = torch.cuda.device(device) if on_gpu else contextlib.nullcontext()
    key = (
        kernel.__name__,
        device,
        *(str(argument.dtype) for argument in arguments if isinstance(argument, Tensor)),
        *constants.items(),
    )
    started = time.perf_counter()
    with there:
        options = compiler_options(architecture(device), configuration)
        kernel[(programs,)](*arguments, **constants, **options)
    note_compilation(key, time.perf_counter() - started)
    if not on_gpu:
        raise_faults(device)
