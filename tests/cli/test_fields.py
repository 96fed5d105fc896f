"""Options are the fields of the classes that hold them: name, type, choices, help and defaults."""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from cellpatch_fast import cli
from cellpatch_fast.cli.fields import add_fields, documented, given_fields
from cellpatch_fast.config import Reading
from cellpatch_fast.synthetic.settings import AtlasSettings
from cellpatch_fast.training import FinetuningSettings, PretrainingSettings

Kind = type[PretrainingSettings] | type[FinetuningSettings]
KINDS: dict[str, Kind] = {"pretrain": PretrainingSettings, "finetune": FinetuningSettings}


@dataclass(frozen=True)
class Base:
    """What a class has from its base.

    Parameters
    ----------
    rate
        How fast, in 100 % of `nothing`. More is faster.
    inner
        How deep; None for all the way.
    """

    rate: float = 2.5e-4
    inner: int | None = None


@dataclass(frozen=True)
class Example(Base):
    """What it has by itself.

    Parameters
    ----------
    inner
        Number of turns, over
        two lines; None for as many as
        there are.
    flag
        Whether it turns.
    colour
        Of it.

    Raises
    ------
    Nothing
        Ever.
    """

    flag: bool = True
    colour: Literal["red", "blue"] = "blue"


def parser_of(kind: type[Any], few_cells: object = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="x", formatter_class=Wide)
    add_fields(parser, kind, few_cells)
    return parser


class Wide(argparse.HelpFormatter):
    """Each option on one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=60, width=1_000)


def test_help_is_the_first_sentence_about_a_field_and_its_default() -> None:
    text = parser_of(Example, Example(rate=0.5, flag=False)).format_help()
    lines = [re.sub("  +", " | ", line.strip()) for line in text.splitlines()[4:]]
    assert lines == [
        "--rate X | how fast, in 100 % of nothing (default: 0.00025; few cells: 0.5)",
        "--inner N | number of turns, over two lines (default: as many as there are)",
        "--flag, --no-flag | whether it turns (default: yes; few cells: no)",
        "--colour {red,blue} | of it (default: blue)",
    ]


def test_what_is_given_has_the_type_of_its_field_and_the_rest_is_left_out() -> None:
    parser = parser_of(Example)
    assert given_fields(parser.parse_args([]), Example) == {}
    parsed = parser.parse_args(["--no-flag", "--inner", "7", "--rate", "1e-3", "--colour", "red"])
    given = given_fields(parsed, Example)
    assert given == {"flag": False, "inner": 7, "rate": 1e-3, "colour": "red"}
    assert Example(**given) == Example(1e-3, 7, False, "red")


@pytest.mark.parametrize("kind", [*KINDS.values(), Reading, AtlasSettings])
def test_every_field_is_explained_and_its_default_can_be_given(kind: type[Any]) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    assert documented(kind).keys() >= fields.keys()
    arguments = []
    for name, value in fields.items():
        option = {"input": "values"}.get(name, name.replace("_", "-"))
        if isinstance(value, bool):
            arguments += [f"--{option}" if value else f"--no-{option}"]
        elif value is not None:
            arguments += [f"--{option}", str(value)]
    given = given_fields(parser_of(kind).parse_args(arguments), kind)
    assert given == {name: value for name, value in fields.items() if value is not None}


@pytest.mark.parametrize("command", KINDS)
def test_commands_show_both_defaults_of_every_setting(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    paper, few = KINDS[command]().to_dict(), KINDS[command].for_few_cells().to_dict()
    for name, value in paper.items():
        line = re.search(rf"^  --{name.replace('_', '-')}[ ,].*(\n {{10,}}.*)?", text, re.MULTILINE)
        assert line is not None, name
        for other in {value, few[name]} - {None}:
            shown = {True: "yes", False: "no"}[other] if isinstance(other, bool) else other
            shown = f"{other:g}" if isinstance(other, float) else shown
            assert re.search(rf"(default|few cells): {shown}\b", line[0]), (name, line[0])
