"""The commands of ``cellpatch`` that train: pretrain and finetune."""

from __future__ import annotations

import argparse
import sys

from .options import (
    RESUMABLE,
    Commands,
    add_inputs,
    add_run,
    add_settings,
    configured,
    given_vocabulary,
    positive,
    run_options,
)


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
    add_run(parser)
    group = add_settings(
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
    from ..training import PretrainingSettings, pretrain

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
    add_run(parser)
    group = add_settings(
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
    from ..training import FinetuningSettings, finetune

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
