"""The policy loss of Tree-GRPO, per action token, in a form that holds for tokens on a shared prefix.

With r = π_θ / π_sampler of the token and, over the leaves ℓ below it with advantage A_ℓ and weight w_ℓ,

    A⁺ = Σ w_ℓ·max(A_ℓ, 0)      A⁻ = Σ w_ℓ·min(A_ℓ, 0)      W = Σ w_ℓ

    loss = −( A⁺·min(r, 1 + ε_high) + A⁻·max(r, 1 − ε_low) ) + β·W·k3

which is Σ_ℓ w_ℓ·( −min(r·A_ℓ, clip(r, 1 − ε_low, 1 + ε_high)·A_ℓ) + β·k3 ), term by term. k3 is Schulman's estimate of
KL(π_θ ‖ π_reference): exp(d) − d − 1 with d = log π_reference − log π_θ; it is never negative.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Clip:
    low: float
    """ε_low: a ratio below 1 − ε_low no longer pushes down."""
    high: float
    """ε_high: a ratio above 1 + ε_high no longer pulls up."""


@dataclass(slots=True)
class Tally:
    """Sums over action tokens, to be divided by ``tokens``; those of several packs add up with ``+``."""

    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict[str, float])

    def __add__(self, other: Tally) -> Tally:
        names = self.sums.keys() | other.sums.keys()
        return Tally(self.tokens + other.tokens, {n: self.sums.get(n, 0.0) + other.sums.get(n, 0.0) for n in names})

    def mean(self, name: str) -> float:
        """The mean of a figure per action token; 0 when there was none."""
        return self.sums.get(name, 0.0) / max(self.tokens, 1)


def policy_loss(logprob_A: Tensor, sampled_A: Tensor, plus_A: Tensor, minus_A: Tensor, clip: Clip) -> tuple[Tensor, Tally]:
    """The clipped loss, summed over action tokens (the weights are in A⁺ and A⁻), and its tally.

    The tally has ``clip_low`` and ``clip_high`` (tokens whose gradient the clip stopped) and ``kl_mismatch``: k3 of
    KL(sampler ‖ trainer), near 0 when both compute the same probabilities with the same weights.
    """
    log_ratio_A = logprob_A - sampled_A
    ratio_A = log_ratio_A.exp()
    loss = -(plus_A * ratio_A.clamp(max=1 + clip.high) + minus_A * ratio_A.clamp(min=1 - clip.low)).sum()
    with torch.no_grad():
        sums = {
            "clip_low": ((ratio_A < 1 - clip.low) & (minus_A < 0)).sum().item(),
            "clip_high": ((ratio_A > 1 + clip.high) & (plus_A > 0)).sum().item(),
            "kl_mismatch": (ratio_A - 1 - log_ratio_A).sum().item(),
        }
    return loss, Tally(logprob_A.numel(), sums)


def reference_penalty(logprob_A: Tensor, reference_A: Tensor, weight_A: Tensor) -> tuple[Tensor, Tally]:
    """Σ W·k3 against the reference policy, to be multiplied by β, and the tally of ``kl_reference``, k3 unweighted."""
    k3_A = k3(logprob_A, reference_A)
    return (weight_A * k3_A).sum(), Tally(0, {"kl_reference": k3_A.sum().item()})


def k3(logprob_A: Tensor, reference_A: Tensor) -> Tensor:
    """exp(d) − d − 1 with d = reference − logprob: unbiased for tokens drawn from the policy, at least 0."""
    gap_A = reference_A - logprob_A
    return gap_A.expm1() - gap_A
