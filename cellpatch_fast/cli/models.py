"""The commands of ``cellpatch`` that make models without training: new-model, import-checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from ..config import ValueRounding
from ..errors import InputError
from .options import positive


def add_import_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Convert a checkpoint of the original CellPatch code into a model "
        "directory: of pretraining with its decoder, of annotation with its head if --classes "
        "names the cell types, else the encoder alone. Code inside the file is never run."
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="FILE.pth", help="of a PathFormer or PathFormer_lp"
    )
    parser.add_argument(
        "--args", required=True, type=Path, metavar="ARGS.json", help="arguments of its training"
    )
    parser.add_argument(
        "--vocabulary",
        required=True,
        type=Path,
        metavar="GENE2TOK.json",
        help="tokens of the genes by their symbols",
    )
    _add_model_output(parser)
    parser.add_argument(
        "--value-rounding",
        choices=get_args(ValueRounding),
        default="truncate",
        help="how values become integers; the released code truncates (default: truncate)",
    )
    parser.add_argument(
        "--padded-length",
        type=positive,
        metavar="L",
        help="apply the attention to padding of cells padded to L genes, as in training with "
        "the original code (default: no padding)",
    )
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="of an annotation checkpoint: names of the cell types in the order of its outputs, "
        "one per line",
    )
    parser.set_defaults(run=_import_checkpoint)


def _import_checkpoint(parsed: argparse.Namespace) -> None:
    from ..model import CellPatch, CellPatchAnnotator, MaskedGeneModel
    from ..model.original import holds_decoder

    _require_free(parsed.output)
    options = {
        "args": parsed.args,
        "vocabulary": parsed.vocabulary,
        "value_rounding": parsed.value_rounding,
        "padded_length": parsed.padded_length,
    }
    model: CellPatch
    if parsed.classes is not None:
        classes = parsed.classes.read_text().split("\n")
        classes = [name.strip() for name in classes if name.strip()]
        model = CellPatchAnnotator.from_original(parsed.checkpoint, classes=classes, **options)
    elif holds_decoder(parsed.checkpoint):
        model = MaskedGeneModel.from_original(parsed.checkpoint, **options)
    else:
        model = CellPatch.from_original(parsed.checkpoint, **options)
    model.save_pretrained(parsed.output)
    print(
        f"{parsed.output}: {type(model).__name__}, {len(model.vocabulary):,} genes, "
        f"{_parameters(model):,} parameters"
    )


def add_new_model(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a model directory with the paper's configuration, the human gene "
        "vocabulary and random weights."
    )
    _add_model_output(parser)
    parser.add_argument(
        "--few-cells",
        action="store_true",
        help="the configuration for some hundred or thousand cells instead: values are neither "
        "rounded nor clipped, no attention weights are dropped",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the weights (default: 0)"
    )
    parser.set_defaults(run=_new_model)


def _new_model(parsed: argparse.Namespace) -> None:
    _require_free(parsed.output)
    import torch

    from ..config import CellPatchConfig
    from ..genes import GeneVocabulary
    from ..model import CellPatch

    torch.manual_seed(parsed.seed)
    config = CellPatchConfig.for_few_cells() if parsed.few_cells else CellPatchConfig()
    model = CellPatch(config, GeneVocabulary.human())
    model.save_pretrained(parsed.output)
    print(
        f"{parsed.output}: untrained, {len(model.vocabulary):,} genes, "
        f"{_parameters(model):,} parameters"
    )


def _add_model_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="the model directory to make"
    )


def _parameters(model: object) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # type: ignore[attr-defined]


def _require_free(directory: Path) -> None:
    """A model is never overwritten by mistake."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists already: choose another --output or delete it")
