"""``cellpatch spatial`` and ``cellpatch synthetic-tissue``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

import cellpatch_fast as cp
from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary, cli
from cellpatch_fast.datasets import synthetic_tissue
from cellpatch_fast.spatial.fitting import Fit

Capture = pytest.CaptureFixture[str]

QUICK = ("--epochs", "3", "--variable-genes", "23")


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def file(capsys: Capture, tmp_path: Path) -> Path:
    path = tmp_path / "tissue.h5ad"
    options = ("--spots", "110", "--layers", "3", "--genes", "41", "--seed", "1")
    code, out, err = run(capsys, "synthetic-tissue", path, *options)
    assert (code, err) == (0, "")
    assert out == f"{path}: 110 spots x 41 genes\n"
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of the tissue's genes."""
    var = synthetic_tissue(4, genes=41).var
    vocabulary = GeneVocabulary(list(var.index), list(var["feature_name"]))
    config = CellPatchConfig(max_genes=vocabulary.size, patches=3, dim=14, heads=2, mlp_dim=11)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        CellPatch(config, vocabulary).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_generated_tissue_is_the_one_of_its_seed(file: Path) -> None:
    expected = synthetic_tissue(110, layers=3, genes=41, seed=1)
    written = anndata.read_h5ad(file)
    assert (written.X != expected.X).nnz == 0
    assert list(written.obs["layer"]) == list(expected.obs["layer"])


def test_the_command_does_what_python_does(
    capsys: Capture, file: Path, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    code, out, err = run(
        capsys, "spatial", file, "--model", model, "--domains", 3, "--truth", "layer",
        "--output", output, "--seed", 7, *QUICK,
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith(f"{output}: 110 spots in 3 domains, random starts agree to ")
    assert "ARI with the annotation" in out
    assert "neighbours each within" in err  # the radius that was chosen is said
    assert "0 isolated" in err
    tissue = anndata.read_h5ad(file)
    cp.tl.spatial_embed(tissue, model, epochs=3, variable_genes=23, seed=7)
    cp.tl.spatial_domains(tissue, n=3, seed=7)
    spots = anndata.read_h5ad(output / "spatial.h5ad")
    assert np.array_equal(spots.obsm["X_stagate"], tissue.obsm["X_stagate"])
    assert (spots.obs["domain"] == tissue.obs["domain"]).all()


def test_every_option_arrives(capsys: Capture, file: Path, model: Path, tmp_path: Path) -> None:
    tissue = anndata.read_h5ad(file)
    tissue.layers["counts"], tissue.X = tissue.X, tissue.X * 0
    tissue.obs["slice"] = np.where(np.arange(110) < 50, "a", "b")
    tissue.obsm["places"] = tissue.obsm.pop("spatial")
    tissue.write_h5ad(tmp_path / "other.h5ad")
    code, _, err = run(
        capsys, "spatial", tmp_path / "other.h5ad", "--model", model, "--output", tmp_path / "out",
        "--method", "leiden", "--refined", "--graph", "grid", "--batch-key", "slice",
        "--basis", "places", "--preset", "paper", "--tile-spots", 37, "--layer", "counts",
        "--backend", "numba", "--device", "cpu", *QUICK,
    )  # fmt: skip
    assert code == 0, err
    assert "in 2 slices" in err
    facts = json.loads((tmp_path / "out" / "run" / "training.json").read_text())["settings"]
    assert facts["features"] == "trained"
    assert facts["epochs"] == 3
    assert facts["variable_genes"] == 23
    assert facts["layer"] == "counts"
    assert facts["graph"]["kind"] == "grid"
    assert facts["tiles"] > 2
    spots = anndata.read_h5ad(tmp_path / "out" / "spatial.h5ad")
    assert spots.uns["domain"]["params"]["method"] == "leiden"
    assert spots.uns["domain"]["params"]["refined"]


def test_an_interrupted_command_says_that_it_goes_on(
    capsys: Capture, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellpatch_fast.spatial.fitting.CHECKPOINT_SECONDS", -1)
    command = ("spatial", file, "--domains", 3, *QUICK, "--output")
    step, steps = Fit.step, []

    def interrupted(self: Fit, pieces: Any) -> float:
        steps.append(len(self.losses))
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, pieces)

    monkeypatch.setattr(Fit, "step", interrupted)
    code, _, err = run(capsys, *command, tmp_path / "part")
    assert code == 130
    assert err.endswith("interrupted. What is done is kept: the same command goes on from there.\n")
    assert run(capsys, *command, tmp_path / "part")[0] == 0
    assert steps == [0, 1, 2, 2]  # from the epoch that was interrupted
    assert run(capsys, *command, tmp_path / "whole")[0] == 0
    for name in ("domains.csv", "starts.csv", "paga.png"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--domains", "0"), 2, "must be at least 1, found 0"),
        (
            ("--domain", "3", "--presets", "paper"),
            2,
            r"no option --presets \(did you mean --preset",
        ),
        (("--preset", "best"), 2, "invalid choice: 'best'"),
        (("--domains", "111"), 1, "1 to 110 domains, one per spot; found n=111"),
        (("--truth", "cortex"), 1, "obs has no column 'cortex'"),
        (("--preset", "paper"), 1, "but there is no model"),
        (("--radius", "3"), 1, "no two spots are within a radius of 3: the nearest two are 100"),
        (("--radius", "nan"), 1, "radius must be positive and finite, found nan"),
        (("--graph", "grid", "--radius", "3"), 1, "takes no radius"),
        (("--seed", "-1"), 1, "seed must be not negative, found -1"),
        (("--layer", "counts"), 1, "counts"),
        (("--device", "tpu"), 1, "tpu"),
        (("--tile-spots", "3"), 1, "room for 16 spots or more, found 3"),
    ],
)
def test_wrong_commands_end_with_one_message(
    capsys: Capture, file: Path, tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    ended, out, err = run(capsys, "spatial", file, "--output", tmp_path / "out", *options)
    assert (ended, out) == (code, "")
    *_, last = err.splitlines()
    import re

    assert re.search(message, last)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tissue.zarr",), "choose the name of a new .h5ad file"),
        (("tissue.h5ad", "--seed", "-1"), "seed must be at least 0, found -1"),
        (("nowhere/tissue.h5ad",), "No such file or directory"),
    ],
)
def test_tissues_that_cannot_be_written_are_told(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "synthetic-tissue", *arguments, "--spots", 53, "--genes", 7)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_tissue_is_not_written_over(capsys: Capture, file: Path) -> None:
    before = file.read_bytes()
    code, _, err = run(capsys, "synthetic-tissue", file)
    assert code == 1
    assert "choose the name of a new .h5ad file" in err
    assert file.read_bytes() == before
