"""A model directory: comes back bit for bit, is never half-written, is refused where damaged."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cellpatch_fast.cells import RaggedCells
from cellpatch_fast.config import CellPatchConfig
from cellpatch_fast.errors import InputError
from cellpatch_fast.genes import GeneVocabulary
from cellpatch_fast.model import CellPatch, fingerprint
from cellpatch_fast.model.storage import FILES

from ..examples import examples

SMALL = CellPatchConfig(max_genes=601, patches=7, dim=22, heads=2, mlp_dim=13, projection_dim=5)


@pytest.fixture
def model(vocabulary: GeneVocabulary) -> CellPatch:
    return CellPatch(SMALL, vocabulary)


@pytest.fixture
def directory(model: CellPatch, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_same(found: CellPatch, expected: CellPatch) -> None:
    """Equal bit for bit, dtypes included."""
    assert found.config == expected.config
    assert found.vocabulary == expected.vocabulary
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(found.state_dict()[name], tensor)
    assert fingerprint(found) == fingerprint(expected)


# --- saved and loaded --------------------------------------------------------------------------


def test_round_trip(model: CellPatch, directory: Path) -> None:
    loaded = CellPatch.from_pretrained(directory)
    assert_same(loaded, model)
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    cells = RaggedCells(torch.tensor([0, 3]), torch.tensor([7, 5, 3]), torch.rand(3))
    assert torch.equal(loaded.encode(cells), model.eval().encode(cells))


@examples(15)
@given(
    choices=st.fixed_dictionaries(
        {
            "patches": st.sampled_from([1, 5, 11]),
            "heads": st.sampled_from([1, 3]),
            "self_attention_blocks": st.integers(0, 3),
            "projection_dim": st.sampled_from([None, 7]),
            "value_embedding": st.sampled_from(["affine", "binned"]),
            "padded_length": st.sampled_from([None, 13]),
            "value_rounding": st.sampled_from(["round", "truncate"]),
        }
    ),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_round_trip_of_any_configuration(
    tmp_path_factory: pytest.TempPathFactory,
    vocabulary: GeneVocabulary,
    choices: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    directory = tmp_path_factory.mktemp("model")
    model = CellPatch(CellPatchConfig(max_genes=601, dim=21, mlp_dim=17, **choices), vocabulary)
    model.to(dtype).save_pretrained(directory)
    assert_same(CellPatch.from_pretrained(directory), model)


def test_the_directory_holds_exactly_its_files(directory: Path, tmp_path: Path) -> None:
    assert {path.name for path in directory.iterdir()} == set(FILES)
    assert list(tmp_path.iterdir()) == [directory]  # nothing is left beside it
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in directory.iterdir()} == {plain.stat().st_mode}


def test_saving_replaces_a_model_and_leaves_other_files(
    directory: Path, vocabulary: GeneVocabulary
) -> None:
    (directory / "README.md").write_text("mine")
    other = CellPatch(CellPatchConfig(max_genes=607), vocabulary)
    other.save_pretrained(str(directory))
    assert_same(CellPatch.from_pretrained(str(directory)), other)
    assert (directory / "README.md").read_text() == "mine"


def test_loading_draws_no_random_numbers(directory: Path) -> None:
    before = torch.get_rng_state()
    CellPatch.from_pretrained(directory)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_does_not_import_the_compiler(directory: Path) -> None:
    """It would cost each new process two seconds."""
    code = """if True:
        import sys, cellpatch_fast
        cellpatch_fast.CellPatch.from_pretrained(sys.argv[1])
        print("cellpatch_fast.model.storage" in sys.modules, "torch._dynamo" in sys.modules)
    """
    command = [sys.executable, "-c", code, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_weights_loaded_in_inference_mode_are_ordinary(directory: Path) -> None:
    with torch.inference_mode():
        loaded = CellPatch.from_pretrained(directory)
    assert not any(parameter.is_inference() for parameter in loaded.parameters())


def test_a_loaded_model_does_not_depend_on_its_file(model: CellPatch, directory: Path) -> None:
    loaded = CellPatch.from_pretrained(directory)
    (directory / "model.safetensors").write_bytes(b"")
    assert_same(loaded, model)
    with torch.no_grad():
        loaded.patches.zero_()  # and may be written to


def test_hub_mixin_finds_a_downloaded_model(
    model: CellPatch, directory: Path, tmp_path: Path
) -> None:
    """The Hub's cache, as a download leaves it; no network."""
    assert isinstance(model, PyTorchModelHubMixin)
    repository, revision = tmp_path / "cache/models--owner--cells", "0" * 40
    shutil.copytree(directory, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    loaded = CellPatch.from_pretrained(
        "owner/cells", cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert_same(loaded, model)


def test_fingerprint_sees_every_part(model: CellPatch, directory: Path) -> None:
    fingerprints = {fingerprint(model)}
    model.vocabulary = model.vocabulary.add(["another gene"])
    fingerprints.add(fingerprint(model))
    object.__setattr__(model, "config", CellPatchConfig(**{**vars(SMALL), "target_sum": 9e3}))
    fingerprints.add(fingerprint(model))
    for parameter in model.parameters():
        with torch.no_grad():  # one bit of one number
            flat = parameter.view(-1)
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
        fingerprints.add(fingerprint(model))
    assert len(fingerprints) == 3 + len(list(model.parameters()))
    assert fingerprint(CellPatch.from_pretrained(directory)) in fingerprints


# --- never half-written ------------------------------------------------------------------------


def test_full_disk_leaves_the_old_model(
    model: CellPatch, directory: Path, tmp_path: Path, vocabulary: GeneVocabulary
) -> None:
    larger = CellPatch(CellPatchConfig(max_genes=70_001), vocabulary)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # bytes a file may have
    try:
        for target in (directory, tmp_path / "new"):
            with pytest.raises(OSError, match="File too large"):
                larger.save_pretrained(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(CellPatch.from_pretrained(directory), model)
    assert list(tmp_path.iterdir()) == [directory]


def test_a_save_that_stops_while_moving_files_is_refused(
    directory: Path, vocabulary: GeneVocabulary
) -> None:
    (directory / "vocabulary.json").unlink()
    (directory / "vocabulary.json").mkdir()  # a file cannot be moved here
    with pytest.raises(OSError, match=r"vocabulary\.json"):
        CellPatch(SMALL, vocabulary).save_pretrained(directory)
    (directory / "vocabulary.json").rmdir()
    vocabulary.save(directory / "vocabulary.json")
    with pytest.raises(InputError, match=r"config\.json is missing"):
        CellPatch.from_pretrained(directory)


def test_saving_to_a_file_is_refused(model: CellPatch, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("precious")
    with pytest.raises(InputError, match="is a file: choose a directory"):
        model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "precious"


# --- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_incomplete_directory(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(InputError, match=rf"{directory} .* complete .*: {name} is missing"):
        CellPatch.from_pretrained(directory)


def test_paths_that_are_no_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"there is no model directory {tmp_path}/nowhere"):
        CellPatch.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "best.pth").touch()
    with pytest.raises(InputError, match=r"best\.pth is a file.*CellPatch\.from_original"):
        CellPatch.from_pretrained(tmp_path / "best.pth")
    with pytest.raises(InputError, match=r"no model directory owner/cells.*Hugging Face Hub"):
        CellPatch.from_pretrained("owner/cells", cache_dir=tmp_path, local_files_only=True)


def edit_config(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"format_version": 2}, "version 2 is not supported.*newer", id="newer"),
        pytest.param({"format_version": None}, "version None", id="no_version"),
        pytest.param({"depth": 3}, "unknown configuration fields: depth", id="unknown_field"),
        pytest.param({"dim": "32"}, "dim must be an integer", id="wrong_type"),
        pytest.param({"heads": 5}, "must be a multiple of heads", id="impossible"),
    ],
)
def test_config_that_cannot_be_used(directory: Path, fields: Any, message: str) -> None:
    edit_config(directory, **fields)
    with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
        CellPatch.from_pretrained(directory)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_config_that_is_no_json_object(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        CellPatch.from_pretrained(directory)


def test_vocabulary_larger_than_the_model(directory: Path) -> None:
    vocabulary = GeneVocabulary.load(directory / "vocabulary.json")
    vocabulary.add(["one", "two"]).save(directory / "vocabulary.json")
    with pytest.raises(InputError, match=rf"{directory}: .*tokens up to 601.*601 rows"):
        CellPatch.from_pretrained(directory)


def test_every_tensor_that_does_not_fit_is_listed(directory: Path) -> None:
    path = directory / "model.safetensors"
    state = load_file(path)
    del state["patches"], state["self_blocks.1.mlp.0.bias"]
    state["cross_block.mlp.0.weight"] = torch.zeros(14, 22)
    state["projection.bias"] = torch.zeros(5, dtype=torch.int8)
    state["value_embedding.bias"] = torch.full((22,), torch.nan)
    state["classifier.weight"] = torch.zeros(3)
    save_file(state, path)
    with pytest.raises(InputError) as caught:
        CellPatch.from_pretrained(directory)
    first, *problems = str(caught.value).splitlines()
    assert first.startswith(f"{path} does not hold the tensors")
    assert sorted(problems) == [
        "  classifier.weight: unexpected",
        "  cross_block.mlp.0.weight: has shape [14, 22], expected [13, 22]",
        "  patches: missing",
        "  projection.bias: has dtype torch.int8, expected floating point",
        "  self_blocks.1.mlp.0.bias: missing",
        "  value_embedding.bias: holds NaN or infinite values",
    ]


def test_mixed_dtypes(directory: Path) -> None:
    path = directory / "model.safetensors"
    state = load_file(path)
    save_file({**state, "patches": state["patches"].half()}, path)
    with pytest.raises(InputError, match="expected one dtype, found float16, float32"):
        CellPatch.from_pretrained(directory)


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_truncated_weights(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"{path} is damaged"):
        CellPatch.from_pretrained(directory)
