"""CellPatchConfig holds the paper's numbers, refuses what makes no model, and survives JSON.

Reading refuses options that make no sense.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from cellpatch_fast import InputError
from cellpatch_fast.config import FORMAT_VERSION, CellPatchConfig, Reading

BINNED = {"value_embedding": "binned"}


def test_defaults_are_the_paper_s() -> None:
    assert dataclasses.asdict(CellPatchConfig()) == {
        "max_genes": 70_000,
        "patches": 64,
        "dim": 32,
        "heads": 2,
        "mlp_dim": 64,
        "self_attention_blocks": 2,
        "projection_dim": 10,
        "value_embedding": "affine",
        "value_bins": 6,
        "attention_dropout": 0.1,
        "padded_length": None,
        "decoder_self_attention_blocks": 1,
        "decoder_dropout": 0.1,
        "head_dropout": 0.1,
        "temperature": 1.0,
        "target_sum": 1e4,
        "value_clip": 5.0,
        "value_rounding": "round",
    }


def test_derived_sizes() -> None:
    config = CellPatchConfig(dim=35, heads=7, projection_dim=11)
    assert (config.head_dim, config.output_dim) == (5, 11)
    assert dataclasses.replace(config, projection_dim=None).output_dim == 35


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CellPatchConfig().dim = 64  # type: ignore[misc]
    assert CellPatchConfig() == CellPatchConfig()
    assert len({CellPatchConfig(), CellPatchConfig(), CellPatchConfig(dim=64)}) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_genes": 0}, "max_genes must be at least 1, found 0"),
        ({"patches": 0}, "patches must be at least 1, found 0"),
        ({"dim": -32}, "dim must be at least 1, found -32"),
        ({"heads": 0}, "heads must be at least 1, found 0"),
        ({"mlp_dim": 0}, "mlp_dim must be at least 1, found 0"),
        ({"value_bins": 0}, "value_bins must be at least 1, found 0"),
        ({"heads": 3}, r"dim \(32\) must be a multiple of heads \(3\)"),
        ({"self_attention_blocks": -1}, "self_attention_blocks must be at least 0, found -1"),
        ({"value_embedding": "table"}, "value_embedding must be affine or binned: 'table'"),
        ({"value_rounding": "floor"}, "value_rounding must be round, truncate or none: 'floor'"),
        ({"target_sum": 0}, "target_sum must be positive and finite: 0"),
        ({"target_sum": -1e4}, "target_sum must be positive and finite: -10000.0"),
        ({"temperature": 0}, "temperature must be positive and finite: 0"),
        ({"temperature": math.inf}, "temperature must be positive and finite: inf"),
        ({"temperature": math.nan}, "temperature must be positive and finite: nan"),
        ({"value_clip": 0}, "value_clip must be positive and finite: 0"),
        ({"value_clip": -5}, "value_clip must be positive and finite: -5"),
        ({"value_clip": 255.5}, "value_clip of at most 255"),
        ({"value_clip": None}, "value_clip of at most 255"),
        ({"value_clip": math.nan}, "value_clip must be positive and finite: nan"),
        ({"value_clip": 256, "value_rounding": "truncate"}, "value_clip of at most 255"),
        ({**BINNED, "value_bins": 5}, r"below value_bins \(5\)"),
        ({**BINNED, "value_clip": 6.0}, r"below value_bins \(6\).*clipped at 6.0"),
        ({**BINNED, "value_rounding": "none"}, "rounded by 'none'"),
        pytest.param({**BINNED, "value_clip": 5.6}, r"below value_bins \(6\)", id="rounds_up"),
        pytest.param({"projection_dim": 0}, "projection_dim"),
        pytest.param({"projection_dim": -3}, "projection_dim"),
        pytest.param({"padded_length": -1}, "padded_length"),
        pytest.param({"attention_dropout": 1.5}, "attention_dropout"),
        pytest.param({"attention_dropout": -0.1}, "attention_dropout"),
        pytest.param({"target_sum": math.nan}, "target_sum"),
        pytest.param({"target_sum": math.inf}, "target_sum"),
        pytest.param({"dim": 32.0}, "dim", id="dim_is_a_float"),
    ],
)
def test_what_makes_no_model_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CellPatchConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"value_clip": 255.0},
        {"value_clip": None, "value_rounding": "none"},
        {"value_clip": 1000.0, "value_rounding": "none"},
        {**BINNED, "value_clip": 5.9, "value_rounding": "truncate"},
        {**BINNED, "value_clip": 255, "value_bins": 256},
        {"self_attention_blocks": 0, "projection_dim": None, "heads": 1},
        {"padded_length": 3000},
    ],
)
def test_the_limits_themselves_are_allowed(fields: dict[str, Any]) -> None:
    config = CellPatchConfig(**fields)
    assert all(getattr(config, name) == value for name, value in fields.items())


# --- on disk -----------------------------------------------------------------------------------


def test_json_and_back() -> None:
    config = CellPatchConfig(
        max_genes=101,
        patches=7,
        dim=33,
        heads=3,
        mlp_dim=13,
        self_attention_blocks=0,
        projection_dim=None,
        value_embedding="binned",
        value_bins=11,
        attention_dropout=0.0,
        padded_length=3000,
        decoder_self_attention_blocks=2,
        decoder_dropout=0.2,
        head_dropout=0.3,
        temperature=1.7,
        target_sum=1e6,
        value_clip=10.0,
        value_rounding="truncate",
    )
    defaults = CellPatchConfig()
    names = [field.name for field in dataclasses.fields(config)]
    assert all(getattr(config, name) != getattr(defaults, name) for name in names)
    fields = json.loads(json.dumps(config.to_dict()))
    assert fields["format_version"] == FORMAT_VERSION
    assert CellPatchConfig.from_dict(fields) == config


def test_reading_leaves_the_fields_alone() -> None:
    fields = CellPatchConfig().to_dict()
    CellPatchConfig.from_dict(fields)
    assert fields == CellPatchConfig().to_dict()


def test_fields_that_are_missing_have_their_defaults() -> None:
    assert CellPatchConfig.from_dict({"format_version": 1, "dim": 64}) == CellPatchConfig(dim=64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "version 2 is not supported.*up to 1.*install"),
        ({"format_version": None}, "version None is not supported"),
        ({}, "version None is not supported"),
        ({"format_version": "1"}, "version '1' is not supported"),
        (
            {"format_version": 1, "width": 3, "depth": 2},
            "configuration fields: depth, width",
        ),
        ({"format_version": 1, "heads": 5}, r"multiple of heads \(5\)"),
        pytest.param({"format_version": 0}, "version 0", id="version_0"),
        pytest.param({"format_version": 1, "dim": "32"}, "dim", id="text_as_number"),
        pytest.param({"format_version": 1, "dim": None}, "dim", id="null_as_number"),
    ],
)
def test_files_that_cannot_be_read(fields: dict[str, Any], message: str) -> None:
    """A newer format says so, whatever else it holds; wrong fields are named."""
    with pytest.raises(ValueError, match=message):
        CellPatchConfig.from_dict(fields)


def test_a_newer_format_with_unknown_fields_says_that_it_is_newer() -> None:
    with pytest.raises(ValueError, match="install a newer cellpatch-fast"):
        CellPatchConfig.from_dict({"format_version": FORMAT_VERSION + 1, "experts": 8})


def test_reading_refuses_options_that_make_no_sense() -> None:
    wrong: dict[str, Any] = {"input": "raw"}
    with pytest.raises(InputError, match="auto, counts or lognorm, found 'raw'"):
        Reading(**wrong)
    with pytest.raises(InputError, match="layer and use_raw exclude each other"):
        Reading(layer="counts", use_raw=True)


def test_reading_tells_which_options_were_given() -> None:
    assert Reading().given() == {}
    assert Reading(use_raw=True, input="counts").given() == {"use_raw": True, "input": "counts"}
    assert Reading(layer="a").record() == {"layer": "a", "use_raw": False, "gene_column": ""}
