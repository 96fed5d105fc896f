"""``python -m bench.reporting RUN.json``: tables, figures, a page of what `pytest bench` wrote."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from cellpatch_fast.errors import InputError

from .compare import compare, require_within
from .results import Run, newest
from .write import write_report

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (InputError, OSError) as error:
        print(f"bench.reporting: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reporting",
        description="Write Markdown tables, figures (PNG and SVG) and one self-contained HTML "
        "page of a results file of 'pytest bench', beside it. Or, with --compare, print how it "
        "differs from an older one. Needs the extra 'analysis'.",
        epilog="example: python -m bench.reporting new.json --compare old.json --threshold 1.2",
    )
    parser.add_argument(
        "results",
        nargs="?",
        type=Path,
        metavar="RUN.json",
        help="the results file (default: the newest under bench/results)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: the results file's folder"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="write nothing, print the ratio of new to old for every benchmark",
    )
    parser.add_argument(
        "--threshold",
        type=_ratio,
        metavar="X",
        help="with --compare: exit with 1 if any takes more than X times as long as in OLD.json, "
        "or has no time any more",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.compare is None and options.threshold is not None:
        raise InputError(
            "--threshold says what is too slow in a comparison: add --compare OLD.json"
        )
    if options.compare is not None and options.output is not None:
        raise InputError("--compare prints and writes nothing: leave --output out")
    results = options.results or newest(RESULTS)
    if options.compare is None:
        for path in write_report(results, options.output):
            print(path)
        return
    comparison = compare(Run.load(options.compare), Run.load(results))
    print(comparison.markdown())
    if options.threshold is not None:
        require_within(comparison, options.threshold)


def _ratio(text: str) -> float:
    ratio = float(text)
    if not 0 < ratio < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, found {text}")
    return ratio


if __name__ == "__main__":
    sys.exit(main())
