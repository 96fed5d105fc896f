"""How long one waits for the first result, in new processes.

Whole processes are timed, the start of Python included. They take turns, so that a noisy machine
disturbs all alike; what takes more than a second is repeated less often. The first round does not
count: it reads files from the disk, and compiles kernels where no earlier process has (their code
is kept on disk).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.processes import COMPILING, Failed, run_python, timing_of
from bench.reporting.results import Record

CELLS, GENES = 100, 1_000  # of the first embedding
EMBED = """
import sys, anndata, cellpatch_fast
cells = anndata.read_h5ad(sys.argv[1])
cellpatch_fast.tl.embed(cells, sys.argv[2], device=sys.argv[3])
"""


class Start(NamedTuple):
    """Something that a new process does."""

    what: str
    arguments: tuple[str | Path, ...]  # of Python
    limit: float | None = None  # seconds that are aimed for


def starts(folder: Path, device: torch.device) -> list[Start]:
    """All that are measured; model and cells of the first embedding are made in ``folder``."""
    cells, model = example(folder)
    return [
        Start("import cellpatch_fast", ("-c", "import cellpatch_fast"), 1.5),
        Start("cellpatch --help", ("-m", "cellpatch_fast.cli", "--help"), 0.5),
        Start("first embedding", ("-c", EMBED, cells, model, str(device))),
    ]


def example(folder: Path) -> tuple[Path, Path]:
    """A file of a few cells and an untrained model, unless they are there already."""
    from cellpatch_fast.synthetic.generate import synthetic_atlas

    cells = folder / f"cells-{CELLS}x{GENES}.h5ad"
    if not cells.exists():
        synthetic_atlas(cells, CELLS, genes=GENES, progress=False)
    return cells, untrained(folder)


def untrained(folder: Path) -> Path:
    """A model directory with the paper's configuration and random weights."""
    from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary

    path = folder / "untrained-model"
    if not path.exists():
        torch.manual_seed(0)
        CellPatch(CellPatchConfig(), GeneVocabulary.human()).save_pretrained(path)
    return path


def measure_startup(
    folder: Path, device: torch.device, *, repeats: int, time_limit: float
) -> Iterator[Record]:
    """A record for each of `starts`, repeated so often, those above a second a third as often."""
    measured = starts(folder, device)
    first: dict[str, float] = {}
    taken: dict[str, list[float]] = {start.what: [] for start in measured}
    failed: dict[str, Failed] = {}
    for repeat in range(repeats + 1):
        for start in measured:
            if start.what in failed:
                continue
            if repeat > max(1, repeats // 3) and first[start.what] > 1:
                continue
            done = run_python(
                *start.arguments, limit=time_limit + (COMPILING if repeat == 0 else 0)
            )
            if isinstance(done, Failed):
                failed[start.what] = done
            elif repeat == 0:
                first[start.what] = done.seconds
            else:
                taken[start.what].append(done.seconds)
    for start in measured:
        name, details = f"startup/{start.what}", {"what": start.what, "limit": start.limit}
        if start.what in failed:
            yield Record("startup", name, *failed[start.what], details=details)
            continue
        details["first_call_seconds"] = first[start.what]
        seconds = timing_of(taken[start.what])
        yield Record("startup", name, "measured", seconds=seconds, per="process", details=details)
