"""The command of ``cellpatch`` that reads what `pytest bench` wrote."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from .commands import Commands
from .errors import InputError

RESULTS = Path("bench/results")


def add_bench_report(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench-report",
        help="tables, figures and a page of a run of 'pytest bench'",
        description="Write Markdown tables, figures (PNG and SVG) and one self-contained HTML "
        "page of a results file of 'pytest bench', beside it. Or, with --compare, print how it "
        "differs from an older one. Needs the extra 'analysis'.",
        epilog="example: cellpatch bench-report new.json --compare old.json --threshold 1.2",
    )
    parser.add_argument(
        "results",
        nargs="?",
        type=Path,
        metavar="RUN.json",
        help=f"the results file (default: the newest under {RESULTS})",
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
    parser.set_defaults(
        run=_bench_report, after_interruption="The same command writes the report anew."
    )


def _bench_report(parsed: argparse.Namespace) -> None:
    from .benchmarks.report import write_report
    from .benchmarks.results import newest

    if parsed.compare is None and parsed.threshold is not None:
        raise InputError(
            "--threshold says what is too slow in a comparison: add --compare OLD.json"
        )
    if parsed.compare is not None and parsed.output is not None:
        raise InputError("--compare prints and writes nothing: leave --output out")
    results = parsed.results or newest(RESULTS)
    if parsed.compare is not None:
        _compare(parsed.compare, results, parsed.threshold)
        return
    for path in write_report(results, parsed.output):
        print(path)


def _compare(old: Path, new: Path, threshold: float | None) -> None:
    from .benchmarks.compare import compare, require_within
    from .benchmarks.results import Run

    comparison = compare(Run.load(old), Run.load(new))
    print(comparison.markdown())
    if threshold is not None:
        require_within(comparison, threshold)


def _ratio(text: str) -> float:
    ratio = float(text)
    if not 0 < ratio < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, found {text}")
    return ratio
