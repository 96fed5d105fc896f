"""A small model of real human genes, and cells made on the fly."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from anndata.io import write_elem
from scipy import sparse
from threadpoolctl import threadpool_limits

from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary, RaggedCells, atlas, cli
from cellpatch_fast.devices import usable_cores
from cellpatch_fast.io import TokenStore
from cellpatch_fast.io.stores import embeddings, obs, token_writer
from cellpatch_fast.io.stores.buckets import Buckets
from cellpatch_fast.io.stores.token_writer import TokenWriter

from .compilation import compiled_by_one_process
from .examples import load_profile
from .io.stores.token_files import read_chunks

# `atlas.tokenize` is the function.
tokenizing = importlib.import_module("cellpatch_fast.atlas.tokenize")

load_profile()
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers that all use all cores wait for each other: small steps took eight times as long.
    threads = max(1, usable_cores() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(threads)
    threadpool_limits(threads)  # of NumPy's and scikit-learn's products
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of processes that tests start

GENES = 307
WIDTH = 640  # of an embedding at the paper's sizes


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers that need the same compiled function do not all compile it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with compiled_by_one_process(tmp_path_factory.getbasetemp().parent):  # which is all workers'
        yield


@pytest.fixture(scope="session")
def device_of() -> Callable[[str], torch.device]:
    """``device_of(backend)``: Triton runs on the GPU, where there is one, the others on the CPU."""

    def choose(backend: str) -> torch.device:
        on_gpu = backend == "triton" and torch.cuda.is_available()
        return torch.device("cuda" if on_gpu else "cpu")

    return choose


@pytest.fixture(scope="module")
def device(backend: str, device_of: Callable[[str], torch.device]) -> torch.device:
    """Where the backend of a test runs; ``backend`` is a fixture of each folder."""
    return device_of(backend)


@pytest.fixture(scope="session")
def triton_backend() -> Iterator[None]:
    """What tests of the Triton backend need: the package, and an interpreter that wastes no time.

    As it is, it takes twice as long, for three things that change no result:

    - It exchanges the contents of `triton.language` at every call of a function within a kernel.
      Our functions share that module with the kernel that calls them, for which it is done
      already; those of `triton.language` itself share `triton.language.core`, exchanged here.
    - It computes all integers a second time, to find overflows, and then does not tell of them.
    - It writes down which NumPy type belongs to which of Triton's, each time that it looks for one.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    core = interpreter.tl.core
    numpy_type = interpreter._get_np_dtype
    of_scalar = functools.cache(numpy_type)

    def cached(kind: Any) -> np.dtype[Any]:
        scalar = kind.element_ty if isinstance(kind, core.block_type) else kind
        return numpy_type(kind) if scalar.is_ptr() else of_scalar(scalar)

    def call(function: Any, *arguments: Any, **others: Any) -> Any:
        return function.rewrite()(*arguments, **others)

    builder = interpreter.interpreter_builder
    exchanged = interpreter._LangPatchScope()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(exchanged.restore)
        interpreter._patch_builtin(core, builder, exchanged)
        interpreter._patch_lang_core(core, exchanged)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        patch.setattr(builder, "options", options)
        patch.setattr(interpreter, "_get_np_dtype", cached)
        yield


@pytest.fixture
def nothing_is_left_to_pyplot() -> Iterator[None]:
    """No plot may stay in pyplot's list of open figures."""
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    yield
    assert pyplot.get_fignums() == before


@pytest.fixture(scope="session")
def small_vocabulary() -> GeneVocabulary:
    """Every 191st human gene."""
    human = GeneVocabulary.human()
    chosen = slice(0, GENES * 191, 191)
    return GeneVocabulary(human.ensembl_ids[chosen], human.symbols[chosen])


@pytest.fixture(scope="session")
def small_model(small_vocabulary: GeneVocabulary) -> CellPatch:
    """The paper's sizes, random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = CellPatchConfig(max_genes=small_vocabulary.size)
        return CellPatch(config, small_vocabulary).eval()


@pytest.fixture(scope="session")
def model_directory(small_model: CellPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "small-model"
    small_model.save_pretrained(directory)
    return directory


MakeCells = Callable[..., anndata.AnnData]
Embed = Callable[..., tuple[int, str]]
Refused = Callable[..., str]
Change = Callable[[anndata.AnnData], object]
Changed = Callable[[Change], Path]


@pytest.fixture(scope="session")
def make_cells(small_vocabulary: GeneVocabulary) -> MakeCells:
    """``make_cells(cells, seed=0)``: raw counts of the model's genes and 3 unknown ones.

    The first cell is empty and the last expresses every gene. X, the layer "other" and raw differ.
    """

    def make(cells: int = 211, seed: int = 0) -> anndata.AnnData:
        random = np.random.default_rng(seed)

        def counts() -> sparse.csr_matrix:
            density = random.beta(0.5, 3, GENES + 3) * 0.8
            present = random.random((cells, GENES + 3)) < density
            values = present * random.geometric(0.3, present.shape).astype(np.float32)
            values[0] = 0
            values[-1] = 1 + np.arange(GENES + 3) % 11
            return sparse.csr_matrix(values)

        names = [*small_vocabulary.ensembl_ids, "unknown1", "unknown2", "ENSG99999999999"]
        obs = pd.DataFrame(
            {
                "kind": pd.Categorical(random.choice(["b", "a", "c"], cells), ["c", "a", "b"]),
                "depth": random.random(cells),
                "barcode": [f"BC{random.integers(10**9)}" for _ in range(cells)],
            },
            index=[f"cell{seed}_{cell}" for cell in range(cells)],
        )
        adata = anndata.AnnData(
            counts(), obs=obs, var=pd.DataFrame(index=names), layers={"other": counts()}
        )
        adata.raw = anndata.AnnData(counts(), obs=obs, var=adata.var)
        return adata

    return make


@pytest.fixture
def cells_file(make_cells: MakeCells, tmp_path: Path) -> Path:
    path = tmp_path / "cells.h5ad"
    make_cells().write_h5ad(path)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_zarr(adata: anndata.AnnData, path: Path, version: Literal[2, 3] = 3) -> Path:
    """Store ``adata`` as an AnnData .zarr folder."""
    with anndata.settings.override(zarr_write_format=version, auto_shard_zarr_v3=False):
        write_elem(zarr.open_group(path, mode="w", zarr_format=version), "/", adata)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.zarr"


@pytest.fixture
def embed_command(capsys: pytest.CaptureFixture[str], model_directory: Path, output: Path) -> Embed:
    """``embed_command(inputs and options...)``: exit code and what is on stderr."""

    def run(*arguments: Any, model: Path = model_directory) -> tuple[int, str]:
        command = ["embed", *arguments, "--model", model, "--output", output]
        code = cli.main([str(part) for part in command])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def refused(embed_command: Embed, output: Path) -> Refused:
    """``refused(inputs and options...)``: the one message, of a run that left nothing."""

    def run(*arguments: Any, log: int = 0, **options: Any) -> str:
        code, err = embed_command(*arguments, **options)
        assert code == 1
        lines = err.splitlines()
        assert len(lines) == log + 1, err
        assert lines[-1].startswith("cellpatch: ")
        assert "Traceback" not in err
        assert not output.exists()
        return lines[-1].removeprefix("cellpatch: ")

    return run


class Stopped(Exception):
    """Ends a run early."""


@contextlib.contextmanager
def stopped_after(shards: int) -> Iterator[None]:
    """The run inside ends with an error once so many shards are written."""
    write = embeddings.EmbeddingWriter.write

    def write_or_stop(writer: Any, shard: int, *rest: Any) -> None:
        if shard == shards:
            raise Stopped
        write(writer, shard, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings.EmbeddingWriter, "write", write_or_stop)
        with pytest.raises(Stopped):
            yield


class SmallWriter(TokenWriter):
    """Chunks of 53 entries, shards of 3 chunks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, chunk_entries=53, shard_chunks=3, **options)


class SmallBuckets(Buckets):
    """About 10 buckets, with as many checkpoints."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(
            *arguments, bucket_bytes=4_001, gathered_bytes=1_999, checkpoint_bytes=3_001
        )


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, chunks, shards and buckets that cells do not line up with."""
    monkeypatch.setattr(tokenizing, "MAX_ENTRIES", 401)
    monkeypatch.setattr(tokenizing, "TokenWriter", SmallWriter)
    monkeypatch.setattr(token_writer, "WAITING_CHUNKS", 4)
    monkeypatch.setattr(tokenizing, "Buckets", SmallBuckets)
    monkeypatch.setattr(obs, "ROWS", 17)
    monkeypatch.setattr(obs, "SORTED_ROWS", 83)


Tokenize = Callable[..., RaggedCells]


@pytest.fixture
def tokenize(small_vocabulary: GeneVocabulary, output: Path) -> Tokenize:
    """``tokenize(inputs, **options)``: the cells in the finished store."""

    def run(inputs: Any, **options: Any) -> RaggedCells:
        atlas.tokenize(inputs, output, **{"vocabulary": small_vocabulary} | options)
        return read_cells(output)

    return run


def read_cells(path: Path) -> RaggedCells:
    with TokenStore(path) as store:
        arrays = (store.offsets, read_chunks(store.genes), read_chunks(store.values))
        return RaggedCells(*map(torch.from_numpy, arrays))
