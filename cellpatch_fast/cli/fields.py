"""Options made from dataclasses: a field is an option, and the first sentence about it is its help.

Name, type, choices and default are the field's; so what an option does is said and checked in one
place, the class. Defaults that depend on the number of cells are shown for both cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

METAVARS = {int: "N", float: "X", str: "NAME"}
NAMES = {"input": "--values"}  # where the option has another name than the field
DEFAULT = re.compile(r"; None for (.*)")


def add_fields(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    kind: type[Any],
    few_cells: object | None = None,
) -> None:
    """An option for each field of a dataclass; None where it is not given.

    Parameters
    ----------
    kind
        The dataclass; its docstring, and those of its bases, say what the fields mean.
    few_cells
        Its defaults for few cells, where they are others.
    """
    types, texts = get_type_hints(kind), documented(kind)
    for field in dataclasses.fields(kind):
        text, default = _help(texts[field.name], field.default)
        defaults = [] if default is None else [default]
        if few_cells is not None and getattr(few_cells, field.name) != field.default:
            defaults.append(f"few cells: {_shown(getattr(few_cells, field.name))}")
        if defaults:
            text += f" (default: {'; '.join(defaults)})"
        parser.add_argument(
            NAMES.get(field.name, f"--{field.name.replace('_', '-')}"),
            dest=field.name,
            default=None,
            help=text.replace("%", "%%"),
            **_parsing(types[field.name]),
        )


def given_fields(parsed: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """Those fields that were given on the command line."""
    values = {field.name: getattr(parsed, field.name, None) for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def documented(kind: type[Any]) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each parameter, in one line each."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Parameters\n----------\n")[2]
        for name, text in re.findall(r"^(\w+)\n((?:    .*(?:\n|$))+)", section, re.MULTILINE):
            texts[name] = " ".join(text.split())
    return texts


def _help(text: str, default: object) -> tuple[str, str | None]:
    """The first sentence, as a help text, and the default in words."""
    sentence = re.split(r"\. |\.$", text.replace("`", ""))[0]
    sentence = sentence[0].lower() + sentence[1:]
    if default is not None:
        return sentence, _shown(default)
    match = DEFAULT.search(sentence)  # what None stands for
    return (sentence[: match.start()], match[1]) if match else (sentence, None)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parsing(annotation: Any) -> Mapping[str, Any]:
    """How a value of this type is read, as keywords of ``add_argument``."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if parts and get_origin(annotation) is not Literal:  # X | None
        (annotation,) = parts
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": annotation, "metavar": METAVARS[annotation]}
