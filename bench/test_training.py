"""Group "training": a pretraining and a fine-tuning step, ours and the padded original's."""

from __future__ import annotations

from bench.session import Session
from bench.training_runs import measure_training


def test_training(session: Session) -> None:
    for record in measure_training(session.options):
        session.add(record)
