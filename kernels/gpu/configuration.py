"""Launch configurations, shipped per GPU architecture in ``configurations/*.json``.

A configuration holds what changes a cell's rounding (entries per tile, warps) and what does not
(stages of the software pipeline). The first is fixed for a type of tables; only the second may
depend on how long the cells of a batch are, so that a cell's bits never depend on its batch.

Nothing is tuned at run time. `tuning.py` measures candidates when asked and writes a file of the
same form, which is then used instead.
"""

from __future__ import annotations

import functools
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORMAT_VERSION = 1
ARCHITECTURES = (80, 90, 100)  # compute capabilities that configurations are shipped for
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Configuration(NamedTuple):
    """How a kernel is compiled."""

    tile: int  # entries
    warps: int
    stages: int


def configuration_for(
    architecture: int, dtype: torch.dtype, entries_per_cell: float
) -> Configuration:
    """The configuration for a GPU's compute capability (such as 90) and cells of a length."""
    settings = load(shipped_for(architecture))[TYPES[dtype]]
    stages = next(
        bucket["stages"]
        for bucket in settings["buckets"]
        if bucket["up_to"] is None or entries_per_cell <= bucket["up_to"]
    )
    return Configuration(settings["tile"], settings["warps"], stages)


def compiler_options(architecture: int, configuration: Configuration) -> dict[str, Any]:
    """What Triton is told besides a kernel's own parameters."""
    return {
        "num_warps": configuration.warps,
        "num_stages": configuration.stages,
        "enable_fp_fusion": True,  # the default differs between versions of Triton
        # For 8.x ptxas would fit a third program into a multiprocessor, and spill registers for it.
        "maxnreg": 255 if architecture < 90 else None,
    }


def shipped_for(architecture: int) -> int:
    """The nearest architecture, not newer, that configurations are shipped for."""
    return max((a for a in ARCHITECTURES if a <= architecture), default=ARCHITECTURES[0])


@functools.cache
def load(architecture: int) -> dict[str, Any]:
    """Settings of each type: from the tuned file of this machine if there is one, else shipped.

    Raises
    ------
    ValueError
        If the tuned file cannot be read.
    """
    name = f"sm{architecture}.json"
    tuned = tuned_folder() / name
    if not tuned.is_file():
        return _settings(resources.files(__package__).joinpath("configurations", name).read_text())
    try:
        return _settings(tuned.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{tuned} is not a file of launch configurations ({error!r}): delete it, or make it "
            "anew with `cellpatch tune`"
        ) from error


def _settings(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {content['format_version']!r}")
    types: dict[str, Any] = content["types"]
    for name in TYPES.values():
        settings = types[name]
        Configuration(int(settings["tile"]), int(settings["warps"]), 1)
        if settings["buckets"][-1]["up_to"] is not None:
            raise ValueError(f"no bucket for the longest cells of {name}")
    return types


def tuned_folder() -> Path:
    """Where `cellpatch tune` keeps what it found: CELLPATCH_CONFIGURATIONS, or the user's cache."""
    named = os.environ.get("CELLPATCH_CONFIGURATIONS")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "cellpatch_fast"
