"""The commands of ``cellpatch`` that train: pretrain and finetune."""

from __future__ import annotations

import argparse
import sys

from ..training.settings import FinetuningSettings, PretrainingSettings
from .options import (
    RESUMABLE,
    add_inputs,
    add_run,
    add_settings,
    configured,
    given_vocabulary,
    run_options,
)


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Hide genes of every cell and learn to tell their values from the others. The "
        "output is a model directory with the run's tables beside it. After an interruption the "
        "same command goes on, and ends with the same bits."
    )
    parser.epilog = "example: cellpatch pretrain tokens.zarr --output pretrained --epochs 10"
    add_inputs(parser, " or token stores")
    add_run(parser)
    add_settings(parser, PretrainingSettings, PretrainingSettings.for_few_cells())
    parser.set_defaults(run=_pretrain, after_interruption=RESUMABLE)


def _pretrain(parsed: argparse.Namespace) -> None:
    from ..training import pretrain

    if _starts_processes(parsed):
        return
    model_config, settings = configured(parsed, PretrainingSettings)
    history = pretrain(
        parsed.inputs,
        parsed.output,
        model=parsed.model,
        config=model_config,
        vocabulary=given_vocabulary(parsed),
        settings=settings,
        few_cells=parsed.few_cells,
        **run_options(parsed),
    )
    if _leads():
        best = ", ".join(
            f"{name.replace('_', ' ')} {value:.4f}"
            for name, value in history.best.items()
            if name.startswith(("training", "validation"))
        )
        print(f"{parsed.output}: {history.epochs} epochs, {history.steps:,} steps; {best}")


def add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train an encoder and a head to tell cell types, on cells that have a label. "
        "Cells are split into training, validation (when to stop) and test (how good it is). "
        "The output is a model directory with the test result, its tables and figures beside it. "
        "After an interruption the same command goes on."
    )
    parser.epilog = (
        "example: cellpatch finetune cells.h5ad --label cell_type --model pretrained "
        "--output annotator"
    )
    add_inputs(parser, " or token stores")
    parser.add_argument(
        "--label", required=True, metavar="COLUMN", help="column of obs with the cell types"
    )
    add_run(parser)
    group = add_settings(parser, FinetuningSettings, FinetuningSettings.for_few_cells())
    group.add_argument(
        "--split-column",
        metavar="C",
        help="column of obs that says train, validation or test, instead of shares",
    )
    parser.set_defaults(run=_finetune, after_interruption=RESUMABLE)


def _finetune(parsed: argparse.Namespace) -> None:
    from ..training import finetune

    if _starts_processes(parsed):
        return
    model_config, settings = configured(parsed, FinetuningSettings)
    done = finetune(
        parsed.inputs,
        parsed.output,
        label=parsed.label,
        model=parsed.model,
        config=model_config,
        vocabulary=given_vocabulary(parsed),
        settings=settings,
        few_cells=parsed.few_cells,
        split_column=parsed.split_column,
        **run_options(parsed),
    )
    if _leads():
        history = done.history
        print(f"{parsed.output}: {history.epochs} epochs, {history.steps:,} steps")
        print(f"test: {done.test}" if done.test else "no test cells")
        if done.linear:
            print(f"linear models alone, on the same cells: {done.linear.scores}")
        print(f"Next: cellpatch annotate CELLS --model {parsed.output} --output annotated.zarr")


def _starts_processes(parsed: argparse.Namespace) -> bool:
    """Run the command in as many processes as asked for; True if that has been done here."""
    from ..training import distributed

    if parsed.devices in (None, 1) or distributed.started():
        return False
    code = distributed.launch(parsed.devices, parsed.device, parsed.arguments)
    if code:
        sys.exit(code)
    return True


def _leads() -> bool:
    from ..training import distributed

    return distributed.rank() == 0
