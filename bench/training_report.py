"""What `bench.training_kernels` measured, as Markdown, and against what was aimed for.

As `bench.report`, whose functions it uses: it works on the results as they are in the JSON file,
and without a GPU nothing is said to be measured.
"""

from __future__ import annotations

from typing import Any

from bench.report import (
    Target,
    best,
    by_case,
    errors,
    heading,
    judge,
    measured,
    missing,
    number,
    ours,
    ratio,
    share,
    table,
    worst,
)

ROOFLINE_SHARE, TIMES_BASELINE, TIMES_ORIGINAL = 0.35, 2.0, 100.0
TIMES_ATOMICS = 1.5  # that deterministic gradients may take
TIMES_FLASH = 1.0  # speed over keys that are given


def over_keys(queries: int, backward: bool) -> str:
    """The name of what `ragged_cross_attention` is measured at."""
    return f"{queries} queries over given keys" + (", step" if backward else "")


def times_atomics(results: dict[str, Any], case: str) -> float | None:
    """Time of deterministic gradients over that of atomics."""
    step = "cross-attention, step"
    atomics = ours(results, step, case)
    rows = measured(results, step, case)
    ordered = best(row for row in rows if row["method"] == "ours, deterministic")
    return atomics and ordered and atomics["genes_per_second"] / ordered["genes_per_second"]


def keys_measured(results: dict[str, Any]) -> list[str]:
    """What was measured over given keys, in order."""
    names = dict.fromkeys(row["computes"] for row in results["rows"])
    return [name for name in names if "over given keys" in name]


def least(values: list[float | None]) -> float | None:
    """The least; None of none, and where one is not known."""
    measured_values = [value for value in values if value is not None]
    return min(measured_values) if values and len(measured_values) == len(values) else None


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, target, what was measured (None if it was not) and whether that is enough."""
    attention, encoder = "cross-attention, step", "encoder, step"
    entries: list[Target] = [
        (
            f"{attention}: share of the roofline, least of all lengths",
            ROOFLINE_SHARE,
            worst(lambda case: share(results, attention, case), min),
            True,
        ),
        (
            f"{attention}: times the best baseline, least of all lengths",
            TIMES_BASELINE,
            worst(lambda case: ratio(results, attention, case), min),
            True,
        ),
        (
            f"{attention}: time of deterministic gradients over atomics, largest of all lengths",
            TIMES_ATOMICS,
            worst(lambda case: times_atomics(results, case), max),
            False,
        ),
        (
            f"{encoder}: times the padded original, least of all lengths",
            TIMES_ORIGINAL,
            worst(lambda case: ratio(results, encoder, case), min),
            True,
        ),
    ]
    for name in keys_measured(results):
        cases = dict.fromkeys(row["case"] for row in results["rows"] if row["computes"] == name)
        least_ratio = least([ratio(results, name, case) for case in cases])
        entries.append(
            (f"{name}: times FlashAttention, least of all lengths", TIMES_FLASH, least_ratio, True)
        )
    return judge(results, entries)


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = heading(results)
    lines += by_case(results, "cross-attention, step")
    lines += by_case(results, "encoder, step", roofline=False)
    for name in keys_measured(results):
        lines += by_case(results, name, roofline=False)
    for part in (memory, errors, missing):
        lines += part(results)
    return "\n".join(lines)


def memory(results: dict[str, Any]) -> list[str]:
    """Bytes per gene that a step allocates at most, gradients included."""
    rows = [row for row in results["rows"] if row["extra_bytes"] is not None]
    if not rows:
        return ["", "Memory: not measured (it needs a GPU)."]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    taken = {
        (row["computes"], row["method"], row["form"], row["case"]): row["extra_bytes"]
        / row["genes"]
        for row in rows
    }
    names = dict.fromkeys(key[:3] for key in taken)
    body = [
        [", ".join(filter(None, name)), *(number(taken.get((*name, c)), ",.4g") for c in cases)]
        for name in names
    ]
    return table(["bytes per gene that a call allocates", *cases], body)
