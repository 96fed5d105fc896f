"""Options that several commands share, and what was given of them.

Options that stand for a training setting are those of the settings' dataclass, so that defaults and
checks are in one place; what is not given on the command line comes from ``--config``, else from
the defaults for so many cells.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ..errors import InputError

if TYPE_CHECKING:
    from ..genes import GeneVocabulary
    from ..training import FinetuningSettings, PretrainingSettings

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
SettingsT = TypeVar("SettingsT", "PretrainingSettings", "FinetuningSettings")

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


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How the inputs are read."""
    parser.add_argument("--layer", metavar="L", help="read this layer instead of X")
    parser.add_argument("--use-raw", action="store_true", help="read raw instead of X")
    parser.add_argument(
        "--gene-column",
        metavar="C",
        help="column of var with Ensembl IDs or symbols (default: the one that fits best)",
    )
    parser.add_argument(
        "--values",
        choices=("auto", "counts", "lognorm"),
        default="auto",
        help="what the matrix holds: raw counts, or log-normalised values (default: find out)",
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
    add_reading(parser)
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
    parser: argparse.ArgumentParser,
    *,
    epochs: str,
    batch_size: str,
    rate: str,
    decay: str,
    warmup: str,
    gene_rate: str,
    encoder_rate: str,
    validation: str,
    patience: str,
) -> argparse._ArgumentGroup:
    """The settings that pretraining and fine-tuning have in common; not given means None.

    What is given here are their defaults, the paper's and those for few cells, in words.
    """
    group = parser.add_argument_group("training")
    add = group.add_argument
    switch = argparse.BooleanOptionalAction
    add(
        "--few-cells",
        action=switch,
        help="the defaults for few cells (a new model starts from its data, small batches, AdamW, "
        "values not rounded), or the paper's (default: for fewer than 20,000 cells)",
    )
    add("--epochs", type=positive, metavar="N", help=f"default: {epochs}")
    add(
        "--batch-size",
        type=positive,
        metavar="N",
        help=f"cells per step, on all devices together (default: {batch_size})",
    )
    add(
        "--accumulate",
        type=positive,
        metavar="N",
        help="compute a batch in N parts, for less memory (default: 1)",
    )
    add("--optimizer", choices=("adam", "adamw"), help="default: adam; few cells: adamw")
    add("--learning-rate", type=float, metavar="X", help=f"default: {rate}")
    add("--weight-decay", type=float, metavar="X", help=f"default: {decay}")
    add("--gradient-clip", type=float, metavar="X", help="largest norm, 0 for any (default: 5)")
    add("--schedule", choices=("constant", "cosine"), help="default: constant; few cells: cosine")
    add("--warmup-steps", type=natural, metavar="N", help=f"default: {warmup}")
    add("--precision", choices=("float32", "bfloat16"), help="on a GPU (default: float32)")
    add("--compile", action="store_true", default=None, help="use torch.compile")
    add(
        "--validation",
        type=float,
        metavar="X",
        help=f"share of cells to validate with (default: {validation})",
    )
    add(
        "--patience",
        type=natural,
        metavar="N",
        help=f"stop after N epochs without improvement; 0 for never (default: {patience})",
    )
    rate_help = f"of genes, times the learning rate (default: {gene_rate})"
    add("--gene-rate", type=float, metavar="X", help=rate_help)
    rate_help = f"the same, of the encoder's rest (default: {encoder_rate})"
    add("--encoder-rate", type=float, metavar="X", help=rate_help)
    add(
        "--spectral",
        action=switch,
        help="start a new model's genes from components of the data (default: for few cells)",
    )
    add(
        "--whitened",
        action=switch,
        help="start a new model's attention where it tells cells apart (default: for few cells)",
    )
    add(
        "--keep-best",
        action=switch,
        help="keep the model of the best epoch on validation cells, else of the last (default: "
        "yes; few cells: no)",
    )
    add("--seed", type=natural, metavar="N", help="default: 0")
    add(
        "--deterministic",
        action="store_true",
        default=None,
        help="equal bits on every run, on a GPU too",
    )
    add("--backend", choices=("reference", "numba", "triton"), help="default: the fastest")
    return group


def configured(
    parsed: argparse.Namespace, kind: type[SettingsT]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What was given of a new model's configuration, and of the settings; options come first."""
    found = _read_config(parsed.config) if parsed.config else {}
    training = dict(found.get("training", {}))
    for field in fields(kind):
        if getattr(parsed, field.name, None) is not None:
            training[field.name] = getattr(parsed, field.name)
    return found.get("model"), training


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    known = {"model", "training"}
    if (
        not isinstance(found, dict)
        or not found.keys() <= known
        or not all(isinstance(part, dict) for part in found.values())
    ):
        raise InputError(f'{path} must hold {{"model": {{…}}, "training": {{…}}}}, or one of them')
    return found


def given_vocabulary(parsed: argparse.Namespace) -> GeneVocabulary | None:
    from ..genes import GeneVocabulary

    return None if parsed.vocabulary is None else GeneVocabulary.load(parsed.vocabulary)


def run_options(parsed: argparse.Namespace) -> dict[str, Any]:
    return {
        "add_genes": parsed.add_genes,
        "layer": parsed.layer,
        "use_raw": parsed.use_raw,
        "gene_column": parsed.gene_column,
        "input": parsed.values,
        "device": parsed.device,
        "devices": parsed.devices,
        "threads": parsed.threads,
        "checkpoint_minutes": parsed.checkpoint_minutes,
        "overwrite": parsed.overwrite,
    }
