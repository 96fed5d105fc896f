"""Options that several commands share, and what was given of them.

Options that stand for a training setting, or for how inputs are read, are made from the dataclass
(see `fields`); a setting that is not given on the command line comes from ``--config``, else from
the defaults for so many cells.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..config import Backend, Reading
from ..errors import InputError
from .fields import add_fields, given_fields

if TYPE_CHECKING:
    from ..genes import GeneVocabulary
    from ..training.settings import TrainingSettings

RESUMABLE = "What is done is kept: the same command goes on from there."
MODEL_HELP = "model directory, or a name on the hub"


def add_inputs(parser: argparse.ArgumentParser, others: str = "") -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        type=place,
        metavar="INPUT",
        help="AnnData (.h5ad, .zarr, or the address of a .zarr store), 10x (.h5, folder with "
        f"matrix.mtx){others}; the cells of several inputs follow each other",
    )


def place(text: str) -> Path | str:
    """A path, unless it is an address such as https://..., which a path would change."""
    return text if "://" in text else Path(text)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {number}")
    return number


def natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, found {number}")
    return number


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Some of the cells instead of all."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--obs-query",
        metavar="QUERY",
        help="only the cells whose row of obs this holds for, as pandas.DataFrame.query reads it: "
        "\"tissue == 'blood' and n_genes > 200\"; 'index' are the names of the cells",
    )
    group.add_argument(
        "--rows-from",
        type=Path,
        metavar="FILE",
        help="only the cells whose positions are in this text file, one in each line, ascending, "
        "counted from 0 through all inputs",
    )


def given_selection(parsed: argparse.Namespace) -> dict[str, Any]:
    from ..atlas.selection import read_rows

    rows = None if parsed.rows_from is None else read_rows(parsed.rows_from)
    return {"obs_query": parsed.obs_query, "rows": rows}


def add_computing(parser: argparse.ArgumentParser, stored: str) -> None:
    """How what is ``stored`` is computed and written."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help=f"of {stored} (default: float32)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="cells per batch at most; changes memory, never the result",
    )
    parser.add_argument(
        "--backend",
        choices=get_args(Backend),
        help="default: the fastest for the device; CELLPATCH_BACKEND sets another default",
    )
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing embedding store, once the new one is complete",
    )


def given_computing(parsed: argparse.Namespace) -> dict[str, Any]:
    names = ("dtype", "batch_size", "backend", "device", "overwrite")
    return {name: getattr(parsed, name) for name in names}


def add_run(parser: argparse.ArgumentParser) -> None:
    """What is trained, where it goes, and on which machine."""
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="the run's folder"
    )
    parser.add_argument(
        "--model", metavar="DIR", help=f"what to start from: {MODEL_HELP} (default: a new model)"
    )
    parser.add_argument(
        "--vocabulary",
        metavar="V",
        help="of a new model: a vocabulary.json (default: the bundled human genes)",
    )
    parser.add_argument(
        "--add-genes",
        action=argparse.BooleanOptionalAction,
        help="give genes that the vocabulary lacks a token of their own (default: for a new model "
        "with the settings for few cells)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help='JSON: {"model": {…}, "training": {…}}, fields of CellPatchConfig (of a new model) '
        "and of the training settings; options given here come first",
    )
    add_fields(parser, Reading)
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda … (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--devices",
        type=positive,
        metavar="N",
        help="train with N processes, one per GPU (or on the CPU), which share every batch",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="that read ahead")
    parser.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=10.0,
        metavar="M",
        help="time between checkpoints within an epoch (default: 10)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew where there is a run already; without it, to go on after an interruption",
    )


def add_settings(
    parser: argparse.ArgumentParser, kind: type[TrainingSettings], few_cells: TrainingSettings
) -> argparse._ArgumentGroup:
    """The settings of training, whose defaults are the paper's or those for few cells."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--few-cells",
        action=argparse.BooleanOptionalAction,
        help="the defaults for few cells (a new model starts from its data, small batches, AdamW, "
        "values not rounded), or the paper's (default: for fewer than 20,000 cells)",
    )
    add_fields(group, kind, few_cells)
    return group


def configured(
    parsed: argparse.Namespace, kind: type[TrainingSettings]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What was given of a new model's configuration, and of the settings; options come first."""
    config = _read_config(parsed.config) if parsed.config else {}
    return config.get("model"), config.get("training", {}) | given_fields(parsed, kind)


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if (
        not isinstance(config, dict)
        or not config.keys() <= {"model", "training"}
        or not all(isinstance(part, dict) for part in config.values())
    ):
        raise InputError(f'{path} must hold {{"model": {{…}}, "training": {{…}}}}, or one of them')
    return config


def given_vocabulary(parsed: argparse.Namespace) -> GeneVocabulary | None:
    from ..genes import GeneVocabulary

    return None if parsed.vocabulary is None else GeneVocabulary.load(parsed.vocabulary)


def run_options(parsed: argparse.Namespace) -> dict[str, Any]:
    return {
        "add_genes": parsed.add_genes,
        **given_fields(parsed, Reading),
        "device": parsed.device,
        "devices": parsed.devices,
        "threads": parsed.threads,
        "checkpoint_minutes": parsed.checkpoint_minutes,
        "overwrite": parsed.overwrite,
    }
