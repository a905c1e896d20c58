"""What a step says of itself: one flat record for the run's progress file, and the same on /metrics."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from learner.trainer.advantages import has_signal
from learner.trainer.checkpoint import Progress
from learner.trainer.episodes import Episodes, mixed_siblings, version_lag
from learner.trainer.update import Update
from treegrpo.telemetry import TrainerMetrics
from treegrpo.tree import Group, PolicyVersion


class Phases:
    """Seconds of one step by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Generator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def step_values(
    after: Progress, groups: Sequence[Group], batch: Sequence[Episodes], update: Update, phases: Phases
) -> dict[str, Any]:
    """The record of the step that led to ``after``; shares are over the step's groups or its usable leaves."""
    leaves = [leaf for one in batch for leaf in one.leaves]
    rewards = np.array([leaf.reward for leaf in leaves] or [0.0])
    lag_mean, lag_max = version_lag(groups, PolicyVersion(after.lineage, after.step - 1))
    return {
        "step": after.step,
        "version": str(after.version),
        "position": after.position,
        "groups": len(groups),
        "groups_without_leaf": len(groups) - len(batch),
        "leaves": len(leaves),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "em": float(np.mean([leaf.metrics.get("em", 0.0) for leaf in leaves] or [0.0])),
        "zero_signal_ratio": sum(not has_signal(one.rewards) for one in batch) / max(len(batch), 1),
        "outcome": update.outcome,
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "kl_reference": update.tally.mean("kl_reference"),
        "kl_mismatch": update.tally.mean("kl_mismatch"),
        "entropy": update.tally.mean("entropy"),
        "clip_low_ratio": update.tally.mean("clip_low"),
        "clip_high_ratio": update.tally.mean("clip_high"),
        "lag_mean": lag_mean,
        "lag_max": lag_max,
        "mixed_siblings_ratio": mixed_siblings(groups),
        "tokens": update.tokens,
        "seconds": dict(phases.seconds),
        "waiting_seconds": phases.seconds.get("wait", 0.0),
    }


def show(metrics: TrainerMetrics, values: dict[str, Any]) -> None:
    """Put the record of a step on /metrics."""
    gauges = {
        "step": metrics.step,
        "reward_mean": metrics.reward,
        "reward_std": metrics.reward_std,
        "loss": metrics.loss,
        "kl_reference": metrics.kl,
        "kl_mismatch": metrics.mismatch,
        "entropy": metrics.entropy,
        "clip_low_ratio": metrics.clip.labels("low"),
        "clip_high_ratio": metrics.clip.labels("high"),
        "grad_norm": metrics.grad_norm,
        "lr": metrics.lr,
        "lag_mean": metrics.lag_mean,
        "lag_max": metrics.lag_max,
        "mixed_siblings_ratio": metrics.mixed,
        "zero_signal_ratio": metrics.zero_signal,
    }
    for name, gauge in gauges.items():
        gauge.set(values[name])
    if values["outcome"] != "applied":
        metrics.skipped.labels(values["outcome"]).inc()
    metrics.trained_tokens.inc(values["tokens"])
    for phase, seconds in values["seconds"].items():
        metrics.phase.labels(phase).observe(seconds)
