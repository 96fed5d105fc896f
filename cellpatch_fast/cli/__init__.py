"""The command ``cellpatch``: the parser, and how a command ends.

What the commands do is in the modules beside this one.

Parsing imports nothing heavy, so that ``--help`` and mistakes are answered at once. What a user
can mend (`InputError`, a full disk) is one message on stderr and exit code 1; a wrong command
line is 2; Ctrl-C is 130. Anything else is a defect and shows its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import itertools
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from ..devices import keep_to_quota, wait_passively
from ..errors import InputError, InputWarning

# In the order of --help: the module of each command's options, and what it does. Only the command
# that is asked for is imported.
COMMANDS = {
    "embed": ("inference", "embed the cells of AnnData files"),
    "tokenize": ("inference", "make a token store, which loads as fast as the disk reads"),
    "pretrain": ("training", "pretrain a model by masked gene modelling"),
    "finetune": ("training", "train an annotator of cell types"),
    "annotate": ("annotation", "tell the types of cells"),
    "new-model": ("models", "make an untrained model"),
    "import-checkpoint": ("models", "make a model directory of a checkpoint of the original code"),
    "inspect": ("inference", "say what a path holds"),
    "demo": ("inference", "the whole path on a small data set, offline"),
    "tune": ("inference", "measure the GPU kernels' configurations on this machine's GPU"),
    "synthetic-atlas": ("synthetic", "generate an AnnData file of any size"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parsed = _parser(arguments).parse_args(arguments)
    parsed.arguments = arguments  # for processes that do the same
    wait_passively()
    with _on_stderr():
        try:
            keep_to_quota()
            parsed.run(parsed)
        except (InputError, OSError, MemoryError) as error:
            print(f"cellpatch: {_explain(error, parsed)}", file=sys.stderr)
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


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of those that ``arguments`` name."""
    parser = argparse.ArgumentParser(
        prog="cellpatch",
        description="CellPatch for single cells: embed, pretrain, fine-tune, annotate.",
        epilog="cellpatch COMMAND --help explains a command.",
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=version("cellpatch-fast"))
    parser.set_defaults(after_interruption="Nothing was written.")
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    for name, (module, text) in COMMANDS.items():
        command = subparsers.add_parser(name, help=text)
        if name in arguments:
            functions = import_module(f".{module}", __name__)
            getattr(functions, f"add_{name.replace('-', '_')}")(command)
    return parser


class _CommandParser(argparse.ArgumentParser):
    """Says which options there are not, before it says which are missing: a slip causes both."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        before_paths = itertools.takewhile(lambda text: text != "--", args)
        options = [text.partition("=")[0] for text in before_paths if text.startswith("--")]
        unknown = [
            option
            for option in dict.fromkeys(options)
            if not any(name.startswith(option) for name in self._option_string_actions)
        ]
        if unknown:
            self.error(f"there is no option {', no '.join(map(self._suggested, unknown))}")
        return super().parse_known_args(args, namespace)

    def _suggested(self, option: str) -> str:
        close = difflib.get_close_matches(option, self._option_string_actions, n=1)
        return f"{option} (did you mean {close[0]}?)" if close else option


def _explain(error: InputError | OSError | MemoryError, parsed: argparse.Namespace) -> str:
    """What went wrong, and what may help."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError):
        advice = " A smaller --batch-size needs less." if "batch_size" in parsed else ""
        if "accumulate" in parsed:
            advice = " A larger --accumulate needs less, and gives the same result."
        return f"not enough memory ({error}).{advice}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{error}. There is no room to write: free some space, then repeat the command; what "
            "is done is kept."
        )
    return f"{error}. Check the path and its permissions."


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line, without the line of code that it came from."""
    print(f"cellpatch: warning: {message}", file=sys.stderr)
