"""Training steps against the padded original's: ``python bench/training.py [--output FILE.json]``.

Measures whole steps (forward, loss, backward, gradient clipping, Adam) in one run, interleaved so
that a noisy machine disturbs both alike:

- a pretraining step: 512 cells of 1,000 genes (median), 30 % of them masked and half as many zeros;
- a fine-tuning step: 256 cells of 1,000 genes, 11 classes, no projection;
- memory of a pretraining step against the number of entries, and against the longest cell;
- a fine-tuning step of few cells against the size of the vocabulary (`bench.training_vocabulary`).

Both sides see the same cells, have the paper's sizes, and drop 10 % of the attention weights. The
original takes a pretraining batch in parts whose gradients add up, because it holds all pairs of
prompts, 4 GB per tensor for 512 cells; of some sizes of part the fastest counts. On a GPU both
compute under autocast to bfloat16.

Prints Markdown and writes JSON beside it; ``--parts`` names those to measure alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import training_vocabulary
from bench.cells import GENES, draw_cells
from bench.cpu import median, timed, with_values
from bench.machine import processor
from bench.peers.original import PaddedPathFormer, PaddedPathFormerLp
from bench.report import table
from cellpatch_fast import CellPatchConfig, GeneVocabulary, RaggedCells
from cellpatch_fast.model import CellPatchAnnotator, MaskedGeneModel
from cellpatch_fast.preprocessing.masking import Masked, Masking, Measured, mask

ATLAS = 10_000_000 * 50  # cells the paper's pretraining sees, in all epochs
CLASSES = 11
# Cells that the original pretrains with at a time, by kind of device. On two cores a step of 64
# cells took 2.2 s in parts of 4, 2.5 s in parts of 16, 3.0 s at once.
PART_CELLS = {"cpu": (4, 64), "cuda": (64, 128, 256)}
TARGETS = {"cpu": 5.0, "cuda": 20.0}  # times the original

Step = Callable[[], None]


class Sizes(NamedTuple):
    pretraining_cells: int = 512
    finetuning_cells: int = 256
    length: int = 1000  # genes of a cell, median
    held: int = 64  # cells whose memory is measured
    long_cell: int = 20_000  # genes
    repeats: int = 3


TOY = Sizes(5, 4, 40, 17, 300, 1)


class Padded(NamedTuple):
    """Masked cells as the original takes them."""

    values: Tensor  # float32 [B, L]
    genes: Tensor  # [B, L]
    prompts: Tensor  # [B, T]
    targets: Tensor  # float32 [B, T]
    asked: Tensor  # bool [B, T]: no padding

    @classmethod
    def of(cls, masked: Masked, device: torch.device) -> Padded:
        genes, values = masked.encoder.to_padded()
        prompts, targets = masked.decoder.to_padded()
        lengths = masked.decoder.offsets.diff()
        asked = torch.arange(prompts.shape[1]) < lengths[:, None]
        padded = cls(values.float(), genes, prompts, targets.float(), asked)
        return cls._make(x.to(device) for x in padded)


def draw(cells: int, length: int) -> RaggedCells:
    rng = np.random.default_rng(0)
    return with_values(*draw_cells(cells, length, rng), rng)


def hide(cells: RaggedCells, masking: Masking | None = None) -> Masked:
    measured = np.ones((1, GENES + 1), bool)
    measured[0, 0] = False  # padding
    identities = np.arange(len(cells))
    return mask(cells, identities, measured=Measured(measured), masking=masking, seed=0, epoch=0)


def make_step(
    model: nn.Module, losses: list[Callable[[], Tensor]], *, lr: float, weight_decay: float
) -> Step:
    """Clipped gradients of the sum of some losses, computed one after the other, and Adam."""
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    device = next(model.parameters()).device
    model.train()

    def step() -> None:
        optimiser.zero_grad()
        for loss in losses:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                computed = loss()
            computed.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def our_loss(model: MaskedGeneModel, masked: Masked) -> Tensor:
    return F.mse_loss(model(masked.encoder, masked.decoder), masked.decoder.values.float())


def padded_loss(model: PaddedPathFormer, part: Padded, predicted: int) -> Tensor:
    """What a part of a batch adds to the loss of all that is predicted."""
    predictions = model(part.values, part.genes, part.prompts).squeeze(-1)
    return ((predictions - part.targets) * part.asked).square().sum() / predicted


def our_pretraining(masked: Masked, device: torch.device) -> Step:
    torch.manual_seed(0)
    config = CellPatchConfig(max_genes=GENES + 1)
    model = MaskedGeneModel(config, GeneVocabulary.human()).to(device)
    there = Masked(masked.encoder.to(device), masked.decoder.to(device), masked.counts)
    return make_step(model, [partial(our_loss, model, there)], lr=1e-4, weight_decay=5e-5)


def original_pretraining(masked: Masked, cells: int, device: torch.device) -> Step:
    """In parts of so many cells."""
    torch.manual_seed(0)
    model = PaddedPathFormer(GENES + 1).to(device)
    losses: list[Callable[[], Tensor]] = []
    for start in range(0, len(masked.encoder), cells):
        span = start, min(start + cells, len(masked.encoder))
        some = Masked(masked.encoder.slice(*span), masked.decoder.slice(*span), masked.counts)
        part = Padded.of(some, device)
        losses.append(partial(padded_loss, model, part, masked.decoder.entries))
    return make_step(model, losses, lr=1e-4, weight_decay=5e-5)


def fastest_original_pretraining(masked: Masked, device: torch.device) -> tuple[int, Step]:
    """In parts of the one of `PART_CELLS` that is fastest after a warm-up; and which that is."""
    cells = len(masked.encoder)
    sizes = sorted({min(part, cells) for part in PART_CELLS[device.type]})
    steps = [original_pretraining(masked, size, device) for size in sizes]
    taken = timed(*steps, repeats=1)
    return min(zip(taken, sizes, steps, strict=True), key=lambda found: found[0])[1:]


def our_finetuning(cells: RaggedCells, labels: Tensor, device: torch.device) -> Step:
    torch.manual_seed(0)
    config = CellPatchConfig(max_genes=GENES + 1, projection_dim=None)
    classes = [f"class {i}" for i in range(CLASSES)]
    model = CellPatchAnnotator(config, GeneVocabulary.human(), classes).to(device)
    there, labels = cells.to(device), labels.to(device)
    return make_step(
        model, [lambda: F.cross_entropy(model(there), labels)], lr=1e-3, weight_decay=5e-4
    )


def original_finetuning(cells: RaggedCells, labels: Tensor, device: torch.device) -> Step:
    torch.manual_seed(0)
    model = PaddedPathFormerLp(GENES + 1, CLASSES, projection=None).to(device)
    genes, values = (x.to(device) for x in cells.to_padded())
    counts, labels = values.float(), labels.to(device)
    return make_step(
        model, [lambda: F.cross_entropy(model(counts, genes), labels)], lr=1e-3, weight_decay=5e-4
    )


def compare(ours: Step, original: Step, cells: int, repeats: int, target: float) -> dict[str, Any]:
    our_times, original_times = timed(ours, original, repeats=repeats)
    ratios = [slow / fast for fast, slow in zip(our_times, original_times, strict=True)]
    rate = cells / median(our_times)
    return {
        "cells": cells,
        "ms per cell": 1e3 * median(our_times) / cells,
        "ms per cell, original": 1e3 * median(original_times) / cells,
        "original / ours": median(ratios),
        "lowest ratio": min(ratios),
        "highest ratio": max(ratios),
        "target": target,
        "cells/s": rate,
        "days for 10 million cells, 50 epochs": ATLAS / rate / 86_400,
    }


def status(field: str) -> float:
    """MB of this process's memory: ``VmRSS`` now, ``VmHWM`` at most."""
    field_line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert field_line is not None
    return int(field_line[1]) / 1024


def peak(cells: RaggedCells, device: torch.device) -> float:
    """MB that a pretraining step takes at most, besides what is there between two steps."""
    uncut = Masking(max_encoder=sys.maxsize, max_decoder=sys.maxsize)
    step = our_pretraining(hide(cells, uncut), device)
    step()  # afterwards there is what Adam keeps
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the highest is what there is now
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def measure_memory(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    cells, long = draw(sizes.held, sizes.length), draw(1, sizes.long_cell)
    shorter = draw(sizes.held, (cells.entries - long.entries) // sizes.held)
    cases = {
        "cells of like length": cells,
        "one long cell, about as many entries": RaggedCells.concatenate([shorter, long]),
        "twice as many entries": RaggedCells.concatenate([cells, cells]),
    }
    rows = []
    for name, given in cases.items():
        longest = int(given.lengths.max())
        rows.append(
            {
                "case": name,
                "cells": len(given),
                "entries": given.entries,
                "longest cell": longest,
                "entries if padded": len(given) * longest,
                "peak MB": peak(given, device),
            }
        )
    return rows


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{results['date']}"
    ]
    for title in ("pretraining", "fine-tuning"):
        body = [[name, f"{value:,.4g}"] for name, value in results.get(title, {}).items()]
        lines += table([title, ""], body) if body else []
    if "memory" in results:
        body = [
            [value if isinstance(value, str) else f"{value:,.0f}" for value in row.values()]
            for row in results["memory"]
        ]
        lines += table(list(results["memory"][0]), body)
    if "vocabulary" in results:
        lines += training_vocabulary.report(results["vocabulary"])
    return "\n".join(lines)


def measure_pretraining(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    masked = hide(draw(sizes.pretraining_cells, sizes.length))
    return compare(
        our_pretraining(masked, device),
        fastest_original_pretraining(masked, device)[1],
        sizes.pretraining_cells,
        sizes.repeats,
        TARGETS[device.type],
    )


def measure_finetuning(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    cells = draw(sizes.finetuning_cells, sizes.length)
    labels = torch.arange(len(cells)) % CLASSES
    return compare(
        our_finetuning(cells, labels, device),
        original_finetuning(cells, labels, device),
        sizes.finetuning_cells,
        sizes.repeats,
        TARGETS[device.type],
    )


def measure_vocabulary(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """On the CPU: its own sizes, and its own toy."""
    parts = training_vocabulary
    return parts.measure(parts.TOY if sizes == TOY else parts.Sizes())


PARTS = {
    "pretraining": measure_pretraining,
    "fine-tuning": measure_finetuning,
    "memory": measure_memory,
    "vocabulary": measure_vocabulary,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    sizes = TOY if options.toy else Sizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "toy": options.toy,
        "machine": {
            "processor": processor() if device.type == "cpu" else torch.cuda.get_device_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        **{part: PARTS[part](sizes, device) for part in options.parts},
    }
    print(report(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
