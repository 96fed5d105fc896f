"""The commands of ``cellpatch``, each thin over the Python function of the same name.

A command is a function that describes its options, and one that runs it. Only the latter imports
what is heavy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from ..config import Reading, ValueRounding
from ..errors import InputError
from .fields import add_fields, given_fields
from .options import (
    MODEL_HELP,
    RESUMABLE,
    add_computing,
    add_inputs,
    add_selection,
    given_computing,
    given_selection,
    natural,
    place,
)


def add_embed(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Embed every cell of the inputs, in file order and bounded memory. The "
        "result is an AnnData Zarr store with obs and obsm['X_cellpatch']. Until it is complete "
        "it is called OUT.zarr.partial; the same command finishes it after an interruption, and "
        "does nothing when it is finished."
    )
    parser.epilog = "example: cellpatch embed atlas.h5ad --model my-model --output atlas.zarr"
    add_inputs(parser, " or token stores")
    parser.add_argument("--model", required=True, metavar="DIR", help=MODEL_HELP)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="OUT.zarr", help="the store to make"
    )
    add_fields(parser, Reading)
    add_selection(parser)
    parser.add_argument(
        "--pool",
        choices=("flatten", "mean"),
        default="flatten",
        help="all patch features side by side, or their mean (default: flatten)",
    )
    add_computing(parser, "the stored embedding")
    parser.set_defaults(run=_embed, after_interruption=RESUMABLE)


def _embed(parsed: argparse.Namespace) -> None:
    from .. import atlas

    summary = atlas.embed(
        parsed.inputs,
        parsed.model,
        parsed.output,
        **given_fields(parsed, Reading),
        **given_selection(parsed),
        pool=parsed.pool,
        **given_computing(parsed),
    )
    print(summary)


def add_tokenize(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prepare every cell of the inputs for a model, in bounded memory: genes "
        "become tokens, counts become values. Inputs may have different genes; obs is kept. "
        "The result is a Zarr store that can be streamed as often as one likes, for embedding or "
        "(with --shuffle) for training. Until it is complete it is called TOKENS.zarr.partial; "
        "the same command finishes it after an interruption, and does nothing when it is "
        "finished."
    )
    parser.epilog = "example: cellpatch tokenize a.h5ad b.h5ad --shuffle --output tokens.zarr"
    add_inputs(parser)
    values = parser.add_mutually_exclusive_group()
    values.add_argument(
        "--model",
        metavar="DIR",
        help=f"the model that the tokens are for: {MODEL_HELP} (default: a new one with the "
        "paper's preprocessing)",
    )
    values.add_argument(
        "--few-cells",
        action="store_true",
        help="for a new model that is made with --few-cells (pretrain, finetune, new-model): "
        "values are neither rounded nor clipped",
    )
    values.add_argument(
        "--value-rounding",
        choices=get_args(ValueRounding),
        help="for a new model of another kind: how values become integers, or that they stay "
        "continuous (float16) (default: round)",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="V",
        help="without --model: a vocabulary.json (default: 'human', the bundled human genes)",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="TOKENS.zarr", help="the store to make"
    )
    add_fields(parser, Reading)
    parser.add_argument(
        "--shuffle",
        action="store_true",
        help="put the cells of all inputs into one random order; takes 8 bytes of memory per "
        "cell and, meanwhile, 3 bytes of disk per entry",
    )
    parser.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of that order (default: 0)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing token store, once the new one is complete",
    )
    parser.set_defaults(run=_tokenize, after_interruption=RESUMABLE)


def _tokenize(parsed: argparse.Namespace) -> None:
    from .. import atlas
    from ..config import CellPatchConfig

    config = CellPatchConfig.for_few_cells() if parsed.few_cells else None
    if parsed.value_rounding is not None:
        config = CellPatchConfig(value_rounding=parsed.value_rounding)
    summary = atlas.tokenize(
        parsed.inputs,
        parsed.output,
        model=parsed.model,
        vocabulary=parsed.vocabulary,
        config=config,
        **given_fields(parsed, Reading),
        shuffle=parsed.shuffle,
        seed=parsed.seed,
        overwrite=parsed.overwrite,
    )
    print(summary)


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train an annotator on 525 of the 700 blood cells that scanpy bundles, "
        "annotate all, and write a page that compares the result on the other 175 with logistic "
        "regression. Takes a minute or two. Needs the extra 'analysis' and no network."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("cellpatch-demo"), metavar="DIR",
        help="default: cellpatch-demo",
    )  # fmt: skip
    parser.set_defaults(run=_demo, after_interruption="The same command starts anew.")


def _demo(parsed: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(parsed.output)


def add_tune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure launch configurations on this machine's GPU and keep the fastest, "
        "which are then used instead of those that are shipped. Takes some minutes, most of them "
        "for compiling. Embeddings change by rounding."
    )
    parser.add_argument("--device", default="cuda", metavar="D", help="default: cuda")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the file, to be named in CELLPATCH_CONFIGURATIONS (default: "
        "~/.cache/cellpatch_fast, where it is found)",
    )
    parser.set_defaults(run=_tune)


def _tune(parsed: argparse.Namespace) -> None:
    import torch

    from ..devices import usable_device
    from ..kernels import resolve_backend

    device = usable_device(parsed.device)
    try:
        resolve_backend("triton", device)
    except ValueError as error:
        raise InputError(str(error)) from error
    from ..kernels.gpu.tuning import tune

    print(tune(torch.device(device), output=parsed.output))


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what a model directory, an AnnData file, a token store or an embedding store holds."
    )
    parser.add_argument("path", type=place, metavar="PATH", help="a file, folder or address")
    parser.set_defaults(run=_inspect)


def _inspect(parsed: argparse.Namespace) -> None:
    from .inspection import describe

    for name, value in describe(parsed.path).items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name}: {shown}")
