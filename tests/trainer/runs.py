"""A trainer in this process, against the small intake."""

from __future__ import annotations

import threading
from typing import Any

from learner.trainer.intake_client import Link
from learner.trainer.loop import Trainer
from tests.trainer.intake import FakeIntake
from treegrpo.config.schema import Config
from treegrpo.net.local_socket import socket_path
from treegrpo.observability.metrics import TrainerMetrics


def intake_for(config: Config, **options: Any) -> FakeIntake:
    return FakeIntake(socket_path(config.run.dir), **options)


def train(
    config: Config, stop: threading.Event | None = None, metrics: TrainerMetrics | None = None, *, away: float = 1.0
) -> Trainer:
    """Run a trainer against the intake that serves ``config`` to its end."""
    link = Link.open(socket_path(config.run.dir), stop or threading.Event(), seconds=1.0, away=away)
    try:
        trainer = Trainer(config, link, metrics or TrainerMetrics())
        trainer.run()
    finally:
        link.close()
    return trainer


def changed(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
