"""Which backend computes: the argument, else CELLPATCH_BACKEND, else the device's fastest."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Literal, get_args

import torch

Backend = Literal["reference", "numba", "triton"]

OLDEST_GPU = (8, 0)  # compute capability: the first with matrix units for bf16


def resolve_backend(backend: str | None, device: torch.device) -> Backend:
    """The backend to use on ``device``.

    On a GPU that is too old for the Triton backend, or is no NVIDIA GPU, the reference computes,
    with one warning.

    Raises
    ------
    ValueError
        If the name is unknown, or the backend cannot run on ``device`` or is not installed.
    """
    name = backend or os.environ.get("CELLPATCH_BACKEND") or None
    if name is None:
        return _fastest(device)
    if name not in get_args(Backend):
        where = "" if backend else " in CELLPATCH_BACKEND"
        raise ValueError(
            f"unknown backend {name!r}{where}: choose from {', '.join(get_args(Backend))}"
        )
    if name == "numba" and device.type != "cpu":
        raise ValueError(f"the numba backend runs on the CPU, but the tensors are on {device}")
    if name == "triton" and not torch.compiler.is_compiling():
        _require_triton(device)
    return name  # type: ignore[return-value]


def _fastest(device: torch.device) -> Backend:
    if device.type == "cpu":
        return "numba"
    if device.type != "cuda":
        return "reference"
    if torch.compiler.is_compiling():  # the operator finds out when it runs
        return "triton"
    if (reason := _unfit(device.index or 0)) is not None:
        _warn_once(f"{reason}: computing with the reference backend, which is slower")
        return "reference"
    _require_triton(device)
    return "triton"


def _require_triton(device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "the triton backend needs the package triton, which is not installed: "
            "pip install 'cellpatch-fast[triton]', or choose backend='reference'"
        )
    if device.type == "cpu":
        from .gpu.encoder import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                "the triton backend runs on a CUDA GPU, but the tensors are on the CPU: move "
                "them, or choose backend='numba' (TRITON_INTERPRET=1 before Python starts runs "
                "the kernels in Triton's interpreter, for tests)"
            )
    elif device.type != "cuda":
        raise ValueError(f"the triton backend runs on a CUDA GPU, but the tensors are on {device}")
    elif (reason := _unfit(device.index or 0)) is not None:
        raise ValueError(f"{reason}: choose backend='reference'")


@functools.cache
def _unfit(index: int) -> str | None:
    """Why the Triton backend cannot run on a GPU."""
    if torch.version.hip is not None:
        return "the triton backend is made for NVIDIA GPUs, and PyTorch is built for ROCm"
    found = torch.cuda.get_device_capability(index)
    if found >= OLDEST_GPU:
        return None
    return (
        f"the triton backend needs compute capability {'.'.join(map(str, OLDEST_GPU))} or newer, "
        f"but cuda:{index} ({torch.cuda.get_device_name(index)}) has {'.'.join(map(str, found))}"
    )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)
