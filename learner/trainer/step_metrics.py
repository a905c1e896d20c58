"""Step metrics: one flat record for the run's progress file, and the same figures on /metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import numpy as np

from learner.trainer.algorithm.advantages import has_signal
from learner.trainer.algorithm.corrections import effective_sample
from learner.trainer.algorithm.credit_assignment import UsableGroup, mixed_siblings_share, version_lag
from learner.trainer.algorithm.targets import SIGNS
from learner.trainer.optimizer_steps import Update
from learner.trainer.persistence.checkpoint import TrainingProgress
from treegrpo.core.step import PolicyVersion
from treegrpo.core.tree import Group
from treegrpo.observability.metrics import MISMATCH_LIMIT, TrainerMetrics

log = logging.getLogger(__name__)
MISMATCH_MESSAGE = (
    "Sampler and trainer compute two policies: KL(sampler ‖ trainer) is {:.2g} nats per token at version lag 0, where it "
    f"should be below {MISMATCH_LIMIT}; see docs/operations.md, MismatchAtLagZero."
)
SPLIT = SIGNS[1:]
"""The classes of tokens where inter-tree and intra-tree advantage are both not 0."""


class PhaseTimer:
    """Measures the seconds of one step by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Generator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def step_record(
    after: TrainingProgress, groups: Sequence[Group], batch: Sequence[UsableGroup], update: Update, phases: PhaseTimer
) -> dict[str, Any]:
    """The record of the step that led to ``after``; shares are over the step's groups or its usable leaves.

    A figure of which nothing was measured, or that is not finite, is not in it.
    """
    values = {
        "step": after.step,
        "version": str(after.version),
        "position": after.position,
        "groups": len(groups),
        "group_ids": [group.id for group in groups],
        "groups_without_leaf": len(groups) - len(batch),
        "leaves": sum(len(one.leaves) for one in batch),
        **(_leaf_values(batch) if batch else {}),
        **_update_values(update),
        **(_version_values(groups, PolicyVersion(after.lineage, after.step - 1)) if groups else {}),
        "seconds": dict(phases.seconds),
        "waiting_seconds": phases.seconds.get("wait", 0.0),
    }
    return {name: value for name, value in values.items() if _is_known(value)}


def _is_known(value: object) -> bool:
    return isfinite(value) if isinstance(value, float) else value is not None


def _leaf_values(batch: Sequence[UsableGroup]) -> dict[str, Any]:
    """Rewards of the leaves, of which there is at least one."""
    leaves = [leaf for one in batch for leaf in one.leaves]
    rewards = np.array([leaf.reward for leaf in leaves])
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "em": float(np.mean([leaf.metrics.get("em", 0.0) for leaf in leaves])),
        "zero_signal_ratio": sum(not has_signal(one.rewards) for one in batch) / len(batch),
    }


def _version_values(groups: Sequence[Group], now: PolicyVersion) -> dict[str, Any]:
    lag_mean, lag_max = version_lag(groups, now)
    return {"lag_mean": lag_mean, "lag_max": lag_max, "mixed_siblings_ratio": mixed_siblings_share(groups)}


def _update_values(update: Update) -> dict[str, Any]:
    """Figures of the optimiser steps: means per action token, shares of the loss's terms; None where undefined."""
    sums = update.sums

    def per(name: str, of: str) -> float | None:
        return sums.ratio(name, of) if name in sums.totals and sums[of] else None

    def effective(*signs: str) -> float | None:
        return effective_sample(sums, *signs) if any(sums[f"count/{sign}"] for sign in signs) else None

    return {
        "outcomes": list(update.outcomes),
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "tokens": int(sums["tokens"]),
        "token_ratio": per("path_tokens", "tokens"),
        "log_ratio_max": sums.maximum("log_ratio_max") if sums["actions"] else None,
        "effective_sample_ratio": effective(*SIGNS),
        **{f"effective_sample_{sign}_ratio": effective(sign) for sign in SPLIT},
        **{name: per(name, "actions") for name in ("kl_mismatch", "kl_reference", "entropy")},
        "kl_mismatch_lag0": per("kl_mismatch_lag0", "actions_lag0"),
        **{f"{name}_ratio": per(name, "terms") for name in ("clip_low", "clip_high", "clip_dual", "capped", "masked")},
    }


class MismatchMonitor:
    """Logs when log-probabilities of sampler and trainer begin to differ, and when they agree again."""

    def __init__(self) -> None:
        self._above = False

    def check_mismatch(self, values: dict[str, Any]) -> None:
        """``values`` is the record of a step; one without a token at lag 0 changes nothing."""
        found = values.get("kl_mismatch_lag0")
        if found is None or (found > MISMATCH_LIMIT) == self._above:
            return
        self._above = not self._above
        if self._above:
            log.error("%s", MISMATCH_MESSAGE.format(found))
        else:
            log.info("sampler and trainer agree again at lag 0: %.2g nats per token", found)


def export_step(metrics: TrainerMetrics, values: dict[str, Any]) -> None:
    """Export the record of a step to /metrics; a metric that is not in it keeps its value."""
    gauges = {
        "step": metrics.step,
        "reward_mean": metrics.reward,
        "reward_std": metrics.reward_std,
        "loss": metrics.loss,
        "kl_reference": metrics.kl,
        "kl_mismatch": metrics.mismatch,
        "kl_mismatch_lag0": metrics.mismatch_lag0,
        "token_ratio": metrics.token_ratio,
        "log_ratio_max": metrics.log_ratio,
        "entropy": metrics.entropy,
        "grad_norm": metrics.grad_norm,
        "lr": metrics.lr,
        "lag_mean": metrics.lag_mean,
        "lag_max": metrics.lag_max,
        "mixed_siblings_ratio": metrics.mixed,
        "zero_signal_ratio": metrics.zero_signal,
    }
    labelled = {
        "effective_sample_ratio": (metrics.effective, "all"),
        **{f"effective_sample_{sign}_ratio": (metrics.effective, sign) for sign in SPLIT},
        **{f"clip_{side}_ratio": (metrics.clip, side) for side in ("low", "high", "dual")},
        **{f"{how}_ratio": (metrics.corrected, how) for how in ("capped", "masked")},
    }
    for name in gauges.keys() & values.keys():
        gauges[name].set(values[name])
    for name in labelled.keys() & values.keys():
        gauge, label = labelled[name]
        gauge.labels(label).set(values[name])
    for outcome in values["outcomes"]:
        if outcome != "applied":
            metrics.skipped.labels(outcome).inc()
    metrics.trained_tokens.inc(values["tokens"])
    for phase, seconds in values["seconds"].items():
        metrics.phase.labels(phase).observe(seconds)
