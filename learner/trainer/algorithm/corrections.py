"""Off-policy corrections: importance weights of tokens or leaves that another policy sampled.

q is the policy that sampled, p the policy at the start of the batch ("proximal"). They differ by weight updates that came
in between and by the arithmetic of two engines. With ρ = π_p / π_q, never with a gradient, `train.correction` is

    none       1                                 the ratio of the loss is π_θ/π_q, which corrects already
    decoupled  ρ                                 2110.00641, 2505.24298
    tis        min(ρ, C)                         truncated importance sampling, 1802.01561
    icepop     ρ if low ≤ ρ ≤ high, else 0       2510.18855
    m2po       ρ, or 0 for the tokens of largest (log ρ)², until the mean of the others is ≤ τ   2510.01161

and the ratio of the loss is π_θ/π_p for all but the first, so that ρ enters once.

Which tokens m2po looks at is `train.m2po_tokens`. The paper (its Algorithm 1, and its authors' code) looks at those of the
trust region alone: A > 0 and ρ > 1, or A < 0 and ρ < 1. Any other it neither measures nor masks, like a clip that acts
where the ratio has moved the way the advantage pulls. AReaL measures and masks "all", whatever their advantage. A token
on a shared prefix is as many tokens of the trust region as leaves below it pull it the way it went, as it is on the paths.

Shapes: X what is weighed, action tokens (A of `targets`) or places (P); N all action tokens of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.trainer.algorithm.metric_sums import MetricSums
from learner.trainer.algorithm.targets import SIGNS, Targets
from treegrpo.config.train import TrainConfig


@dataclass(frozen=True, slots=True)
class CorrectionWeights:
    rho_X: Tensor
    """The weight in the loss."""
    capped_X: Tensor
    """bool: lowered to the cap."""
    masked_plus_X: Tensor
    """bool: left out where the advantage is positive."""
    masked_minus_X: Tensor
    """bool: left out where it is negative."""


def correction_weights(log_rho_X: Tensor, train: TrainConfig, m2po_limit: float = math.inf) -> CorrectionWeights:
    """The weights of ``train.correction``; for it and ``m2po_limit`` see the module's docstring."""
    log_rho_X = log_rho_X.detach()
    rho_X, no_X = log_rho_X.exp(), torch.zeros_like(log_rho_X, dtype=torch.bool)
    match train.correction:
        case "none":
            return CorrectionWeights(torch.ones_like(rho_X), no_X, no_X, no_X)
        case "decoupled":
            return CorrectionWeights(rho_X, no_X, no_X, no_X)
        case "tis":
            return CorrectionWeights(rho_X.clamp(max=train.tis_cap), rho_X > train.tis_cap, no_X, no_X)
        case "icepop":
            masked_X = (rho_X < train.icepop_low) | (rho_X > train.icepop_high)
        case "m2po":
            masked_X = log_rho_X.double().square() >= m2po_limit
    if train.correction == "m2po" and train.m2po_tokens == "trust_region":
        return CorrectionWeights(rho_X, no_X, masked_X & (log_rho_X > 0), masked_X & (log_rho_X < 0))
    return CorrectionWeights(rho_X.masked_fill(masked_X, 0), no_X, masked_X, masked_X)


def m2po_log_ratios(log_rho_A: Tensor, targets: Targets, train: TrainConfig) -> Tensor:
    """Log ρ of the tokens that m2po measures in a pack; over the packs of a batch each is there once, or once for each leaf."""
    if train.m2po_tokens == "all":
        return log_rho_A[targets.counted_A]
    log_rho_P = log_rho_A[targets.token_P]
    return log_rho_P[log_rho_P * targets.weight_P * targets.advantage_P > 0]


def m2po_limit(log_rho_N: Tensor, tau: float) -> float:
    """The (log ρ)² from which on tokens are dropped so that the mean of the others is ≤ ``tau``; inf: none is.

    Equal values are dropped together.
    """
    square_N = log_rho_N.double().square().sort().values
    mean_N = square_N.cumsum(0) / torch.arange(1, len(square_N) + 1, device=square_N.device)
    over = (mean_N > tau).nonzero()
    return square_N[over[0, 0]].item() if len(over) else math.inf


def mismatch_sums(proximal_A: Tensor, targets: Targets, *, at_start: bool = True) -> MetricSums:
    """The distance of p from q on the tokens that count.

    `actions` counts them. `kl_mismatch` sums the k3 estimate of KL(q ‖ p), ρ − 1 − log ρ with tokens drawn from q;
    `log_ratio_max` is the largest |log ρ|. `count/S`, `rho/S` and `square/S` are N, Σρ and Σρ² of each class S of
    `SIGNS`, for `effective_sample`. ρ is that of the token, before any cap or mask.

    `actions_lag0` and `kl_mismatch_lag0` are the same of the tokens that p itself has sampled, if ``proximal_A`` is the
    policy ``at_start`` of the batch. There no update lies between the two: what is left is how sampler and trainer compute.
    """
    log_rho_A = (proximal_A - targets.sampled_A).detach()[targets.counted_A].double()
    rho_A = log_rho_A.exp()
    figures_3A = torch.stack([torch.ones_like(rho_A), rho_A, rho_A.square()])
    sums_3S = figures_3A.new_zeros(3, len(SIGNS)).index_add(1, targets.sign_A[targets.counted_A], figures_3A)
    names = [f"{figure}/{sign}" for figure in ("count", "rho", "square") for sign in SIGNS]
    k3_A, fresh_A = rho_A - 1 - log_rho_A, targets.fresh_A[targets.counted_A] & at_start
    peak = torch.cat([log_rho_A.abs(), rho_A.new_zeros(1)]).max()
    totals = torch.stack([k3_A.sum(), k3_A[fresh_A].sum(), fresh_A.sum().double(), peak])
    kl, kl_lag0, actions_lag0, log_ratio_max = totals.tolist()
    sums = {"actions": float(len(rho_A)), "kl_mismatch": kl, "actions_lag0": actions_lag0, "kl_mismatch_lag0": kl_lag0}
    return MetricSums(sums | dict(zip(names, sums_3S.flatten().tolist(), strict=True)), {"log_ratio_max": log_ratio_max})


def effective_sample(sums: MetricSums, *signs: str) -> float:
    """(Σρ)² / (N·Σρ²) over the tokens of these classes of `SIGNS`: 1 when all weigh the same, and when there is none."""
    count, rho, square = (sum(sums[f"{name}/{sign}"] for sign in signs) for name in ("count", "rho", "square"))
    return rho**2 / (count * square) if count * square else 1.0
