"""Builders of targets, explicit or random, in float64 so that formulas can be compared to the last digits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.trainer.algorithm.targets import SIGNS, Targets


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def lone(sampled: Sequence[float], advantages: Sequence[float], weight: float = 1.0) -> Targets:
    """One leaf whose path has these tokens, each with its own advantage."""
    return places(sampled, [[(token, advantage) for token, advantage in enumerate(advantages)]], [weight])


def places(sampled: Sequence[float], leaves: Sequence[Sequence[tuple[int, float]]], weights: Sequence[float]) -> Targets:
    """Leaves as lists of (token, advantage) along their paths, with a weight each."""
    flat = [(token, leaf, advantage) for leaf, path in enumerate(leaves) for token, advantage in path]
    return Targets(
        label_A=torch.zeros(len(sampled), dtype=torch.int64),
        sampled_A=float64(*sampled),
        counted_A=torch.ones(len(sampled), dtype=torch.bool),
        fresh_A=torch.ones(len(sampled), dtype=torch.bool),
        sign_A=torch.zeros(len(sampled), dtype=torch.int64),
        token_P=torch.tensor([token for token, _, _ in flat], dtype=torch.int64),
        leaf_P=torch.tensor([leaf for _, leaf, _ in flat], dtype=torch.int64),
        advantage_P=float64(*(advantage for _, _, advantage in flat)),
        weight_P=float64(*(weights[leaf] for _, leaf, _ in flat)),
        leaves=len(leaves),
    )


def random_targets(rng: torch.Generator, *, node_level: bool) -> Targets:
    """Up to 5 leaves that share some of 12 tokens; advantages of both signs, one per leaf or one per place."""
    count = int(torch.randint(1, 6, (), generator=rng))
    leaves: list[list[tuple[int, float]]] = []
    for _ in range(count):
        path = (torch.rand(12, generator=rng) < 0.6).nonzero()[:, 0].tolist() or [0]
        of_leaf = torch.randn((), generator=rng).item()
        leaves.append([(token, torch.randn((), generator=rng).item() if node_level else of_leaf) for token in path])
    sampled = (torch.randn(12, generator=rng, dtype=torch.float64) / 2 - 2).clamp(max=-0.1)
    made = places(sampled.tolist(), leaves, torch.rand(count, generator=rng).tolist())
    made.sign_A[:] = torch.randint(0, len(SIGNS), (12,), generator=rng)
    made.counted_A[:] = torch.rand(12, generator=rng) < 0.8
    return made


def near(rng: torch.Generator, logprob_A: Tensor, spread: float) -> Tensor:
    """Log-probabilities that lie about ``spread`` from these."""
    return (logprob_A + spread * torch.randn(len(logprob_A), generator=rng, dtype=torch.float64)).clamp(max=-1e-3)
