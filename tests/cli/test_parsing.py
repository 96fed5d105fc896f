"""The command line as it is parsed: at once, without what is heavy, and slips are named."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cellpatch_fast import cli

HEAVY = ("torch", "numba", "numpy", "pandas", "anndata", "zarr", "h5py", "scanpy", "tqdm")

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: str) -> tuple[int, str]:
    """Exit code, stderr; nothing is on stdout."""
    try:
        code = cli.main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["embedd"],
        ["embed"],
        ["embed", "cells.h5ad", "--model", "m"],
        ["embed", "cells.h5ad", "--output", "o"],
        ["embed", "--model", "m", "--output", "o"],
        ["embed", "a", "--model", "m", "--output", "o", "--pool", "max"],
        ["embed", "a", "--model", "m", "--output", "o", "--batch-size", "0"],
        ["embed", "a", "--model", "m", "--output", "o", "--batch-size", "many"],
        ["embed", "a", "--model", "m", "--output", "o", "--dtype", "float64"],
        ["embed", "a", "--model", "m", "--output", "o", "--backend", "fast"],
        ["import-checkpoint", "best.pth"],
        ["new-model"],
        ["new-model", "--output", "m", "--seed", "x"],
        ["inspect"],
        ["finetune", "a", "--output", "o", "--label", "l", "--optimizer", "sgd"],
        ["finetune", "a", "--output", "o", "--label", "l", "--epochs", "many"],
    ],
)
def test_wrong_command_line_is_code_2(capsys: Capture, arguments: list[str]) -> None:
    code, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("usage: cellpatch")
    assert "error: " in err


def test_unknown_options_are_named_before_those_that_are_missing(capsys: Capture) -> None:
    """A slip in ``--model`` makes it missing too, which would be all that one is told."""
    code, err = run(capsys, "embed", "a", "--modle", "m", "--ouput=o", "--zzz", "--", "--odd")
    assert code == 2
    assert err.endswith(
        "there is no option --modle (did you mean --model?), no --ouput (did you mean --output?), "
        "no --zzz\n"
    )
    code, err = run(capsys, "inspect", "--", "--nowhere")  # a path
    assert (code, "--nowhere: no such file" in err) == (1, True)


def test_options_can_be_abbreviated(capsys: Capture) -> None:
    code, err = run(capsys, "synthetic-atlas", "a.zip", "--cells", "7", "--mark", "3")
    assert (code, "ambiguous option: --mark could match --markers, --marker-fold" in err) == (
        2,
        True,
    )
    code, err = run(capsys, "synthetic-atlas", "a.zip", "--cells", "7", "--marker-f", "3")
    assert (code, "a.zip" in err) == (1, True)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["embed", "--help"], ["finetune", "--help"], ["embedd"]]
)
def test_help_and_mistakes_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from cellpatch_fast.cli import main
try:
    main({arguments!r})
except SystemExit:
    print(*({HEAVY!r} & sys.modules.keys()), file=sys.stderr)
""".replace(repr(HEAVY), repr(set(HEAVY)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == ""
