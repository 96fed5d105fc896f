"""Kills commands of ``cellpatch`` at random moments, lets them go on, and compares what they make.

::

    python tests/kills.py --kills 100 pretrain finetune embed tokenize

A command is run once without interruption. Then it is begun anew, killed (SIGKILL) and repeated,
with the same command line, until it comes to its end; that again and again until so many kills are
done. Every file must then be as the uninterrupted run has left it, bit for bit, with nothing
beside it; times are left out of the tables of training, and pictures of times. One half of the
moments is drawn from the run's duration, the other half from the changes to its files, which are
what a kill can spoil.

What was drawn follows from the printed seed, so ``--seed`` repeats a failure, as far as the timing
of processes can be repeated; the folder of a failure is kept.

Runs are forked from this process, which has everything imported and compiled, so that one takes
a second; with ``--fresh`` each is a new interpreter, as from a shell.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums are split by it; threads survive no fork
os.environ.setdefault("TRITON_INTERPRET", "0")

LOG = "log.txt"  # what the runs say
TIMED = ("seconds", "cells_per_second")
UNCOMPARED = ("tensorboard", "training_curves.png", "training_curves.svg", "cellpatch-lock")
POLL = 0.0005  # seconds

# 2,500 cells of 32 KB each: three shards of embeddings
MODEL: dict[str, Any] = {"patches": 32, "dim": 14, "heads": 2, "mlp_dim": 11}
MODEL |= {"self_attention_blocks": 1, "projection_dim": 256}
TRAINING = {"epochs": 3, "batch_size": 40, "validation": 0.1, "spectral": False}
GENES = 300


def commands(inputs: Path) -> dict[str, list[str]]:
    """What is run, but for ``--output``."""
    few, many = str(inputs / "few.h5ad"), str(inputs / "many.h5ad")
    new = ["--config", str(inputs / "config.json"), "--vocabulary", str(inputs / "vocabulary.json")]
    new += ["--checkpoint-minutes", "0"]
    model = ["--model", str(inputs / "model")]
    return {
        "pretrain": ["pretrain", few, *new],
        "finetune": ["finetune", few, *new, "--label", "type", "--linear"],
        "embed": ["embed", many, *model],
        "tokenize": ["tokenize", many, *model, "--shuffle"],
    }


def make_inputs(folder: Path) -> None:
    """Cells, a vocabulary, a configuration and a model."""
    import anndata
    import numpy as np
    import pandas as pd
    import torch
    from scipy import sparse

    from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary

    human = GeneVocabulary.human()
    vocabulary = GeneVocabulary(human.ensembl_ids[:GENES], human.symbols[:GENES])
    vocabulary.save(folder / "vocabulary.json")
    chance = np.random.default_rng(0)
    for name, cells in (("few", 200), ("many", 2_500)):
        types = chance.integers(0, 3, cells)
        means = 0.3 + 2.0 * (np.arange(GENES) % 3 == types[:, None])
        obs = pd.DataFrame({"type": np.array(["a", "b", "c"])[types]})
        obs.index = [f"cell{number}" for number in range(cells)]
        counts = sparse.csr_matrix(chance.poisson(means).astype(np.float32))
        var = pd.DataFrame(index=list(vocabulary.ensembl_ids))
        anndata.AnnData(counts, obs=obs, var=var).write_h5ad(folder / f"{name}.h5ad")
    sizes = MODEL | {"max_genes": vocabulary.size}
    (folder / "config.json").write_text(json.dumps({"model": sizes, "training": TRAINING}))
    torch.manual_seed(0)
    CellPatch(CellPatchConfig(**sizes), vocabulary).save_pretrained(folder / "model")


@dataclass
class Run:
    """A command that has begun."""

    process: int
    log: Path

    def ended(self) -> int | None:
        """The exit code; None as long as it runs."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if process else None

    def kill(self) -> int:
        """The exit code: minus 9, unless the end was faster."""
        os.kill(self.process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def start(arguments: list[str], log: Path, fresh: bool) -> Run:
    """Begin a command; what it says is added to ``log``."""
    with log.open("ab") as said:
        if fresh:
            command = [sys.executable, "-m", "cellpatch_fast.cli", *arguments]
            process = subprocess.Popen(command, stdout=said, stderr=said)
            return Run(process.pid, log)
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code = 70
            try:
                code = command_line(arguments)
            finally:
                sys.stdout.flush()
                os._exit(code)
    return Run(child, log)


def command_line(arguments: list[str]) -> int:
    from cellpatch_fast import cli

    return cli.main(arguments)


def state_of(place: Path) -> list[tuple[str, int, int]]:
    """Something that differs when a file does."""
    state = []
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                stat = os.stat(os.path.join(folder, name))
            except FileNotFoundError:  # renamed in between
                continue
            state.append((os.path.join(folder, name), stat.st_size, stat.st_mtime_ns))
    return state


@dataclass
class Watched:
    """How a run went."""

    code: int
    seconds: float
    changes: int


def watch(
    run: Run, place: Path, most_seconds: float = math.inf, most_changes: float = math.inf
) -> Watched:
    """Wait for the end of a run, or kill it after so long, or so many changes of its files."""
    began, changes, state = time.perf_counter(), 0, state_of(place)
    while True:
        code = run.ended()
        seconds = time.perf_counter() - began
        if code is not None:
            return Watched(code, seconds, changes)
        if seconds >= most_seconds or changes >= most_changes:
            return Watched(run.kill(), seconds, changes)
        before, state = state, state_of(place)
        changes += state != before
        time.sleep(POLL)


def result(place: Path) -> dict[str, Any]:
    """Every file that a command has left, without what times are in."""
    return {
        str(path.relative_to(place)): _content(path)
        for path in sorted(place.rglob("*"))
        if path.is_file() and not set(path.relative_to(place).parts) & set(UNCOMPARED)
    }


def _content(path: Path) -> Any:
    if path.name == "checkpoint.pt":
        return _checkpoint(path)
    if path.name not in ("steps.csv", "epochs.csv"):
        return path.read_bytes()
    rows = csv.DictReader(io.StringIO(path.read_bytes().decode(), newline=""))
    return [[x for name, x in row.items() if name not in TIMED] for row in rows]


def _checkpoint(path: Path) -> list[Any]:
    """Its content as lists, with tensors as bytes."""
    import torch

    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["sizes"], checkpoint["place"]["seconds"]

    def flat(value: Any) -> Any:
        if isinstance(value, dict):
            return [(name, flat(content)) for name, content in value.items()]
        if isinstance(value, list | tuple):
            return [flat(content) for content in value]
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    return list(flat(checkpoint))


class Failure(Exception):
    """What went wrong, and where to look."""


def kill_often(name: str, inputs: Path, work: Path, options: argparse.Namespace) -> None:
    """Kill one command so many times.

    Raises
    ------
    Failure
        If it does not go on, or ends otherwise than an uninterrupted run.
    """
    chance = random.Random(f"{options.seed} {name}")

    def begin(place: Path) -> Run:
        command = [*commands(inputs)[name], "--output", str(place / "out.zarr")]
        return start(command, work / LOG, options.fresh)

    def require(condition: bool, message: str, place: Path) -> None:
        if not condition:
            log = (work / LOG).read_text()[-2_000:]
            raise Failure(f"{name}, seed {options.seed}: {message}; see {place}\n{log}")

    whole = work / "whole"
    whole.mkdir()
    uninterrupted = watch(begin(whole), whole)
    require(uninterrupted.code == 0, "the uninterrupted run failed", whole)
    expected = result(whole)
    kills = ends = 0
    place = work / "0"
    place.mkdir()
    moments: list[str] = []
    while True:
        if chance.random() < 0.5:
            seconds = chance.uniform(0, uninterrupted.seconds)
            watched = watch(begin(place), place, most_seconds=seconds)
        else:
            changes = chance.randint(1, max(1, uninterrupted.changes))
            watched = watch(begin(place), place, most_changes=changes)
        moments.append(f"{watched.seconds:.2f} s, {watched.changes} changes")
        if watched.code == -signal.SIGKILL:
            kills += 1
            if kills < options.kills:
                continue
            watched = watch(begin(place), place)
        told = f"after kills at [{'; '.join(moments)}]"
        require(watched.code == 0, f"exit code {watched.code} {told}", place)
        ends += 1
        found = result(place)
        differing = [n for n in {**expected, **found} if found.get(n) != expected.get(n)]
        require(not differing, f"{', '.join(differing)} differ {told}", place)
        shutil.rmtree(place)
        if kills >= options.kills:
            break
        place = work / str(ends)
        place.mkdir()
        moments.clear()
    print(f"{name}: {kills} kills, {ends} runs to the end, all bytes equal", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = list(commands(Path()))
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=", ".join(names))
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="of each command")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="of the moments")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for every run")
    options = parser.parse_args()
    if strangers := set(options.commands) - set(names):
        parser.error(f"there is no {', '.join(sorted(strangers))}: {', '.join(names)}")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(10**6)
    print(f"seed {options.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="cellpatch-kills-"))
    inputs = folder / "inputs"
    inputs.mkdir()
    make_inputs(inputs)
    failed = False
    for name in options.commands or names:
        warm = [*commands(inputs)[name], "--output", str(folder / f"{name}.warm")]
        if not options.fresh and command_line(warm):
            return 1
        work = folder / name
        work.mkdir()
        began = time.perf_counter()
        try:
            kill_often(name, inputs, work, options)
        except Failure as failure:
            print(failure, file=sys.stderr, flush=True)
            failed = True
        else:
            shutil.rmtree(work)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
