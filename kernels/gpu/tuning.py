"""`cellpatch tune`: measure launch configurations on the GPU at hand and keep the best.

Tile and warps, which change rounding, are chosen once for a type of tables, by the sum of the times
of all lengths, each relative to the best. Stages, which do not, are then chosen for each length.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ..weights import BlockWeights, EncoderWeights
from . import encoder
from .configuration import FORMAT_VERSION, TYPES, Configuration, load, shipped_for, tuned_folder

TILES, WARPS, STAGES = (32, 64, 128), (4, 8), (1, 2, 3)
LENGTHS = (128, 1024, 8192)  # entries per cell that stand for the buckets
BUCKETS = (256, 2048, None)  # up to which length; None: beyond
ENTRIES = 1 << 23  # per batch: 8 ms at a billion entries per second


def tune(
    device: torch.device,
    *,
    output: Path | None = None,
    types: Iterable[torch.dtype] = tuple(TYPES),
    tiles: Sequence[int] = TILES,
    warps: Sequence[int] = WARPS,
    stages: Sequence[int] = STAGES,
    entries: int = ENTRIES,
    say: Callable[[str], object] = print,
) -> Path:
    """Measure all candidates on ``device``, for an encoder of the paper's size.

    Parameters
    ----------
    device
        The GPU.
    output
        Folder of the file; None for `configuration.tuned_folder`, where it is found and used.
    types, tiles, warps, stages
        The candidates; together they make some minutes of compiling.
    entries
        Entries of the batch that is measured.
    say
        Is given a line for each candidate.

    Returns
    -------
    Path
        The file, ``sm90.json`` on a GPU of compute capability 9.0.
    """
    weights = _weights(device)
    batches = [_cells(length, max(1, entries // length), device) for length in LENGTHS]
    found: dict[str, Any] = {}
    for dtype in types:
        milliseconds = {
            candidate: [_time(weights, batch, dtype, candidate) for batch in batches]
            for candidate in (
                Configuration(tile, count, depth)
                for tile in tiles
                for count in warps
                for depth in stages
            )
        }
        for candidate, times in milliseconds.items():
            shown = ", ".join(
                f"{time_:.3f} ms for cells of {length}" if math.isfinite(time_) else "does not fit"
                for time_, length in zip(times, LENGTHS, strict=True)
            )
            say(f"{TYPES[dtype]} {candidate._asdict()}: {shown}")
        found[TYPES[dtype]] = _choose(milliseconds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return _write(output or tuned_folder(), encoder.architecture(device), name, found)


def _choose(milliseconds: dict[Configuration, list[float]]) -> dict[str, Any]:
    """One type's entry of a configuration file."""
    best = [min(times) for times in zip(*milliseconds.values(), strict=True)]
    if not all(map(math.isfinite, best)):
        raise RuntimeError("no candidate could be launched")
    groups: dict[tuple[int, int], list[tuple[int, list[float]]]] = {}
    for (tile, warps, stages), times in milliseconds.items():
        relative = [time_ / least for time_, least in zip(times, best, strict=True)]
        groups.setdefault((tile, warps), []).append((stages, relative))

    def fastest(tile_and_warps: tuple[int, int], bucket: int) -> tuple[float, int]:
        return min((times[bucket], stages) for stages, times in groups[tile_and_warps])

    numbers = range(len(BUCKETS))
    chosen = min(groups, key=lambda group: sum(fastest(group, i)[0] for i in numbers))
    return {
        "tile": chosen[0],
        "warps": chosen[1],
        "buckets": [{"up_to": BUCKETS[i], "stages": fastest(chosen, i)[1]} for i in numbers],
    }


def _time(
    weights: EncoderWeights,
    batch: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    candidate: Configuration,
) -> float:
    """Median milliseconds of a batch; infinite where the kernel needs more than the GPU has."""

    def run() -> None:
        encoder.encode(weights, *batch, dtype=dtype, configuration=candidate)

    try:
        run()
    except triton.runtime.errors.OutOfResources:
        return math.inf
    if batch[0].device.type == "cuda":
        return float(triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median"))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def _write(folder: Path, architecture: int, name: str, types: dict[str, Any]) -> Path:
    """Write the file whole or not at all; types that were not tuned keep their settings."""
    kept = load(shipped_for(architecture))
    content = {
        "format_version": FORMAT_VERSION,
        "measured_on": name,
        "note": f"tuned with torch {torch.__version__}, triton {triton.__version__}",
        "types": {**kept, **types},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sm{shipped_for(architecture)}.json"
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)
    load.cache_clear()
    return path


def _weights(device: torch.device) -> EncoderWeights:
    """Random weights of the paper's sizes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        return (scale * torch.randn(*shape, generator=generator)).to(device)

    def block() -> BlockWeights:
        one = torch.ones(32, device=device)
        return BlockWeights(
            normal(96, 32), normal(96), normal(32, 32), normal(32), one, normal(32),
            normal(64, 32), normal(64), normal(32, 64), normal(32), one, normal(32),
        )  # fmt: skip

    return EncoderWeights(
        heads=2,
        genes=normal(60_000, 32),
        patches=normal(64, 32),
        cross=block(),
        self_blocks=(block(), block()),
        value_weight=normal(32),
        value_bias=normal(32),
        projection_weight=normal(10, 32),
        projection_bias=normal(10),
    )


def _cells(length: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, genes and values of equal cells; a few genes make most of the entries."""
    generator = torch.Generator().manual_seed(length)
    offsets = torch.arange(cells + 1) * length
    # the rank of a gene falls off as in real data: 4,000 genes make 83 % of the entries
    drawn = torch.rand(cells * length, generator=generator).pow(3.5)
    values = torch.randint(0, 6, (cells * length,), generator=generator, dtype=torch.uint8)
    genes = (drawn * 60_000).to(torch.int32).clamp(max=59_999)
    return offsets.to(device), genes.to(torch.uint16).to(device), values.to(device)
