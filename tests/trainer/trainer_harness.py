"""Runs a trainer in this process against the fake intake."""

from __future__ import annotations

import threading
from typing import Any

from learner.trainer.intake_client import IntakeClient, IntakeRetries
from learner.trainer.loop import Trainer
from tests.trainer.fake_intake import FakeIntake
from treegrpo.config.schema import Config
from treegrpo.net.local_socket import socket_path
from treegrpo.observability.metrics import TrainerMetrics
from treegrpo.timing.backoff import Backoff


def intake_for(config: Config, **options: Any) -> FakeIntake:
    return FakeIntake(socket_path(config.run.dir), **options)


def train(
    config: Config, stop: threading.Event | None = None, metrics: TrainerMetrics | None = None, *, outage_seconds: float = 1.0
) -> Trainer:
    """Run a trainer against the intake that serves ``config`` to its end."""
    retries = IntakeRetries(Backoff((0.1,), seconds=1.0), Backoff.exponential(0.1, 5.0, seconds=outage_seconds))
    with IntakeClient.connect(socket_path(config.run.dir), stop or threading.Event(), retries=retries) as intake:
        trainer = Trainer(config, intake, metrics or TrainerMetrics())
        trainer.train()
    return trainer


def changed(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
