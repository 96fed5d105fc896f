"""``cellpatch tokenize`` and what ``cellpatch inspect`` says of its stores."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

from cellpatch_fast import CellPatch, CellPatchConfig, GeneVocabulary, atlas
from cellpatch_fast.config import Preprocessing
from cellpatch_fast.io import TokenStore
from cellpatch_fast.io.stores.partial import partial_of
from cellpatch_fast.io.stores.token_writer import TokenWriter

from ..conftest import GENES, tree
from .test_cli import facts, run

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "m"],
        ["--few-cells"],
        ["--few-cells", "--model", "m", "--output", "o"],
        ["--few-cells", "--value-rounding", "none", "--output", "o"],
        ["--model", "m", "--value-rounding", "truncate", "--output", "o"],
        ["--model", "m", "--output", "o", "--seed", "-1"],
        ["--model", "m", "--output", "o", "--seed", "one"],
        ["--model", "m", "--output", "o", "--values", "logs"],
        ["--model", "m", "--output", "o", "--value-rounding", "up"],
        ["--model", "m", "--output", "o", "--pool", "mean"],
    ],
)
def test_wrong_command_line_is_code_2(capsys: Capture, options: list[str]) -> None:
    code, out, err = run(capsys, "tokenize", "cells.h5ad", *options)
    assert (code, out) == (2, "")
    assert err.startswith("usage: cellpatch")
    assert "error: " in err


def test_store_is_made_once(
    capsys: Capture, cells_file: Path, model_directory: Path, output: Path
) -> None:
    command = ("tokenize", cells_file, "--model", model_directory, "--output", output)
    code, out, err = run(capsys, *command)
    assert code == 0
    assert re.fullmatch(
        rf"{output}: 211 cells, [\d,]+ entries, {GENES} genes matched, 3 .* cells/s\n", out
    )
    assert re.fullmatch(rf"{cells_file}: {GENES} of .* raw counts\n", err)
    code, out, _ = run(capsys, *command)
    assert (code, out) == (0, f"{output} is complete already: 211 cells, nothing to do\n")
    code, _, err = run(capsys, *command, "--shuffle")
    assert code == 1
    assert "shuffle: was '', is now 'with seed 0'" in err
    assert run(capsys, *command, "--shuffle", "--overwrite")[0] == 0


def test_every_option_arrives(
    capsys: Capture, cells_file: Path, model_directory: Path, output: Path
) -> None:
    adata = anndata.read_h5ad(cells_file)
    adata.var["names"] = adata.var_names
    adata.var_names = [f"x{n}" for n in range(adata.n_vars)]
    adata.raw = adata
    adata.write_h5ad(cells_file)
    vocabulary = model_directory / "vocabulary.json"
    common = ("--output", output, "--gene-column", "names", "--values", "counts")
    code, _, err = run(
        *(capsys, "tokenize", cells_file, *common, "--vocabulary", vocabulary),
        *("--layer", "other", "--value-rounding", "none", "--shuffle", "--seed", 7),
    )
    assert code == 0
    assert "names" in err
    with TokenStore(output) as store:
        assert store.preprocessing == Preprocessing(value_rounding="none")
        assert store.values.dtype == np.float16
        assert store.vocabulary_fingerprint == GeneVocabulary.load(vocabulary).fingerprint
        assert store.shuffled == 7
        found = store.describe()
    wanted = {"layer": "other", "use_raw": False, "gene_column": "names"}
    assert {name: found[name] for name in wanted} == wanted
    again = ("tokenize", cells_file, *common, "--vocabulary", "human", "--use-raw", "--overwrite")
    assert run(capsys, *again)[0] == 0
    with TokenStore(output) as store:
        assert store.describe()["use_raw"]
        assert store.preprocessing == Preprocessing.from_config(CellPatchConfig())


def test_model_has_its_own_vocabulary(
    capsys: Capture, cells_file: Path, model_directory: Path, output: Path
) -> None:
    code, _, err = run(
        *(capsys, "tokenize", cells_file, "--model", model_directory),
        *("--output", output, "--vocabulary", "human"),
    )
    assert code == 1
    assert "give no vocabulary beside it (--model, --vocabulary)" in err


@pytest.mark.parametrize(
    ("options", "config"),
    [
        pytest.param([], CellPatchConfig(), id="paper"),
        pytest.param(["--few-cells"], CellPatchConfig.for_few_cells(), id="few_cells"),
    ],
)
def test_without_a_model_tokens_are_for_a_new_one_of_human_genes(
    capsys: Capture, cells_file: Path, output: Path, options: list[str], config: CellPatchConfig
) -> None:
    assert run(capsys, "tokenize", cells_file, "--output", output, *options)[0] == 0
    with TokenStore(output) as store:
        assert store.preprocessing == Preprocessing.from_config(config)
        assert store.vocabulary_fingerprint == GeneVocabulary.human().fingerprint


def test_tokens_for_few_cells_are_those_of_a_new_model_for_few_cells(
    capsys: Capture, cells_file: Path, output: Path, tmp_path: Path
) -> None:
    assert run(capsys, "new-model", "--output", tmp_path / "model", "--few-cells")[0] == 0
    model = CellPatch.from_pretrained(tmp_path / "model")
    assert model.config == CellPatchConfig.for_few_cells()
    command = ("tokenize", cells_file, "--output", output)
    assert run(capsys, *command, "--model", tmp_path / "model")[0] == 0
    code, out, _ = run(capsys, *command, "--few-cells")
    assert (code, out) == (0, f"{output} is complete already: 211 cells, nothing to do\n")


def test_a_new_model_for_few_cells_is_pretrained_on_tokens_for_few_cells(
    capsys: Capture, cells_file: Path, model_directory: Path, output: Path, tmp_path: Path
) -> None:
    """And on others, whose values it then takes; if it is to have values for few cells, on no
    others, and the refusal names the option that makes them."""
    vocabulary = ("--vocabulary", model_directory / "vocabulary.json")
    small = {"patches": 3, "dim": 6}
    (tmp_path / "any.json").write_text(json.dumps({"model": small}))
    unrounded = small | {"value_rounding": "none", "value_clip": None}
    (tmp_path / "config.json").write_text(json.dumps({"model": unrounded}))
    command = ("pretrain", output, *vocabulary, "--few-cells", "--epochs", 1)
    pretrain = (*command, "--config", tmp_path / "config.json", "--output", tmp_path / "run")
    tokenize = ("tokenize", cells_file, "--output", output, *vocabulary)
    assert run(capsys, *tokenize)[0] == 0
    other = (*command, "--config", tmp_path / "any.json", "--output", tmp_path / "other")
    code, _, err = run(capsys, *other)
    assert code == 0, err
    code, _, err = run(capsys, *pretrain)
    assert code == 1
    assert "cellpatch tokenize --few-cells" in err
    assert run(capsys, *tokenize, "--few-cells", "--overwrite")[0] == 0
    code, _, err = run(capsys, *pretrain)
    assert code == 0, err
    assert "epoch 1 of 1: training loss" in err


def test_interruption_is_said_and_inspected(
    capsys: Capture,
    cells_file: Path,
    model_directory: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("tokenize", cells_file, "--model", model_directory, "--output", output)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "append", interrupt)
        code, out, err = run(capsys, *command)
    assert (code, out) == (130, "")
    assert "interrupted. What is done is kept: the same command goes on from there." in err
    for path in (output, partial_of(output)):
        code, out, _ = run(capsys, "inspect", path)
        assert code == 0
        found = facts(out)
        assert found["kind"].startswith("unfinished token store (the command that began it")
        assert (found["shards done"], found["value_rounding"]) == ("0", "round")
    code, _, err = run(capsys, "embed", output, "--model", model_directory, "--output", "x.zarr")
    assert code == 1
    assert run(capsys, *command)[0] == 0
    code, out, err = run(capsys, "inspect", output)
    assert (code, err) == (0, "")
    found = facts(out)
    assert found["kind"] == "token store"
    assert (found["cells"], found["empty_cells"]) == ("211", "1")
    assert (found["genes"], found["values"]) == ("uint16", "uint8")
    assert found["obs_columns"] == "kind, depth, barcode"


# Warms up (compiled code is kept in files too), then runs each command with little room, and again.
RUN_WITH_LITTLE_ROOM = """
import json, resource, sys
from cellpatch_fast import cli
warm, size, *commands = json.loads(sys.argv[1])
for command in warm:
    assert cli.main(command) == 0
for command in commands:
    for limit in (size, -1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        print("code", cli.main(command), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs rlimits")
def test_full_disk_is_reported_and_the_run_resumes(
    cells_file: Path, model_directory: Path, small_vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    """No file may grow beyond 6,000 bytes: no shard fits, no bucket of a shuffled store."""

    def command(name: str, *options: str) -> list[str]:
        names = (str(cells_file), "--model", str(model_directory), "--output", str(tmp_path / name))
        return ["tokenize", *names, *options]

    warm = [command("warm.zarr"), command("warm-shuffled.zarr", "--shuffle")]
    limited = [command("plain.zarr"), command("shuffled.zarr", "--shuffle")]
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITH_LITTLE_ROOM, json.dumps([warm, 6_000, *limited])],
        capture_output=True,
        text=True,
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 1", "code 0"] * 2, done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("cellpatch: ")]
    assert len(messages) == 2
    for message in messages:
        assert "File too large" in message
        assert message.endswith("free some space, then repeat the command; what is done is kept.")
    assert "Traceback" not in done.stderr
    for name in ("plain", "shuffled"):
        atlas.tokenize(
            cells_file,
            tmp_path / "expected.zarr",
            vocabulary=small_vocabulary,
            shuffle=name == "shuffled",
        )
        assert tree(tmp_path / f"{name}.zarr") == tree(tmp_path / "expected.zarr")
        shutil.rmtree(tmp_path / "expected.zarr")
