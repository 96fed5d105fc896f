"""Settings of a run: which make sense, and what they come to."""

from __future__ import annotations

from typing import Any

import pytest

from cellpatch_fast import InputError
from cellpatch_fast.training import PretrainingSettings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be at least 1"),
        ("batch_size", 0, "batch_size must be at least 1"),
        ("learning_rate", 0.0, "learning_rate must be positive"),
        ("learning_rate", float("nan"), "learning_rate must be positive"),
        ("schedule", "linear", "schedule must be constant or cosine"),
        ("precision", "float16", "precision must be float32 or bfloat16"),
        ("optimizer", "sgd", "optimizer must be adam or adamw"),
        ("validation", 1.0, "validation must be at least 0 and below 1"),
        ("epochs", 2.5, r"epochs must be a whole number, found 2\.5"),
        ("batch_size", True, "batch_size must be a whole number, found True"),
        ("learning_rate", "fast", "learning_rate must be a number, found 'fast'"),
        ("compile", 1, "compile must be true or false, found 1"),
        ("hidden", 1.5, "hidden must lie between 0 and 1"),
        ("pace", 3, "unknown training settings: pace"),
    ],
)
def test_settings_that_make_no_sense_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PretrainingSettings.from_dict({field: value})


def test_learning_rates_of_schedules() -> None:
    settings = PretrainingSettings(learning_rate=3.0, schedule="cosine", warmup_steps=2)
    rates = [settings.rate(step, 6) for step in range(6)]
    assert rates == pytest.approx([1.5, 3.0, 3.0, 2.56066, 1.5, 0.43934])
    assert PretrainingSettings(learning_rate=3.0).rate(5, 6) == 3.0
