"""`cellpatch embed` in processes of its own: killed, interrupted, without disk, without memory.

Each process is forked from one that has everything imported and compiled, so a run takes a
second; from there on it is the command's own.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from ..conftest import GENES, MakeCells, tree

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, /proc and rlimits")

CELLS, SHARD = 4_001, 40
SHARDS = -(-CELLS // SHARD)
MIB = 2**20

# Reads commands, one JSON object a line, and answers with the process id and the exit code.
FORK_SERVER = """
import json, os, resource, sys
import torch
from cellpatch_fast import atlas, cli
from cellpatch_fast.io.stores import embeddings

embeddings.SHARD_BYTES = 1  # one chunk to a shard
torch.set_num_threads(1)  # threads would not survive the fork
cli.main(sys.argv[1:])
print("ready", flush=True)
for line in sys.stdin:
    command = json.loads(line)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        embeddings.CHUNK_ROWS = command["shard"]
        for number, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        for limit, size in command["limits"].items():
            if limit == "RLIMIT_DATA":
                with open("/proc/self/status") as status:
                    used = next(int(l.split()[1]) for l in status if l.startswith("VmData"))
                size += used * 1024
            resource.setrlimit(getattr(resource, limit), (size, size))
        code = cli.main(command["arguments"])
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Run:
    """A command that has begun."""

    server: subprocess.Popen[str]
    process: int
    folder: Path

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process, number)

    def wait(self) -> int:
        """The exit code; minus the signal that ended the process."""
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text()


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def server(
    make_cells: MakeCells, model_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    folder = tmp_path_factory.mktemp("server")
    make_cells(30).write_h5ad(folder / "warm.h5ad")
    arguments = ["embed", folder / "warm.h5ad", "--model", model_directory]
    command = [sys.executable, "-c", FORK_SERVER, *arguments, "--output", folder / "warm.zarr"]
    with subprocess.Popen(
        [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        while process.stdout.readline() not in ("ready\n", ""):
            pass
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def start(
    server: subprocess.Popen[str],
    tmp_path_factory: pytest.TempPathFactory,
    model_directory: Path,
) -> Start:
    """``start(inputs and options..., output=..., limits={})``: begin `cellpatch embed`."""

    def begin(
        *arguments: Path | str,
        output: Path,
        limits: dict[str, int] | None = None,
        shard: int = SHARD,
    ) -> Run:
        folder = tmp_path_factory.mktemp("run")
        command = ["embed", *arguments, "--model", model_directory, "--output", output]
        request = {
            "arguments": [str(part) for part in command],
            "limits": limits or {},
            "shard": shard,
            "stdout": str(folder / "stdout"),
            "stderr": str(folder / "stderr"),
        }
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return Run(server, int(server.stdout.readline()), folder)

    return begin


@pytest.fixture(scope="module")
def large_file(make_cells: MakeCells, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.h5ad"
    adata = make_cells(CELLS)
    del adata.raw, adata.layers["other"]
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def expected(start: Start, large_file: Path) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    output = large_file.with_name("uninterrupted.zarr")
    run = start(large_file, output=output)
    assert run.wait() == 0, run.err
    return tree(output)


def shards_written(output: Path) -> int:
    folder = output.with_name(f"{output.name}.partial") / "store/obsm/X_cellpatch/c"
    return len(os.listdir(folder)) if folder.is_dir() else 0


def wait_for_shards(output: Path, shards: int) -> None:
    while shards_written(output) < shards and not output.exists():
        time.sleep(0.001)


def test_killed_at_ten_moments_the_run_ends_with_the_same_bytes(
    start: Start, large_file: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """The moments are spread over the whole run, from before its first file to its last shard."""
    output = tmp_path / "killed.zarr"
    chance = random.Random(11)
    kills = 0
    for part in range(10):
        run = start(large_file, output=output)
        reached = (
            0 if part == 0 else chance.randrange(part * SHARDS // 10, (part + 1) * SHARDS // 10)
        )
        wait_for_shards(output, reached)
        time.sleep(chance.uniform(0, 0.02))
        run.send(signal.SIGKILL)
        code = run.wait()
        assert code in (-signal.SIGKILL, 0), run.err
        kills += code != 0
        assert output.exists() == (code == 0)
    assert kills >= 9  # the last may come too late
    run = start(large_file, output=output)
    assert run.wait() == 0, run.err
    assert "of them earlier)" in run.out or "is complete already" in run.out
    assert tree(output) == expected
    assert not output.with_name("killed.zarr.partial").exists()


def test_ctrl_c_keeps_what_is_done(
    start: Start, large_file: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    output = tmp_path / "interrupted.zarr"
    run = start(large_file, output=output)
    wait_for_shards(output, 2)  # early: a busy machine may let the run end before the signal
    run.send(signal.SIGINT)
    assert run.wait() == 130
    *_, message = run.err.splitlines()
    assert message == (
        "cellpatch: interrupted. What is done is kept: the same command goes on from there."
    )
    assert "Traceback" not in run.err
    assert not output.exists()
    run = start(large_file, output=output)
    assert run.wait() == 0
    assert tree(output) == expected


def test_two_processes_do_not_write_to_one_output(
    start: Start, large_file: Path, model_directory: Path, tmp_path: Path
) -> None:
    """The second one is refused, wherever it runs."""
    output = tmp_path / "shared.zarr"
    first = start(large_file, output=output)
    wait_for_shards(output, 3)
    os.kill(first.process, signal.SIGSTOP)
    command = [sys.executable, "-m", "cellpatch_fast.cli", "embed", large_file]
    command += ["--model", model_directory, "--output", output]
    second = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    os.kill(first.process, signal.SIGCONT)
    assert second.returncode == 1
    assert "another process is writing there" in second.stderr
    assert first.wait() == 0


@pytest.mark.parametrize("size", [500, 60_000])
def test_full_disk_is_reported_and_the_run_resumes(
    start: Start, large_file: Path, tmp_path: Path, expected: dict[str, bytes], size: int
) -> None:
    """No file, messages included, may grow beyond so many bytes: no journal fits, or no shard."""
    output = tmp_path / "full.zarr"
    run = start(large_file, output=output, limits={"RLIMIT_FSIZE": size})
    assert run.wait() == 1
    *log, message = run.err.splitlines()
    assert message.startswith("cellpatch: ")
    assert "File too large" in message
    assert message.endswith("free some space, then repeat the command; what is done is kept.")
    assert len(log) == 1
    assert not output.exists()
    run = start(large_file, output=output)
    assert run.wait() == 0, run.err
    assert tree(output) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB: room for half of the embeddings."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_small_file_system_fills_up_and_is_made_larger(
    start: Start, large_file: Path, small_disk: Path, expected: dict[str, bytes]
) -> None:
    output = small_disk / "full.zarr"
    run = start(large_file, output=output)
    assert run.wait() == 1
    assert "No space left on device" in run.err
    assert "what is done is kept" in run.err
    subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
    run = start(large_file, output=output)
    assert run.wait() == 0, run.err
    assert "of them earlier)" in run.out
    assert tree(output) == expected


def write_wide_file(path: Path, pieces: int, cells: int = 100) -> None:
    """Cells that store all of 2,000 columns, most of them zeros: 16 KB a cell."""
    columns = 2_000
    names = [f"nothing{column}" for column in range(columns)]
    names[:GENES] = anndata.read_h5ad(path).var_names[:GENES]
    data = np.zeros((cells, columns), np.float32)
    data[:, :GENES] = np.random.default_rng(0).integers(0, 5, (cells, GENES))
    shape = (pieces * cells, columns)
    adata = anndata.AnnData(sparse.csr_matrix(shape, dtype=np.float32))
    adata.var_names = names
    with h5py.File(path, "w") as file:
        anndata.io.write_elem(file, "/", adata)
        for key, piece in (
            ("indices", np.tile(np.arange(columns, dtype=np.int32), cells)),
            ("data", data.reshape(-1)),
        ):
            del file[f"X/{key}"]
            array = file.create_dataset(f"X/{key}", (pieces * len(piece),), piece.dtype)
            for start in range(0, len(array), len(piece)):
                array[start : start + len(piece)] = piece
        file["X/indptr"][:] = np.arange(shape[0] + 1) * columns


def test_file_larger_than_memory_is_embedded(
    start: Start, large_file: Path, tmp_path: Path
) -> None:
    """The limit is on what the run adds to a process that has all libraries loaded."""
    limit = 256 * MIB
    path = tmp_path / "wide.h5ad"
    path.write_bytes(large_file.read_bytes())  # for its names of genes
    write_wide_file(path, pieces=250)
    assert path.stat().st_size > 1.2 * limit
    output = tmp_path / "wide.zarr"
    run = start(path, "--pool", "mean", output=output, shard=5_000, limits={"RLIMIT_DATA": limit})
    assert run.wait() == 0, run.err
    assert re.search(r"25,000 cells, [\d,]+ entries, 307 genes matched, 1,693 unknown", run.out)
    run = start(path, output=tmp_path / "less.zarr", limits={"RLIMIT_DATA": 32 * MIB})
    assert run.wait() == 1  # the limit bites
    assert "not enough memory" in run.err
