"""Models and checkpoints that cannot be used: what is wrong is said, nothing is made or run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cellpatch_fast import cli

from ..conftest import Refused

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(model_directory: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(model_directory, tmp_path / "model"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocabulary.json"])
def test_incomplete_model_directory(
    refused: Refused, cells_file: Path, model: Path, name: str
) -> None:
    (model / name).unlink()
    message = refused(cells_file, model=model)
    assert f"{model} is not a complete model directory: {name} is missing" in message


def test_model_of_a_newer_version(refused: Refused, cells_file: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"format_version": 2}
    (model / "config.json").write_text(json.dumps(config))
    message = refused(cells_file, model=model)
    assert str(model / "config.json") in message
    assert "install a newer cellpatch-fast" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocabulary.json"])
def test_damaged_model(refused: Refused, cells_file: Path, model: Path, name: str) -> None:
    (model / name).write_bytes((model / name).read_bytes()[:-40])
    assert str(model / name) in refused(cells_file, model=model)


def test_model_that_is_a_file(refused: Refused, cells_file: Path) -> None:
    assert f"{cells_file} is a file, but a model is a directory" in refused(
        cells_file, model=cells_file
    )


class Code:
    """What it would do if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


ARGUMENTS = {
    "max_gene_num": 600,
    "embedding_dim": 32,
    "n_pathway": 64,
    "n_head": 2,
    "encoder_self_attn_depth": 2,
    "encoder_projection_dim": 10,
}


@pytest.fixture
def import_checkpoint(capsys: Capture, tmp_path: Path) -> Callable[[object], str]:
    """``import_checkpoint(content)``: the message with which a file of it is refused."""

    def run(content: object, **arguments: Any) -> str:
        checkpoint = tmp_path / "best.pth"
        if isinstance(content, bytes):
            checkpoint.write_bytes(content)
        elif content is not None:
            torch.save(content, checkpoint)
        (tmp_path / "args.json").write_text(json.dumps(ARGUMENTS | arguments))
        (tmp_path / "gene2tok.json").write_text(json.dumps({f"g{n}": n for n in range(1, 600)}))
        command = ["import-checkpoint", checkpoint, "--args", tmp_path / "args.json"]
        command += ["--vocabulary", tmp_path / "gene2tok.json", "--output", tmp_path / "imported"]
        code = cli.main([str(part) for part in command])
        captured = capsys.readouterr()
        assert (code, captured.out) == (1, "")
        assert captured.err.startswith("cellpatch: ")
        assert not (tmp_path / "imported").exists()
        return captured.err

    return run


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A state dict of the original's."""
    with np.load(Path(__file__).parents[1] / "data" / "original_outputs.npz") as file:
        prefix = "pretrain/state/"
        names = [name for name in file if name.startswith(prefix)]
        return {name.removeprefix(prefix): torch.from_numpy(file[name]) for name in names}


def test_checkpoint_with_missing_and_unexpected_parameters(
    import_checkpoint: Callable[..., str], state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    del state["pathway_token"]
    state["extra.weight"] = torch.zeros(3)
    state["count2vector.bias"] = torch.zeros(31)
    message = import_checkpoint({"model_state_dict": state})
    assert str(tmp_path / "best.pth") in message
    assert "pathway_token: missing" in message
    assert "extra.weight: unexpected" in message
    assert "count2vector.bias: has shape [31], expected [32]" in message


def test_checkpoint_trained_with_other_arguments(
    import_checkpoint: Callable[..., str], state: dict[str, torch.Tensor]
) -> None:
    message = import_checkpoint({"model_state_dict": state}, n_pathway=32)
    assert "pathway_token: has shape [1, 64, 32], expected [1, 32, 32]" in message


def test_pickled_code_does_not_run(
    import_checkpoint: Callable[..., str], state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    trap = tmp_path / "run"
    for content in (
        {"model_state_dict": state, "args": Code(trap)},
        pickle.dumps({"model_state_dict": Code(trap)}),
    ):
        message = import_checkpoint(content)
        assert str(tmp_path / "best.pth") in message
        assert "Pickled code is never run" in message
        assert not trap.exists()
    pickle.loads(pickle.dumps(Code(trap)))
    assert trap.exists()  # it would have


@pytest.mark.parametrize("content", [None, b"", b"text", [1, 2], {"epoch": 3}])
def test_file_that_is_no_checkpoint(
    import_checkpoint: Callable[..., str], tmp_path: Path, content: object
) -> None:
    assert str(tmp_path / "best.pth") in import_checkpoint(content)
