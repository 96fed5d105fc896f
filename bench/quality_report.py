"""What the benchmark of quality found, as tables, and measured against what was aimed for.

Works on the results as they are in the JSON file, so that a report can be made again from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from bench.quality_methods import BOTH, LINEAR, NETWORK, Score
from bench.quality_pretraining import POOLS
from bench.report import number, table

MEASURES = ("accuracy", "macro F1")
CONFIDENCE, RESAMPLES = 0.95, 10_000
NETWORK_AIMS = {"pbmc3k_annotated": 0.91, "pbmc68k_reduced": 0.82, "sc_mixology": 0.98}
Scores = Mapping[str, Mapping[int, Score]]  # by method and split


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """The median over splits, and low and high of its bootstrap interval; None of one split."""
    low = high = None
    if len(values) > 1:
        resampled = bootstrap(
            (np.asarray(values),),
            np.median,
            axis=-1,
            confidence_level=CONFIDENCE,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(resampled.low), float(resampled.high)
    return {"median": statistics.median(values), "low": low, "high": high}


def best_linear(scores: Scores, measure: str) -> str:
    """The linear baseline with the highest median, on the test cells themselves.

    Choosing among them there is to their advantage, and to no other method's.
    """
    return max(LINEAR, key=lambda name: statistics.median(column(scores, name, measure).values()))


def column(scores: Scores, method: str, measure: str) -> dict[int, float]:
    return {split: score[measure] for split, score in scores[method].items()}


def summarise(scores: Scores) -> dict[str, Any]:
    """Estimates for one data set.

    Returns
    -------
    dict
        The best linear baseline by measure, and for every method the number of its splits, the
        median of its seconds, and by measure its estimate and that of its difference to the best
        linear baseline, split by split.
    """
    best = {measure: best_linear(scores, measure) for measure in MEASURES}
    methods = {}
    for method, by_split in scores.items():
        row: dict[str, Any] = {
            "splits": len(by_split),
            "seconds": statistics.median(column(scores, method, "seconds").values()),
        }
        for measure in MEASURES:
            other = column(scores, best[measure], measure)
            values = column(scores, method, measure)
            difference = [value - other[split] for split, value in values.items()]
            row[measure] = estimate(list(values.values()))
            row[f"{measure}, difference"] = estimate(difference)
        methods[method] = row
    return {"best linear": best, "methods": methods}


def targets(summaries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was aimed for on each data set, what was found, and by how much that is enough."""
    entries = []
    for data, summary in summaries.items():
        methods = summary["methods"]
        for measure in MEASURES:
            best = methods[summary["best linear"][measure]][measure]
            half = (best["high"] - best["low"]) / 2 if best["low"] is not None else 0.0
            aims = {"best linear - half its interval": (BOTH, best["median"] - half)}
            if measure == "accuracy" and data in NETWORK_AIMS:
                aims["fixed"] = (NETWORK, NETWORK_AIMS[data])
            for kind, (method, aim) in aims.items():
                value = methods[method][measure]["median"]
                entry = {"data": data, "method": method, "measure": measure, "kind": kind}
                entries.append(entry | {"aim": aim, "found": value, "margin": value - aim})
    return entries


def report(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {machine['jobs']} at a time with one thread each, torch "
        f"{machine['torch']}, {results['date']}"
    ]
    if results["toy"]:
        lines += ["", "**Toy sizes: this shows that everything runs and says nothing of quality.**"]
    parts: dict[str, Callable[[Any], list[str]]] = {
        "annotation": annotation_tables,
        "pretraining": pretraining_table,
        "curves": curves_table,
    }
    for name, write in parts.items():
        if results.get(name):
            lines += write(results[name])
    return "\n".join(lines)


def annotation_tables(results: Mapping[str, Any]) -> list[str]:
    """Targets, then a table for each data set."""
    lines = target_table(results["targets"])
    for name, summary in results["summaries"].items():
        rows = [method_row(method, row, summary) for method, row in summary["methods"].items()]
        header = [name, "splits"]
        header += [text for measure in MEASURES for text in (measure, "to best linear")]
        lines += table([*header, "CPU s"], rows)
    return [
        *lines,
        "",
        f"Medians over splits, with {CONFIDENCE:.0%} bootstrap intervals of the median. Splits "
        "are of the same cells, so intervals say how much the choice of cells decides, not how "
        "other data would fare. Bold: the best linear baseline, by its median on the test cells, "
        "which favours the baselines; differences to it are taken split by split. CPU s: of "
        "fitting and predicting.",
    ]


def method_row(method: str, row: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    cells = [method, str(row["splits"])]
    for measure in MEASURES:
        is_best = summary["best linear"][measure] == method
        text = interval(row[measure])
        difference = "" if is_best else interval(row[f"{measure}, difference"], "+.3f")
        cells += [f"**{text}**" if is_best else text, difference]
    return [*cells, f"{row['seconds']:,.1f}"]


def interval(estimated: Mapping[str, float | None], digits: str = ".3f") -> str:
    text = number(estimated["median"], digits)
    if estimated["low"] is None:
        return text
    return f"{text} ({number(estimated['low'], digits)} to {number(estimated['high'], digits)})"


def target_table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [
            f"{entry['data']}: {entry['method']}, {entry['measure']}",
            f"{entry['aim']:.3f} ({entry['kind']})",
            f"{entry['found']:.3f}",
            f"{'met' if entry['margin'] >= 0 else '**missed**'} by {abs(entry['margin']):.3f}",
        ]
        for entry in entries
    ]
    return table(["target", "at least", "found", ""], rows)


def pretraining_table(scores_of: Mapping[str, Sequence[Score]]) -> list[str]:
    """Medians over splits of what pretraining alone came to."""

    def median(scores: Sequence[Score], *keys: str) -> str:
        values: list[Any] = list(scores)
        for key in keys:
            values = [value[key] for value in values]
        return f"{statistics.median(values):.3f}"

    models = ("random", "started", "pretrained")
    rows = [
        [
            name,
            str(len(scores)),
            *(median(scores, "reconstruction", kind) for kind in ("error of means", "error")),
            *(median(scores, "neighbours", m, pool) for pool in POOLS for m in models),
        ]
        for name, scores in scores_of.items()
    ]
    header = ["pretraining", "splits", "error of means", "error"]
    return table(header + [f"neighbours, {pool}, {m}" for pool in POOLS for m in models], rows)


def curves_table(kinds: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = [
        [name, *(f"{estimates[name]:,.3g}" for estimates in kinds.values())]
        for name in next(iter(kinds.values()))
    ]
    return table(["loss curves", *kinds], rows)
