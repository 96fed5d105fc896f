"""The command ``cellpatch``: thin over the Python functions of the same names.

Parsing imports nothing heavy, so that ``--help`` and mistakes are answered at once. What a user
can mend (`InputError`, a full disk) is one message on stderr and exit code 1; a wrong command
line is 2; Ctrl-C is 130. Anything else is a defect and shows its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import InputError, InputWarning


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    with _on_stderr():
        try:
            parsed.run(parsed)
        except (InputError, OSError, MemoryError) as error:
            print(f"cellpatch: {_explain(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"\ncellpatch: interrupted. {parsed.after_interruption}", file=sys.stderr)
            return 130
    return 0


@contextlib.contextmanager
def _on_stderr() -> Iterator[None]:
    """Show our own log lines and warnings, one line each; other libraries' are not for users."""
    logger = logging.getLogger("cellpatch_fast")
    handler = logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", InputWarning)
            warnings.showwarning = _show_warning
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cellpatch",
        description="Embed single cells with CellPatch: AnnData files in, embeddings out.",
        epilog="cellpatch COMMAND --help explains a command.",
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=version("cellpatch-fast"))
    parser.set_defaults(after_interruption="Nothing was written.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_embed, _add_import, _add_new_model, _add_inspect, _add_demo, _add_tune):
        add(commands)
    return parser


def _add_embed(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "embed",
        help="embed the cells of AnnData files",
        description="Embed every cell of the inputs, in file order and bounded memory. The "
        "result is an AnnData Zarr store with obs and obsm['X_cellpatch']. Until it is complete "
        "it is called OUT.zarr.partial; the same command finishes it after an interruption, and "
        "does nothing when it is finished.",
        epilog="example: cellpatch embed atlas.h5ad --model my-model --output atlas.zarr",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="INPUT",
        help="AnnData (.h5ad, .zarr) or 10x (.h5, folder with matrix.mtx); the cells of several "
        "inputs follow each other",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model directory, or a name on the hub"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="OUT.zarr", help="the store to make"
    )
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
    parser.add_argument(
        "--pool",
        choices=("flatten", "mean"),
        default="flatten",
        help="all patch features side by side, or their mean (default: flatten)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the stored embedding (default: float32)",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="cells per batch at most; changes memory, never the result",
    )
    parser.add_argument(
        "--backend",
        choices=("reference", "numba", "triton"),
        help="default: the fastest for the device; CELLPATCH_BACKEND sets another default",
    )
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 … (default: cpu)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing embedding store, once the new one is complete",
    )
    parser.set_defaults(
        run=_embed,
        after_interruption="What is done is kept: the same command goes on from there.",
    )


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "import-checkpoint",
        help="make a model directory of a checkpoint of the original code",
        description="Convert a checkpoint of the original CellPatch code into a model "
        "directory. Code inside the file is never run.",
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
        choices=("round", "truncate", "none"),
        default="truncate",
        help="how values become integers; the released code truncates (default: truncate)",
    )
    parser.add_argument(
        "--padded-length",
        type=_positive,
        metavar="L",
        help="apply the attention to padding of cells padded to L genes, as in training with "
        "the original code (default: no padding)",
    )
    parser.set_defaults(run=_import_checkpoint)


def _add_new_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "new-model",
        help="make an untrained model",
        description="Write a model directory with the paper's configuration, the human gene "
        "vocabulary and random weights.",
    )
    _add_model_output(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the weights (default: 0)"
    )
    parser.set_defaults(run=_new_model)


def _add_model_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="the model directory to make"
    )


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "inspect",
        help="say what a path holds",
        description="Say what a model directory, an AnnData file or an embedding store holds.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a file or folder")
    parser.set_defaults(run=_inspect)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="the whole path on a small data set, offline",
        description="Make an untrained model, embed the 700 blood cells that scanpy bundles, "
        "and say what is where. Needs the extra 'analysis' and no network.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("cellpatch-demo"), metavar="DIR",
        help="default: cellpatch-demo",
    )  # fmt: skip
    parser.set_defaults(run=_demo, after_interruption="The same command starts anew.")


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure the GPU kernels' configurations on this machine's GPU",
        description="Measure launch configurations on this machine's GPU and keep the fastest, "
        "which are then used instead of those that are shipped. Takes some minutes, most of them "
        "for compiling. Embeddings change by rounding.",
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

    from .embedding import usable_device
    from .kernels import resolve_backend

    device = usable_device(parsed.device)
    try:
        resolve_backend("triton", device)
    except ValueError as error:
        raise InputError(str(error)) from error
    from .kernels.gpu.tuning import tune

    print(tune(torch.device(device), output=parsed.output))


def _embed(parsed: argparse.Namespace) -> None:
    from . import atlas

    summary = atlas.embed(
        parsed.inputs,
        parsed.model,
        parsed.output,
        layer=parsed.layer,
        use_raw=parsed.use_raw,
        gene_column=parsed.gene_column,
        input=parsed.values,
        pool=parsed.pool,
        dtype=parsed.dtype,
        batch_size=parsed.batch_size,
        backend=parsed.backend,
        device=parsed.device,
        overwrite=parsed.overwrite,
    )
    print(summary)


def _import_checkpoint(parsed: argparse.Namespace) -> None:
    from .model import CellPatch

    _require_free(parsed.output)
    model = CellPatch.from_original(
        parsed.checkpoint,
        args=parsed.args,
        vocabulary=parsed.vocabulary,
        value_rounding=parsed.value_rounding,
        padded_length=parsed.padded_length,
    )
    model.save_pretrained(parsed.output)
    print(f"{parsed.output}: {len(model.vocabulary):,} genes, {_parameters(model):,} parameters")


def _new_model(parsed: argparse.Namespace) -> None:
    _require_free(parsed.output)
    import torch

    from .config import CellPatchConfig
    from .genes import GeneVocabulary
    from .model import CellPatch

    torch.manual_seed(parsed.seed)
    model = CellPatch(CellPatchConfig(), GeneVocabulary.human())
    model.save_pretrained(parsed.output)
    print(
        f"{parsed.output}: untrained, {len(model.vocabulary):,} genes, "
        f"{_parameters(model):,} parameters"
    )


def _inspect(parsed: argparse.Namespace) -> None:
    from .inspection import describe

    for name, value in describe(parsed.path).items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name}: {shown}")


def _demo(parsed: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(parsed.output)


def _parameters(model: object) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # type: ignore[attr-defined]


def _require_free(directory: Path) -> None:
    """A model is never overwritten by mistake."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists already: choose another --output or delete it")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {number}")
    return number


def _explain(error: InputError | OSError | MemoryError) -> str:
    """What went wrong, and what may help."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"not enough memory ({error}). A smaller --batch-size needs less."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{error}. There is no room to write: free some space, then repeat the command; what "
            "is done is kept."
        )
    return f"{error}. Check the path and its permissions."


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line, without the line of code that it came from."""
    print(f"cellpatch: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
