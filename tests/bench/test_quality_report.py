"""The report of quality sets what was measured against the best baseline and the targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def scores_of(accuracies: dict[str, list[float]]) -> dict[str, dict[int, Any]]:
    return {
        method: {
            split: {"accuracy": value, "macro F1": value - 0.1, "seconds": 3.0}
            for split, value in enumerate(values)
        }
        for method, values in accuracies.items()
    }


@pytest.fixture
def scores() -> dict[str, dict[int, Any]]:
    """Of five splits, and one of the pretrained model; both ways of ours differ by a constant."""
    from bench.quality_methods import BOTH, LINEAR, NETWORK

    first, second, third = LINEAR
    best = [0.80, 0.82, 0.84, 0.86, 0.88]
    return scores_of(
        {
            first: [0.7] * 5,
            second: best,
            third: [0.6] * 5,
            NETWORK: [value - 0.01 for value in best],
            BOTH: [value + 0.03 for value in best],
            "CellPatch, pretrained": [0.81],
        }
    )


def test_intervals_hold_the_median_and_one_split_has_none() -> None:
    from bench.quality_report import estimate

    values = np.random.default_rng(0).normal(0.9, 0.02, 25).tolist()
    found = estimate(values)
    assert found["median"] == np.median(values)
    assert min(values) < found["low"] < found["median"] < found["high"] < max(values)
    assert estimate(values) == found  # the same each time
    assert estimate([0.5]) == {"median": 0.5, "low": None, "high": None}


def test_differences_are_taken_split_by_split(scores: dict[str, dict[int, Any]]) -> None:
    from bench.quality_methods import BOTH, LINEAR
    from bench.quality_report import summarise

    summary = summarise(scores)
    assert set(summary["best linear"].values()) == {list(LINEAR)[1]}
    difference = summary["methods"][BOTH]["accuracy, difference"]
    assert list(difference.values()) == pytest.approx([0.03] * 3)  # splits differ, by as much
    assert summary["methods"][BOTH]["seconds"] == 3.0
    pretrained = summary["methods"]["CellPatch, pretrained"]
    assert pretrained["splits"] == 1
    assert pretrained["accuracy, difference"]["median"] == pytest.approx(0.01)


def test_targets_say_by_how_much(scores: dict[str, dict[int, Any]]) -> None:
    from bench.quality_methods import BOTH, LINEAR, NETWORK
    from bench.quality_report import summarise, target_table, targets

    summary = summarise(scores)
    found = targets({"pbmc3k_annotated": summary})
    assert [(entry["method"], entry["measure"]) for entry in found] == [
        (BOTH, "accuracy"),
        (NETWORK, "accuracy"),
        (BOTH, "macro F1"),
    ]
    interval = summary["methods"][list(LINEAR)[1]]["accuracy"]
    half = (interval["high"] - interval["low"]) / 2
    assert found[0]["aim"] == pytest.approx(0.84 - half)
    assert found[0]["margin"] == pytest.approx(0.87 - 0.84 + half)
    assert found[1]["margin"] == pytest.approx(0.83 - 0.91)
    table = target_table(found)
    assert f"met by {found[0]['margin']:.3f}" in table[3]
    assert "**missed** by 0.080" in table[4]


def test_figure_has_panels_for_all_and_writes_what_lies_far_below(
    scores: dict[str, dict[int, Any]],
) -> None:
    from bench.quality import annotation
    from bench.quality_figure import draw

    figure = draw(annotation({"pbmc3k_annotated": scores, "sc_mixology": scores}))
    assert len(figure.axes) == 4
    assert any("← 0.60" in text.get_text() for text in figure.axes[0].texts)


def test_kept_scores_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import quality
    from bench.quality_data import Split, read_datasets
    from bench.quality_methods import LINEAR, TOY

    (data,) = read_datasets(None)
    job = quality.Job(next(iter(LINEAR)), Split(data, 7))
    kept = {"accuracy": 0.5, "macro F1": 0.25, "seconds": 1.0}
    job.file(tmp_path).parent.mkdir(parents=True)
    job.file(tmp_path).write_text(json.dumps(kept))
    found = quality.measure_all([job], tmp_path, TOY, 1)
    assert found == {data.name: {job.method: {7: kept}}}


def test_scores_of_another_recipe_are_refused(tmp_path: Path) -> None:
    from bench.quality import require_same

    require_same({"cells": {"epochs": 3}}, tmp_path)
    require_same({"cells": {"epochs": 3}}, tmp_path)
    with pytest.raises(SystemExit, match="another recipe"):
        require_same({"cells": {"epochs": 4}}, tmp_path)
