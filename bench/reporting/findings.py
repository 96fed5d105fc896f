"""What follows from a run's records: curves, ratios to ours, the linear fit, targets met or missed.

Nothing is said of what was not measured: a ratio, a fit or a verdict that lacks a number is None.
"Ours" is the first of our models that has a time.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .results import Record, Run

TARGET_GENES = 2_000  # of a cell, where ratios are stated
# How many times as fast as a peer ours is meant to be there, on a CPU.
TARGET_RATIOS = {"CellPatch, original": 20.0, "Geneformer V1": 100.0, "scGPT": 500.0}

UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Fit:
    """Seconds of one cell = fixed + per_gene × genes, by least squares."""

    fixed: float
    per_gene: float
    r_squared: float
    genes: tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """What was aimed for, what was found (in words) and whether that is enough."""

    name: str
    aim: str
    found: str
    met: bool | None = None  # None: not measured
    missed_by: str = ""

    @property
    def verdict(self) -> str:
        if self.met is None:
            return "not measured"
        return "met" if self.met else f"missed {self.missed_by}"


def compared(run: Run) -> list[str]:
    """Models with a point in the runtime group, measured or not; ours first."""
    tried = {record.details.get("model") for record in run.of("runtime")}
    named = [name for name in run.models if name in tried and curve(run, name)]
    return sorted(named, key=lambda name: not run.models[name]["ours"])


def curve(run: Run, model: str) -> dict[int, Record]:
    """The runtime records of a model by genes per cell, rising."""
    records = [record for record in run.of("runtime") if record.details.get("model") == model]
    points = {record.details["genes"]: record for record in records if "genes" in record.details}
    return dict(sorted(points.items()))


def genes_tried(run: Run) -> list[int]:
    """Numbers of genes per cell at which any model was tried, rising."""
    return sorted({genes for name in compared(run) for genes in curve(run, name)})


def ignored(run: Run, record: Record) -> int:
    """How many of a cell's genes a runtime record's model does not look at."""
    cap = run.models.get(record.details["model"], {}).get("cap")
    beyond = 0 if cap is None else max(0, record.details["genes"] - cap)
    return int(record.details.get("ignored") or beyond)


def median(run: Run, model: str, genes: int) -> float | None:
    """Seconds per 1,000 cells, where measured."""
    record = curve(run, model).get(genes)
    return record.seconds.median if record and record.seconds else None


def ours(run: Run) -> str | None:
    """Our model, where it has a time."""
    measured = {record.details["model"] for record in run.of("runtime", measured=True)}
    return next((name for name in compared(run) if _is_ours(run, name) and name in measured), None)


def peers(run: Run) -> list[str]:
    return [name for name in compared(run) if not _is_ours(run, name)]


def speed_up(run: Run, model: str, genes: int) -> float | None:
    """How many times as long as ours a model takes; both have to be measured there."""
    our_model = ours(run)
    if our_model is None:
        return None
    mine, other = median(run, our_model, genes), median(run, model, genes)
    return None if mine is None or other is None else other / mine


def ratio_genes(run: Run) -> list[int]:
    """Where ratios are shown: at `TARGET_GENES` and at the largest number that ours has."""
    tried = list(_times_of_ours(run))
    return [genes for genes in tried if genes in (TARGET_GENES, tried[-1])]


def linear_fit(run: Run) -> Fit | None:
    """Of ours; None with fewer than three numbers of genes, through which any line goes."""
    measured = _times_of_ours(run)
    if len(measured) < 3:
        return None
    genes, seconds = list(measured), [of_many / 1_000 for of_many in measured.values()]
    per_gene, fixed = statistics.linear_regression(genes, seconds)
    constant = min(seconds) == max(seconds)  # nothing to explain: the line explains it
    r_squared = 1.0 if constant else statistics.correlation(genes, seconds) ** 2
    return Fit(fixed, per_gene, r_squared, tuple(genes))


def _times_of_ours(run: Run) -> dict[int, float]:
    """Seconds per 1,000 cells by genes per cell."""
    our_model = ours(run)
    points = {} if our_model is None else curve(run, our_model)
    return {genes: record.seconds.median for genes, record in points.items() if record.seconds}


def targets(run: Run) -> list[Target]:
    """The targets that the run's groups are about; ratios to single peers are a CPU's."""
    results = [_faster_than_all(run)] if run.of("runtime") else []
    if run.of("runtime") and run.device["type"] == "cpu":
        results += [_times(run, name, aim) for name, aim in TARGET_RATIOS.items()]
    return results + [_start(record) for record in run.of("startup") if record.details.get("limit")]


def _faster_than_all(run: Run) -> Target:
    """Every measured point of a peer counts, also where it ignores genes."""
    ratios = [
        (ratio, name, genes)
        for name in peers(run)
        for genes in curve(run, name)
        if (ratio := speed_up(run, name, genes)) is not None
    ]
    name, aim = "faster than every peer at each number of genes", "more than 1 ×"
    if not ratios:
        return Target(name, aim, "–")
    least, peer, genes = min(ratios)
    tried = sum(len(curve(run, name)) for name in peers(run))
    comparison = (
        f"least {times(least)}: {peer}, {genes:,} genes ({len(ratios)} of {tried} points measured)"
    )
    return Target(name, aim, comparison, least > 1, f"by {percent(1 / least - 1)}")


def _times(run: Run, peer: str, aim: float) -> Target:
    ratio = speed_up(run, peer, TARGET_GENES)
    name = f"times as fast as {peer}, {TARGET_GENES:,} genes"
    if ratio is None:
        return Target(name, f"{aim:g} ×", "–")
    return Target(name, f"{aim:g} ×", times(ratio), ratio >= aim, f"by {percent(1 - ratio / aim)}")


def _start(record: Record) -> Target:
    limit, what = record.details["limit"], record.details["what"]
    if record.seconds is None:
        return Target(what, f"{limit:g} s", "–")
    taken = record.seconds.median
    missed = f"by {percent(taken / limit - 1)}"
    return Target(what, f"{limit:g} s", f"{digits(taken)} s", taken < limit, missed)


def digits(value: float) -> str:
    """Three of them at least, as people write them."""
    if value == 0:
        return "0"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if abs(value) >= 1e-4 else f"{value:.2e}"


def times(ratio: float) -> str:
    return f"{ratio:,.0f} ×" if ratio >= 9.95 else f"{ratio:.2g} ×"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "less than 1%"


def size(count: float) -> str:
    """Bytes in units of 1,000."""
    for unit in UNITS[:-1]:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1_000
    return f"{count:,.3g} {UNITS[-1]}"


def _is_ours(run: Run, name: str) -> bool:
    return bool(run.models[name]["ours"])
