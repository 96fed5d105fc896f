"""Checkpoints of the original: read whole, checked whole, and never run."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cellpatch_fast.cells import RaggedCells
from cellpatch_fast.errors import InputError
from cellpatch_fast.genes import GeneVocabulary
from cellpatch_fast.model import CellPatch, CellPatchAnnotator, MaskedGeneModel, fingerprint

from .conftest import Original

Files = Callable[[Any], dict[str, Any]]


@pytest.mark.parametrize("form", ["wrapped", "bare", "data_parallel"])
def test_forms_of_a_checkpoint(pretrain: Any, files: Files, form: str) -> None:
    paths = files(pretrain)
    expected = fingerprint(CellPatch.from_original(**paths))
    state = pretrain.state
    if form == "data_parallel":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    content = state if form == "bare" else {"model_state_dict": state, "epoch": 50}
    torch.save(content, paths["checkpoint"])
    assert fingerprint(CellPatch.from_original(**paths)) == expected


def test_arguments_and_vocabulary_as_objects(
    pretrain: Any, files: Files, vocabulary: GeneVocabulary
) -> None:
    paths = files(pretrain)
    expected = CellPatch.from_original(**paths)
    paths.update(args=pretrain.args, vocabulary=vocabulary)
    assert fingerprint(CellPatch.from_original(**paths)) == fingerprint(expected)


def test_decoders_predict_as_the_original_does(pretrain: Any, files: Files, tmp_path: Path) -> None:
    """Each cell without padding; also when the model was saved and loaded."""
    MaskedGeneModel.from_original(**files(pretrain)).save_pretrained(tmp_path / "model")
    model = MaskedGeneModel.from_pretrained(tmp_path / "model")
    genes, lengths = pretrain.arrays["prompt_genes"], pretrain.arrays["prompt_lengths"]
    keep = torch.arange(genes.shape[1]) < lengths[:, None]
    prompts = RaggedCells.from_padded(genes, torch.zeros(genes.shape), keep)
    expected = torch.cat([alone.flatten() for alone in pretrain.alone("prediction")])
    with torch.inference_mode():
        found = model.predict(pretrain.cells(), prompts)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_annotation_heads_classify_as_the_original_does(
    arrays: dict[str, torch.Tensor], files: Files, tmp_path: Path
) -> None:
    original = Original("annotate_projected", arrays)
    classes = [f"type {i}" for i in range(11)]
    made = CellPatchAnnotator.from_original(**files(original), classes=classes)
    made.save_pretrained(tmp_path / "model")
    model = CellPatchAnnotator.from_pretrained(tmp_path / "model")
    expected = torch.stack([alone.flatten() for alone in original.alone("logits")])
    with torch.inference_mode():
        found = model.logits(original.cells())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(InputError, match=r"lp_fc3\.bias: has shape \[11\], expected \[3\]"):
        CellPatchAnnotator.from_original(**files(original), classes=classes[:3])


def test_configuration(original: Any, files: Files) -> None:
    model = CellPatch.from_original(**files(original), value_rounding="none", padded_length=3000)
    config = model.config
    assert (config.max_genes, config.patches, config.dim, config.heads) == (600, 64, 32, 2)
    assert (config.mlp_dim, config.self_attention_blocks) == (64, 2)
    assert config.projection_dim == original.projection
    assert (config.value_rounding, config.padded_length) == ("none", 3000)
    assert CellPatch.from_original(**files(original)).config.value_rounding == "truncate"
    assert not model.training


def test_imported_models_are_saved_and_loaded(original: Any, files: Files, tmp_path: Path) -> None:
    model = CellPatch.from_original(**files(original))
    model.save_pretrained(tmp_path / "model")
    loaded = CellPatch.from_pretrained(tmp_path / "model")
    assert fingerprint(loaded) == fingerprint(model)
    cells = original.cells()
    with torch.inference_mode():
        assert torch.equal(loaded.encode(cells), model.encode(cells))


def test_what_is_left_out_is_reported(
    pretrain: Any, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cellpatch_fast"):
        CellPatch.from_original(**files(pretrain))
    (record,) = caplog.records
    message = record.getMessage()
    assert "best.pth: loaded the 42 tensors of the CellPatch" in message
    assert "28 of the decoder" in message
    assert "2 of the value norm" in message
    assert len(pretrain.state) == 42 + 28 + 2


def test_every_tensor_that_does_not_fit_is_listed(pretrain: Any, files: Files) -> None:
    paths, state = files(pretrain), dict(pretrain.state)
    del state["pathway_token"], state["self_extract_blocks_attn.1.out_proj.bias"]
    state["gene2vector.weight"] = torch.zeros(599, 32)
    state["self_extract_blocks_mlp.2.0.weight"] = torch.zeros(64, 32)
    torch.save(state, paths["checkpoint"])
    with pytest.raises(InputError) as caught:
        CellPatch.from_original(**paths)
    first, *problems = str(caught.value).splitlines()
    assert first.startswith(f"{paths['checkpoint']} does not hold the model that args describe")
    assert sorted(problems) == [
        "  gene2vector.weight: has shape [599, 32], expected [600, 32]",
        "  pathway_token: missing",
        "  self_extract_blocks_attn.1.out_proj.bias: missing",
        "  self_extract_blocks_mlp.2.0.weight: unexpected",
    ]


def test_projection_that_args_do_not_tell_of_is_unexpected(pretrain: Any, files: Files) -> None:
    paths = files(pretrain) | {"args": {**pretrain.args, "encoder_projection_dim": None}}
    with pytest.raises(InputError, match=r"encoder_projection\.weight: unexpected"):
        CellPatch.from_original(**paths)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"encoder_cross_attn_depth": 2}, "encoder_cross_attn_depth is 2", id="depth"),
        pytest.param({"log_transform": False}, "log_transform is false", id="not_logged"),
        pytest.param({"n_head": 5}, "must be a multiple of heads", id="impossible"),
        pytest.param({"n_pathway": "64"}, "patches must be an integer", id="wrong_type"),
        pytest.param({"max_gene_num": 599}, "tokens up to 599", id="vocabulary_too_large"),
    ],
)
def test_arguments_that_cannot_be_used(
    pretrain: Any, files: Files, fields: dict[str, Any], message: str
) -> None:
    paths = files(pretrain)
    paths["args"].write_text(json.dumps({**pretrain.args, **fields}))
    with pytest.raises(InputError, match=message):
        CellPatch.from_original(**paths)


def test_missing_arguments_are_listed(pretrain: Any, files: Files) -> None:
    paths = files(pretrain)
    paths["args"].write_text('{"n_head": 2, "n_pathway": 64, "encoder_self_attn_depth": 2}')
    with pytest.raises(InputError, match=r"args\.json lacks .* max_gene_num, embedding_dim"):
        CellPatch.from_original(**paths)


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_arguments_that_are_no_json_object(
    pretrain: Any, files: Files, content: str | None
) -> None:
    paths = files(pretrain)
    paths["args"].unlink()
    if content is not None:
        paths["args"].write_text(content)
    with pytest.raises(InputError, match=r"args\.json"):
        CellPatch.from_original(**paths)


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_pickled_code_is_not_run(pretrain: Any, files: Files, tmp_path: Path) -> None:
    paths, trace = files(pretrain), tmp_path / "trace"
    torch.save({"model_state_dict": pretrain.state, "x": Malicious(trace)}, paths["checkpoint"])
    torch.load(paths["checkpoint"], weights_only=False)  # the attack works on those who run it
    trace.rmdir()
    with pytest.raises(InputError, match=r"best\.pth .* refers to posix\.mkdir.* never run") as e:
        CellPatch.from_original(**paths)
    assert not trace.exists()
    assert "weights_only" not in str(e.value)  # no advice to run it after all


def test_other_python_objects_are_refused(pretrain: Any, files: Files) -> None:
    paths = files(pretrain)
    content = {"model_state_dict": pretrain.state, "args": argparse.Namespace(n_head=2)}
    torch.save(content, paths["checkpoint"])
    with pytest.raises(InputError, match=r"refers to argparse\.Namespace"):
        CellPatch.from_original(**paths)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param([1, 2], "holds a list instead of a state dict", id="list"),
        pytest.param({}, "instead of a state dict", id="empty"),
        pytest.param({"epoch": 5}, "besides tensors it holds: epoch", id="no_tensors"),
        pytest.param({3: torch.zeros(2)}, "besides tensors it holds: 3", id="no_names"),
    ],
)
def test_checkpoints_without_a_state_dict(
    pretrain: Any, files: Files, content: Any, message: str
) -> None:
    paths = files(pretrain)
    torch.save(content, paths["checkpoint"])
    with pytest.raises(InputError, match=message):
        CellPatch.from_original(**paths)


@pytest.mark.parametrize("keep", [0, 9, 1000, -100])
def test_truncated_checkpoint(pretrain: Any, files: Files, keep: int) -> None:
    paths = files(pretrain)
    content = paths["checkpoint"].read_bytes()
    paths["checkpoint"].write_bytes(content[:keep])
    with pytest.raises(InputError, match=r"best\.pth"):
        CellPatch.from_original(**paths)


def test_missing_checkpoint(pretrain: Any, files: Files, tmp_path: Path) -> None:
    paths = files(pretrain) | {"checkpoint": tmp_path / "nowhere.pth"}
    with pytest.raises(InputError, match=r"there is no checkpoint .*nowhere\.pth"):
        CellPatch.from_original(**paths)


def test_random_bytes(pretrain: Any, files: Files) -> None:
    paths = files(pretrain)
    paths["checkpoint"].write_bytes(bytes(range(256)) * 9)
    with pytest.raises(InputError, match=r"best\.pth"):
        CellPatch.from_original(**paths)
