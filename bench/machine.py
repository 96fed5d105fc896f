"""What a results file says of the device and of what is installed."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.command import describe
from cellpatch_fast.devices import usable_cores

PACKAGES = (
    *("torch", "triton", "numba", "numpy", "anndata", "zarr", "cellpatch-fast"),
    *("flash-attn", "performer-pytorch", "transformers"),
)
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 32 << 20  # bytes, where the system does not tell


def describe_device(device: torch.device) -> dict[str, Any]:
    """Type, name, slug (for a folder's name) and what is known of memory, caches and clock."""
    if device.type == "cuda":
        described = describe(device)
        name = described.pop("device")
        facts = {
            key: described[key] for key in described if key not in ("torch", "triton", "python")
        }
    else:
        name = f"{_short(processor())} ({usable_cores()} cores)"
        facts = {"cache bytes": cache_bytes(device), "memory bytes": _memory_bytes()}
    return {"type": device.type, "name": name, "slug": _slug(name), **facts}


def installed() -> dict[str, str]:
    """Versions by name, of Python and of the packages that are there."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def cache_bytes(device: torch.device) -> int:
    """The last level of cache: a GPU's L2, a CPU's L3."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_bytes(path.read_text()) for path in CACHES.glob("index*/size")]
    return max(sizes, default=UNKNOWN_CACHE)


def processor() -> str:
    """The model of the CPU, as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _short(name: str) -> str:
    """Without marks of trade."""
    return " ".join(re.sub(r"\((R|TM)\)|\bCPU\b|@", " ", name).split())


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _bytes(text: str) -> int:
    units = {"K": 10, "M": 20, "G": 30}
    text = text.strip()
    return int(text[:-1]) << units[text[-1]] if text[-1] in units else int(text)


def _memory_bytes() -> int | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
