"""The command line: help, exit codes, what each command says and makes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

import cellpatch_fast
from cellpatch_fast import CellPatch, cli, pl
from cellpatch_fast.cli import demo, demo_results
from cellpatch_fast.io.stores.embeddings import EmbeddingWriter

from ..conftest import GENES, MakeCells

COMMANDS = (
    "embed",
    "tokenize",
    "pretrain",
    "finetune",
    "annotate",
    "new-model",
    "import-checkpoint",
    "inspect",
    "demo",
    "tune",
    "synthetic-atlas",
)

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_worth_reading(capsys: Capture, command: str | None) -> None:
    code, out, err = run(capsys, *filter(None, [command, "--help"]))
    assert (code, err) == (0, "")
    named = COMMANDS if command is None else ("usage: cellpatch " + command,)
    for name in named:
        assert name in out
    undescribed = re.findall(
        r"^  (-{1,2}[\w-]+|INPUT|PATH)(?: [A-Za-z0-9.]+)?$\n(?!   )", out, re.M
    )
    assert not undescribed


def test_version(capsys: Capture) -> None:
    assert run(capsys, "--version") == (0, f"{cellpatch_fast.__version__}\n", "")


def test_installed_command_runs(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("cellpatch")
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == cellpatch_fast.__version__
    done = subprocess.run(
        [command, "inspect", "nowhere.h5ad"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr == "cellpatch: nowhere.h5ad: no such file or folder. Check the path.\n"


def test_new_model_can_embed(capsys: Capture, cells_file: Path, tmp_path: Path) -> None:
    """Twice with one seed gives one model; the rows are those that Python gets."""
    for name in ("one", "two"):
        code, out, err = run(capsys, "new-model", "--output", tmp_path / name, "--seed", 3)
        assert (code, err) == (0, "")
        assert re.fullmatch(
            rf"{tmp_path / name}: untrained, [\d,]+ genes, [\d,]+ parameters\n", out
        )
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    output = tmp_path / "out.zarr"
    options = ["--model", tmp_path / "one", "--output", output]
    code, out, err = run(capsys, "embed", cells_file, *options)
    assert code == 0
    assert re.fullmatch(
        rf"{output}: 211 cells, .* entries, {GENES} genes matched, 3 .* cells/s\n", out
    )
    assert re.fullmatch(rf"{cells_file}: {GENES} of .* raw counts\n", err)
    embedded = cellpatch_fast.tl.embed(
        anndata.read_h5ad(cells_file), CellPatch.from_pretrained(tmp_path / "one"), copy=True
    )
    found = anndata.read_zarr(output).obsm["X_cellpatch"]
    assert embedded is not None
    assert np.array_equal(found, embedded.obsm["X_cellpatch"])
    code, out, _ = run(capsys, "embed", cells_file, *options)
    assert (code, out) == (0, f"{output} is complete already: 211 cells, nothing to do\n")


def test_a_seed_changes_the_model(capsys: Capture, tmp_path: Path) -> None:
    weights = set()
    for seed in (0, 1):
        run(capsys, "new-model", "--output", tmp_path / str(seed), "--seed", seed)
        weights.add((tmp_path / str(seed) / "model.safetensors").read_bytes())
    assert len(weights) == 2


def test_every_option_of_embed_arrives(
    capsys: Capture, cells_file: Path, model_directory: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    adata = anndata.read_h5ad(cells_file)
    adata.var["names"] = adata.var_names
    adata.var_names = [f"x{n}" for n in range(adata.n_vars)]
    adata.write_h5ad(cells_file)
    code, _, err = run(
        *(capsys, "embed", cells_file, "--model", model_directory, "--output", output),
        *("--layer", "other", "--gene-column", "names", "--values", "counts", "--pool", "mean"),
        *("--dtype", "float16", "--batch-size", 9, "--backend", "reference", "--device", "cpu"),
    )
    assert code == 0
    assert "names" in err
    adata = anndata.read_zarr(output)
    assert adata.obsm["X_cellpatch"].dtype == np.float16
    assert adata.obsm["X_cellpatch"].shape == (211, 10)
    params = adata.uns["X_cellpatch"]["params"]
    wanted = {
        "layer": "other",
        "use_raw": False,
        "gene_column": "names",
        "pool": "mean",
        "dtype": "float16",
        "backend": "reference",
        "device": "cpu",
    }
    assert {name: params[name] for name in wanted} == wanted
    again = ("embed", cells_file, "--model", model_directory, "--output", output, "--use-raw")
    assert run(capsys, *again, "--gene-column", "names")[0] == 1
    adata = anndata.read_h5ad(cells_file)
    adata.raw = adata
    adata.write_h5ad(cells_file)
    assert run(capsys, *again, "--gene-column", "names", "--overwrite")[0] == 0
    assert anndata.read_zarr(output).uns["X_cellpatch"]["params"]["use_raw"]


def test_only_our_own_warnings_are_shown(
    capsys: Capture, cells_file: Path, model_directory: Path, tmp_path: Path
) -> None:
    """A repeated name of a cell makes anndata warn; few known genes make us warn."""
    adata = anndata.read_h5ad(cells_file)[:, GENES - 2 :].copy()
    del adata.raw
    adata.obs_names = ["same"] * adata.n_obs
    adata.write_h5ad(cells_file)
    output = tmp_path / "out.zarr"
    code, _, err = run(capsys, "embed", cells_file, "--model", model_directory, "--output", output)
    assert code == 0
    warning, log = err.splitlines()
    assert warning.startswith(f"cellpatch: warning: {cells_file}: only 2 of 5 genes matched")
    assert log.startswith(f"{cells_file}: 2 of 5 genes matched")


def test_imported_checkpoint_can_embed(capsys: Capture, tmp_path: Path) -> None:
    with np.load(Path(__file__).parents[1] / "data" / "original_outputs.npz") as file:
        prefix = "pretrain/state/"
        state = {
            name.removeprefix(prefix): torch.from_numpy(file[name])
            for name in file
            if name.startswith(prefix)
        }
    arguments = {
        "max_gene_num": 600,
        "embedding_dim": 32,
        "n_pathway": 64,
        "n_head": 2,
        "encoder_self_attn_depth": 2,
        "encoder_projection_dim": 10,
    }
    torch.save({"model_state_dict": state}, tmp_path / "best.pth")
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    (tmp_path / "gene2tok.json").write_text(json.dumps({f"g{n}": n for n in range(1, 600)}))
    command = (
        *("import-checkpoint", tmp_path / "best.pth", "--args", tmp_path / "args.json"),
        *("--vocabulary", tmp_path / "gene2tok.json", "--output", tmp_path / "model"),
    )
    code, out, err = run(capsys, *command)
    assert code == 0
    assert re.fullmatch(
        rf"{tmp_path / 'model'}: MaskedGeneModel, 599 genes, [\d,]+ parameters\n", out
    )
    assert "left out: 2 of the value norm" in err
    code, _, err = run(capsys, *command)
    assert code == 1
    assert err == (
        f"cellpatch: {tmp_path / 'model'} exists already: choose another --output or delete it\n"
    )
    counts = np.random.default_rng(0).poisson(0.3, (13, 40)).astype(np.float32)
    adata = anndata.AnnData(counts)
    adata.var_names = [f"g{n}" for n in range(10, 50)]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    model = ("--model", tmp_path / "model", "--output", tmp_path / "out.zarr")
    assert run(capsys, "embed", tmp_path / "cells.h5ad", *model)[0] == 0
    assert anndata.read_zarr(tmp_path / "out.zarr").obsm["X_cellpatch"].shape == (13, 640)


def facts(out: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in out.splitlines())


def test_inspect_model(capsys: Capture, model_directory: Path) -> None:
    code, out, err = run(capsys, "inspect", model_directory)
    assert (code, err) == (0, "")
    found = facts(out)
    assert found["kind"] == "CellPatch model"
    assert found["genes"] == str(GENES)
    assert found["patches"] == "64"
    assert len(found["fingerprint"]) == 64


def test_inspect_cells(capsys: Capture, cells_file: Path) -> None:
    code, out, err = run(capsys, "inspect", cells_file)
    assert (code, err) == (0, "")
    found = facts(out)
    assert found["kind"] == "cells"
    assert (found["cells"], found["genes"], found["layers"]) == ("211", str(GENES + 3), "other")
    assert found["obs_columns"] == "kind, depth, barcode"
    assert found["values"].endswith("raw counts")
    assert found["human genes"].startswith(f"{GENES} of {GENES + 3} genes matched")


def test_inspect_cells_that_cannot_be_embedded(capsys: Capture, cells_file: Path) -> None:
    adata = anndata.read_h5ad(cells_file)
    adata.X.data[5] = -1
    adata.var_names = [f"x{n}" for n in range(adata.n_vars)]
    adata.write_h5ad(cells_file)
    code, out, err = run(capsys, "inspect", cells_file)
    assert (code, err) == (0, "")
    assert facts(out)["values"].startswith("cannot be embedded: ")
    assert "none of its 310 genes is in the vocabulary" in facts(out)["human genes"]


def test_inspect_store_and_unfinished_store(
    capsys: Capture,
    cells_file: Path,
    model_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out.zarr"
    command = ("embed", cells_file, "--model", model_directory, "--output", output)
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(EmbeddingWriter, "write", refuse)
        code, out, err = run(capsys, *command)
        assert (code, out) == (130, "")
        assert "interrupted. What is done is kept" in err
    code, out, _ = run(capsys, "inspect", f"{output}.partial")
    assert code == 0
    assert facts(out)["kind"].startswith("unfinished embedding store")
    assert facts(out)["shards done"] == "0"
    assert run(capsys, *command)[0] == 0
    code, out, _ = run(capsys, "inspect", output)
    assert code == 0
    found = facts(out)
    assert found["kind"] == "embedding store"
    assert (found["cells"], found["empty_cells"]) == ("211", "1")
    assert found["obsm/X_cellpatch"] == "211 x 640 float32"
    assert found["pool"] == "flatten"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "cannot compute on the device 'cuda'"), ("nonsense", "cannot compute on the device")],
)
def test_tune_needs_a_gpu(capsys: Capture, device: str, message: str) -> None:
    assert cli.main(["tune", "--device", device]) == 1
    assert message in capsys.readouterr().err


def test_inspect_something_else(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("text")
    for path in (tmp_path / "nothing", tmp_path / "text.h5ad", tmp_path):
        code, out, err = run(capsys, "inspect", path)
        assert (code, out) == (1, "")
        assert err.startswith("cellpatch: ")
        assert str(path) in err


def test_demo(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path offline, one epoch; again over its own files; never over others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "finetuning", lambda: {"epochs": 1, "batch_size": 128})
    monkeypatch.setattr(demo, "PENALTIES", (1.0,))
    monkeypatch.setattr(pl, "umap_of", lambda cells, key, seed: cells.obsm[key][:, :2])  # quick
    for _ in range(2):
        code, out, _ = run(capsys, "demo")
        assert (code, "700 blood cells" in out, "175 test cells" in out) == (0, True, True)
        for name in (demo_results.OURS, demo_results.LINEAR, demo_results.BASELINE):
            assert re.search(rf"^{name} +0\.8", out, re.MULTILINE)
        assert re.search(rf"^{demo_results.NETWORK} +0\.", out, re.MULTILINE)
        assert "cells/s" in out
    assert set(os.listdir("cellpatch-demo")) == demo_results.PARTS
    page = Path("cellpatch-demo/index.html").read_text()
    assert page.count("<img") == 4  # two confusion matrices, UMAP, the course of the training
    assert page.index("Which part delivers it") < page.index("How fast") < page.index("What next")
    assert "http" not in re.sub(r"data:image/\S+", "", page)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "config.json").write_text("precious")
    code, _, err = run(capsys, "demo", "--output", "mine")
    assert code == 1
    assert err == "cellpatch: mine holds other files than a demo's: choose another --output\n"
    assert (tmp_path / "mine" / "model" / "config.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/x"), 1, "is done is kept."),
        (PermissionError(13, "Permission denied", "/x"), 1, "'/x'. Check the path and its perm"),
        (MemoryError("5 GiB"), 1, "not enough memory (5 GiB).\n"),
        (KeyboardInterrupt(), 130, "interrupted. Nothing was written."),
    ],
)
def test_what_the_system_refuses(
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(CellPatch, "save_pretrained", fail)
    found, out, err = run(capsys, "new-model", "--output", tmp_path / "model")
    assert (found, out) == (code, "")
    assert message in err


def test_a_defect_shows_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(CellPatch, "save_pretrained", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["new-model", "--output", str(tmp_path / "model")])


def test_state_of_the_process_is_left_as_it_was(capsys: Capture, make_cells: MakeCells) -> None:
    """`cli.main` may be called from Python: its handlers and filters do not stay."""
    import logging
    import warnings

    logger = logging.getLogger("cellpatch_fast")
    before = list(logger.handlers), logger.level, list(warnings.filters), warnings.showwarning
    run(capsys, "inspect", "nowhere")
    after = list(logger.handlers), logger.level, list(warnings.filters), warnings.showwarning
    assert after == before
