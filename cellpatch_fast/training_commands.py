"""The commands of ``cellpatch`` that train: pretrain and finetune.

Options that stand for a training setting are those of the settings' dataclass, so that defaults and
checks are in one place; what is not given on the command line comes from ``--config``, else from
the defaults for so many cells.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .commands import (
    MODEL_HELP,
    RESUMABLE,
    Commands,
    add_inputs,
    add_reading,
    natural,
    positive,
)
from .errors import InputError

if TYPE_CHECKING:
    from .genes import GeneVocabulary
    from .training import FinetuningSettings, PretrainingSettings

SettingsT = TypeVar("SettingsT", "PretrainingSettings", "FinetuningSettings")


def add_pretrain(commands: Commands) -> None:
    parser = commands.add_parser(
        "pretrain",
        help="pretrain a model by masked gene modelling",
        description="Hide genes of every cell and learn to tell their values from the others. The "
        "output is a model directory with the run's tables beside it. After an interruption the "
        "same command goes on, and ends with the same bits.",
        epilog="example: cellpatch pretrain tokens.zarr --output pretrained --epochs 10",
    )
    add_inputs(parser, " or token stores")
    _add_run(parser)
    group = _add_settings(
        parser,
        epochs="50; few cells: 20",
        batch_size="512; few cells: 16",
        rate="1e-4; few cells: 2e-3",
        decay="5e-5; few cells: 0.01",
        warmup="0; few cells: 50",
        gene_rate="1; few cells: 10",
        encoder_rate="1; few cells: 0.3",
        validation="0.05",
        patience="0",
    )
    group.add_argument(
        "--hidden", type=float, metavar="X", help="share of a cell's genes to hide (default: 0.3)"
    )
    group.add_argument(
        "--zeros", type=float, metavar="X", help="zeros to predict per hidden gene (default: 0.5)"
    )
    group.add_argument(
        "--max-encoder", type=positive, metavar="N", help="most genes seen (default: 3000)"
    )
    group.add_argument(
        "--max-decoder", type=positive, metavar="N", help="most genes predicted (default: 1000)"
    )
    parser.set_defaults(run=_pretrain, after_interruption=RESUMABLE)


def _pretrain(parsed: argparse.Namespace) -> None:
    from .training import PretrainingSettings, pretrain

    if _starts_processes(parsed):
        return
    model_config, settings = _configured(parsed, PretrainingSettings)
    history = pretrain(
        parsed.inputs,
        parsed.output,
        model=parsed.model,
        config=model_config,
        vocabulary=_vocabulary(parsed),
        settings=settings,
        few_cells=parsed.few_cells,
        **_run_options(parsed),
    )
    if _leads():
        best = ", ".join(
            f"{name.replace('_', ' ')} {value:.4f}"
            for name, value in history.best.items()
            if name.startswith(("training", "validation"))
        )
        print(f"{parsed.output}: {history.epochs} epochs, {history.steps:,} steps; {best}")


def add_finetune(commands: Commands) -> None:
    parser = commands.add_parser(
        "finetune",
        help="train an annotator of cell types",
        description="Train an encoder and a head to tell cell types, on cells that have a label. "
        "Cells are split into training, validation (when to stop) and test (how good it is). "
        "The output is a model directory with the test result, its tables and figures beside it. "
        "After an interruption the same command goes on.",
        epilog="example: cellpatch finetune cells.h5ad --label cell_type --model pretrained "
        "--output annotator",
    )
    add_inputs(parser, " or token stores")
    parser.add_argument(
        "--label", required=True, metavar="COLUMN", help="column of obs with the cell types"
    )
    _add_run(parser)
    group = _add_settings(
        parser,
        epochs="50; few cells: of 700 steps together, 3 to 20",
        batch_size="256; few cells: 32",
        rate="1e-3",
        decay="5e-4; few cells: 0.3",
        warmup="0; few cells: 20",
        gene_rate="1",
        encoder_rate="1; few cells: 0.1",
        validation="0.1",
        patience="10; few cells: 0",
    )
    group.add_argument(
        "--test", type=float, metavar="X", help="share of cells to test with (default: 0.1)"
    )
    group.add_argument(
        "--split-column",
        metavar="C",
        help="column of obs that says train, validation or test, instead of shares",
    )
    group.add_argument(
        "--hidden",
        type=float,
        metavar="X",
        help="share of a cell's genes to hide in training, others in every epoch (default: 0; few "
        "cells: 0.5)",
    )
    group.add_argument(
        "--guided",
        action=argparse.BooleanOptionalAction,
        help="take part of a spectral start from a linear model of the labels (default: for few "
        "cells)",
    )
    group.add_argument(
        "--linear",
        action=argparse.BooleanOptionalAction,
        help="linear models beside the network, mixed by validation cells (default: for few cells)",
    )
    group.add_argument(
        "--freeze-encoder", action="store_true", default=None, help="train the head alone"
    )
    group.add_argument(
        "--balance", action="store_true", default=None, help="show all types equally often"
    )
    group.add_argument(
        "--min-cells",
        type=positive,
        metavar="N",
        help="leave out types with fewer cells (default: 5)",
    )
    parser.set_defaults(run=_finetune, after_interruption=RESUMABLE)


def _finetune(parsed: argparse.Namespace) -> None:
    from .training import FinetuningSettings, finetune

    if _starts_processes(parsed):
        return
    model_config, settings = _configured(parsed, FinetuningSettings)
    done = finetune(
        parsed.inputs,
        parsed.output,
        label=parsed.label,
        model=parsed.model,
        config=model_config,
        vocabulary=_vocabulary(parsed),
        settings=settings,
        few_cells=parsed.few_cells,
        split_column=parsed.split_column,
        **_run_options(parsed),
    )
    if _leads():
        history = done.history
        print(f"{parsed.output}: {history.epochs} epochs, {history.steps:,} steps")
        print(f"test: {done.test}" if done.test else "no test cells")
        if done.linear:
            print(f"linear models alone, on the same cells: {done.linear.scores}")
        print(f"Next: cellpatch annotate CELLS --model {parsed.output} --output annotated.zarr")


def _add_run(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--device", metavar="D", help="cpu, cuda … (default: a GPU if there is)")
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


def _add_settings(
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


def _configured(
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


def _vocabulary(parsed: argparse.Namespace) -> GeneVocabulary | None:
    from .genes import GeneVocabulary

    return None if parsed.vocabulary is None else GeneVocabulary.load(parsed.vocabulary)


def _run_options(parsed: argparse.Namespace) -> dict[str, Any]:
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


def _starts_processes(parsed: argparse.Namespace) -> bool:
    """Run the command in as many processes as asked for; True if that has been done here."""
    from .training import distributed

    if parsed.devices in (None, 1) or distributed.started():
        return False
    code = distributed.launch(parsed.devices, parsed.device, parsed.arguments)
    if code:
        sys.exit(code)
    return True


def _leads() -> bool:
    from .training import distributed

    return distributed.rank() == 0
