"""Two runs side by side: what became slower, what faster, and whether that is more than noise.

Records are compared by name. A benchmark that only one of the runs has is listed apart; one that
had a time and now runs out of memory, say, counts as slower than any threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

from cellpatch_fast.errors import InputError

from .findings import digits
from .results import Record, Run
from .tables import NOTHING, Table


@dataclass(frozen=True)
class Row:
    """One benchmark in both runs: medians in seconds, None where it has no time.

    Parameters
    ----------
    ratio
        New over old: above 1 is slower.
    overlap
        Whether the ranges from the 20th to the 80th percentile overlap.
    became
        The new status, unless it is measured.
    """

    name: str
    old: float | None
    new: float | None
    ratio: float | None = None
    overlap: bool | None = None
    became: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Parameters
    ----------
    rows
        Benchmarks that both runs have and one of them measured, the slowest first.
    only_old, only_new
        Names that one run alone has.
    warnings
        Why the runs should not be compared, a line each.
    """

    rows: list[Row]
    only_old: list[str]
    only_new: list[str]
    warnings: list[str]

    def markdown(self) -> str:
        """Warnings, the table, and what only one run has."""
        header = ["benchmark", "old, s", "new, s", "new / old", "20–80 % ranges"]
        table = Table("New against old, slowest first", header, list(map(_texts, self.rows)))
        apart = {"old": self.only_old, "new": self.only_new}
        return "\n\n".join(
            [
                *(f"Warning: {warning}" for warning in self.warnings),
                table.markdown() if self.rows else "No benchmark is in both runs.",
                *(f"Only in the {which}: {'; '.join(n)}." for which, n in apart.items() if n),
            ]
        )


def compare(old: Run, new: Run) -> Comparison:
    """Compare two runs, best of one device and dtype."""
    before = {record.name: record for record in old.records}
    after = {record.name: record for record in new.records}
    rows = [
        _row(record, after[name])
        for name, record in before.items()
        if name in after and (record.measured or after[name].measured)
    ]
    return Comparison(
        sorted(rows, key=_slowness, reverse=True),
        [name for name in before if name not in after],
        [name for name in after if name not in before],
        _warnings(old, new),
    )


def slower_than(comparison: Comparison, threshold: float) -> list[Row]:
    """Rows whose new median is more than ``threshold`` times the old one, or that lost theirs.

    What was skipped in the new run is not among them: a package was missing.
    """
    return [
        row
        for row in comparison.rows
        if (row.new is None and row.became != "skipped")
        or (row.ratio is not None and row.ratio > threshold)
    ]


def require_within(comparison: Comparison, threshold: float) -> None:
    """Raise an InputError that names what `slower_than` finds, if anything."""
    slower = slower_than(comparison, threshold)
    if slower:
        named = "; ".join(
            f"{row.name} ({row.became or f'{row.ratio:.2f} × the old time'})" for row in slower
        )
        raise InputError(
            f"{len(slower)} of {len(comparison.rows)} benchmarks are slower than {threshold:g} × "
            f"the old run's: {named}"
        )


def _row(old: Record, new: Record) -> Row:
    if old.seconds is None or new.seconds is None:
        before, after = (r.seconds.median if r.seconds else None for r in (old, new))
        return Row(new.name, before, after, became="" if new.measured else new.status)
    before, after = old.seconds.median, new.seconds.median
    overlap = old.seconds.p20 <= new.seconds.p80 and new.seconds.p20 <= old.seconds.p80
    return Row(new.name, before, after, after / before, overlap)


def _slowness(row: Row) -> float:
    if row.ratio is not None:
        return row.ratio
    return float("inf") if row.new is None else 0.0


def _warnings(old: Run, new: Run) -> list[str]:
    pairs = {
        "device": (old.device["name"], new.device["name"]),
        "dtype": (old.settings.get("dtype"), new.settings.get("dtype")),
    }
    return [
        f"the runs differ in their {what}, old {one}, new {other}: ratios are not the code's"
        for what, (one, other) in pairs.items()
        if one != other
    ]


def _texts(row: Row) -> list[str]:
    ratio = NOTHING if row.ratio is None else f"{row.ratio:.2f}"
    ranges = {None: NOTHING, True: "overlap", False: "apart"}[row.overlap]
    old, new = (NOTHING if value is None else digits(value) for value in (row.old, row.new))
    return [row.name, old, row.became or new, ratio, ranges]
