"""What a step says of itself: one flat record for the run's progress file, and the same on /metrics."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from learner.trainer.advantages import has_signal
from learner.trainer.checkpoint import Progress
from learner.trainer.corrections import effective_sample
from learner.trainer.episodes import Episodes, mixed_siblings, version_lag
from learner.trainer.targets import SIGNS
from learner.trainer.update import Update
from treegrpo.telemetry import TrainerMetrics
from treegrpo.tree import Group, PolicyVersion

SPLIT = SIGNS[1:]
"""The classes of tokens where inter-tree and intra-tree advantage both say something."""


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
        "group_ids": [group.id for group in groups],
        "groups_without_leaf": len(groups) - len(batch),
        "leaves": len(leaves),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "em": float(np.mean([leaf.metrics.get("em", 0.0) for leaf in leaves] or [0.0])),
        "zero_signal_ratio": sum(not has_signal(one.rewards) for one in batch) / max(len(batch), 1),
        **update_values(update),
        "lag_mean": lag_mean,
        "lag_max": lag_max,
        "mixed_siblings_ratio": mixed_siblings(groups),
        "seconds": dict(phases.seconds),
        "waiting_seconds": phases.seconds.get("wait", 0.0),
    }


def update_values(update: Update) -> dict[str, Any]:
    """What the optimiser steps did: means per action token, shares of the loss's terms."""
    tally = update.tally
    return {
        "outcomes": list(update.outcomes),
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "tokens": int(tally["tokens"]),
        "token_ratio": tally.per("path_tokens", "tokens"),
        "log_ratio_max": tally.peak("log_ratio_max"),
        "effective_sample_ratio": effective_sample(tally, *SIGNS),
        **{f"effective_sample_{sign}_ratio": effective_sample(tally, sign) for sign in SPLIT},
        **{name: tally.per(name, "actions") for name in ("kl_mismatch", "kl_reference", "entropy")},
        **{f"{name}_ratio": tally.per(name, "terms") for name in ("clip_low", "clip_high", "clip_dual", "capped", "masked")},
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
        "token_ratio": metrics.token_ratio,
        "log_ratio_max": metrics.log_ratio,
        "effective_sample_ratio": metrics.effective.labels("all"),
        **{f"effective_sample_{sign}_ratio": metrics.effective.labels(sign) for sign in SPLIT},
        "entropy": metrics.entropy,
        **{f"clip_{side}_ratio": metrics.clip.labels(side) for side in ("low", "high", "dual")},
        **{f"{how}_ratio": metrics.corrected.labels(how) for how in ("capped", "masked")},
        "grad_norm": metrics.grad_norm,
        "lr": metrics.lr,
        "lag_mean": metrics.lag_mean,
        "lag_max": metrics.lag_max,
        "mixed_siblings_ratio": metrics.mixed,
        "zero_signal_ratio": metrics.zero_signal,
    }
    for name, gauge in gauges.items():
        gauge.set(values[name])
    for outcome in values["outcomes"]:
        if outcome != "applied":
            metrics.skipped.labels(outcome).inc()
    metrics.trained_tokens.inc(values["tokens"])
    for phase, seconds in values["seconds"].items():
        metrics.phase.labels(phase).observe(seconds)
