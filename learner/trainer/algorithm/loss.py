"""The policy losses, in a form that holds for tokens on a shared prefix.

θ is the policy now, p that at the start of the batch, q the one that sampled; r = π_θ/π_q without a correction, else
π_θ/π_p; ρ is the weight of `corrections`. Over the leaves ℓ below a token, with advantage A_ℓ and weight w_ℓ,

    A⁺ = Σ w_ℓ·max(A_ℓ, 0)      A⁻ = Σ w_ℓ·min(A_ℓ, 0)      W = Σ w_ℓ

and `train.loss` sums over action tokens

    ppo    −ρ·( A⁺·min(r, 1 + ε_high) + A⁻·min(c, max(r, 1 − ε_low)) )        1707.06347; dual clip c: 1912.09729
    cispo  −ρ·sg(clip(r, 1 − ε_low, 1 + ε_high))·(A⁺ + A⁻)·log π_θ            2506.13585
    dppo   −ρ·r·( A⁺·[π_θ − π_q ≤ δ] + A⁻·[π_q − π_θ ≤ δ] )                   2602.04879, total variation

each of which is Σ_ℓ w_ℓ·(the loss of the paper with A_ℓ), term by term. In dppo an r above C = `train.dppo_cap` is
sg(C/r)·r: its gradient is C·∇log π_θ, not nothing. The cap is verl's, 20, and that of the authors' code, 10 unless set; the
formula of their paper has none.

The ratio of a whole leaf is no figure of a token: gspo (2507.18071, its token form) is ppo's sum over the places of tokens
on paths, with

    r_{ℓ,t} = sg(s_ℓ)·π_θ(t)/sg(π_θ(t))       s_ℓ = exp( mean of log r over the action tokens of ℓ )

and ρ_ℓ the same mean of log ρ. sg stops the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.trainer.algorithm.corrections import correction_weights
from learner.trainer.algorithm.metric_sums import MetricSums
from learner.trainer.algorithm.targets import Targets
from treegrpo.config.train import KlEstimator, Loss, TrainConfig


@dataclass(frozen=True, slots=True)
class _Terms:
    """The terms that the loss sums over: action tokens (A), or their places (P)."""

    log_ratio_X: Tensor
    """log r, with the gradient."""
    log_rho_X: Tensor
    plus_X: Tensor
    minus_X: Tensor
    logprob_X: Tensor
    """log π_θ, with the gradient."""
    sampled_X: Tensor
    counted_X: Tensor

    @property
    def credited_X(self) -> Tensor:
        """bool: has a part in the loss."""
        return (self.plus_X != 0) | (self.minus_X != 0)


@dataclass(frozen=True, slots=True)
class _Gain:
    """The objective before ρ, and where the trust region acted: bool per term."""

    gain_X: Tensor
    low_X: Tensor
    high_X: Tensor
    dual_X: Tensor


def policy_loss(
    logprob_A: Tensor, proximal_A: Tensor, targets: Targets, train: TrainConfig, m2po_limit: float = math.inf
) -> tuple[Tensor, MetricSums]:
    """The loss of one pack, a sum (the weights are in w), and the metric sums of trust region and correction.

    They count `terms` (tokens, or for gspo places) and those of them that are `clip_low` (no longer pushed down),
    `clip_high` (no longer pulled up), `clip_dual` (held by the dual clip or the cap of dppo), `capped` and `masked` (by the
    correction).

    Args:
        logprob_A: log π_θ, with the gradient.
        proximal_A: log π_p; not used without a correction.
        targets: sampled tokens, advantages and weights.
        train: `loss` and `correction` with their keys.
        m2po_limit: that of the whole batch, from `corrections.m2po_limit`.
    """
    anchor_A = targets.sampled_A if train.correction == "none" else proximal_A
    make = _per_place if train.loss == "gspo" else _per_token
    terms = make(logprob_A, logprob_A - anchor_A, proximal_A - targets.sampled_A, targets)
    weights = correction_weights(terms.log_rho_X, train, m2po_limit)
    masked_X = (weights.masked_plus_X & (terms.plus_X > 0)) | (weights.masked_minus_X & (terms.minus_X < 0))
    terms = replace(
        terms,
        plus_X=terms.plus_X.masked_fill(weights.masked_plus_X, 0),
        minus_X=terms.minus_X.masked_fill(weights.masked_minus_X, 0),
    )
    gain = GAINS[train.loss](terms, train)
    figures = {
        "terms": torch.ones_like(gain.low_X),
        "clip_low": gain.low_X,
        "clip_high": gain.high_X,
        "clip_dual": gain.dual_X,
        "capped": weights.capped_X,
        "masked": masked_X,
    }
    rho_X = weights.rho_X.masked_fill(~terms.credited_X, 0)  # nothing stays nothing where ρ overflows
    return -(rho_X * gain.gain_X).sum(), MetricSums.sum_counted(terms.counted_X, figures)


def reference_penalty(
    logprob_A: Tensor, reference_A: Tensor, targets: Targets, estimator: KlEstimator
) -> tuple[Tensor, MetricSums]:
    """Σ W·k against the reference policy, to be multiplied by β, and the sum of k3 unweighted as `kl_reference`."""
    k3_A = kl(logprob_A, reference_A, "k3")
    k_A = k3_A if estimator == "k3" else kl(logprob_A, reference_A, estimator)
    return (targets.weight_A * k_A).sum(), MetricSums.sum_counted(targets.counted_A, {"kl_reference": k3_A})


def kl(logprob_A: Tensor, reference_A: Tensor, estimator: KlEstimator) -> Tensor:
    """Schulman's estimators of KL(π_θ ‖ π_reference) from tokens drawn from π_θ, with d = reference − logprob.

    k1 = −d is unbiased; k2 = d²/2 is biased, but its gradient is not; k3 = exp(d) − 1 − d is unbiased and at least 0.
    The gradient of k1 has mean 0 where the tokens are drawn from π_θ: it shows the distance without holding it.
    """
    gap_A = reference_A - logprob_A
    match estimator:
        case "k1":
            return -gap_A
        case "k2":
            return gap_A.square() / 2
        case "k3":
            return gap_A.expm1() - gap_A


def entropy_bonus(entropy_A: Tensor, targets: Targets) -> tuple[Tensor, MetricSums]:
    """Σ W·H, to be multiplied by `train.entropy_coef` and taken off the loss, and the sum of H unweighted as `entropy`."""
    return (targets.weight_A * entropy_A).sum(), MetricSums.sum_counted(targets.counted_A, {"entropy": entropy_A})


def _per_token(logprob_A: Tensor, log_ratio_A: Tensor, log_rho_A: Tensor, targets: Targets) -> _Terms:
    plus_A, minus_A = targets.plus_A, targets.minus_A
    return _Terms(log_ratio_A, log_rho_A, plus_A, minus_A, logprob_A, targets.sampled_A, targets.counted_A)


def _per_place(logprob_A: Tensor, log_ratio_A: Tensor, log_rho_A: Tensor, targets: Targets) -> _Terms:
    """Every leaf lies whole in one pack, so every place counts."""
    token_P, credit_P = targets.token_P, targets.weight_P * targets.advantage_P
    log_s_P = _mean_over_leaf(log_ratio_A.detach(), targets)
    logprob_P = logprob_A[token_P]
    return _Terms(
        log_ratio_X=log_s_P + (logprob_P - logprob_P.detach()),
        log_rho_X=_mean_over_leaf(log_rho_A.detach(), targets),
        plus_X=credit_P.clamp(min=0),
        minus_X=credit_P.clamp(max=0),
        logprob_X=logprob_P,
        sampled_X=targets.sampled_A[token_P],
        counted_X=torch.ones_like(token_P, dtype=torch.bool),
    )


def _mean_over_leaf(values_A: Tensor, targets: Targets) -> Tensor:
    """For every place the mean over the action tokens of its leaf."""
    sums_L = values_A.new_zeros(targets.leaves).index_add(0, targets.leaf_P, values_A[targets.token_P])
    count_L = torch.bincount(targets.leaf_P, minlength=targets.leaves)
    return (sums_L / count_L)[targets.leaf_P]


def _clipped(terms: _Terms, train: TrainConfig) -> _Gain:
    """The bounds act on log r, each side by itself: a ratio that overflows has no gradient to multiply by 0."""
    log_r_X, high = terms.log_ratio_X, math.log1p(train.clip_high)
    low = math.log1p(-train.clip_low) if train.clip_low < 1 else -math.inf
    most = math.log(train.dual_clip) if train.dual_clip else math.inf
    down_X, up_X = terms.minus_X < 0, terms.plus_X > 0
    pulled_X = terms.plus_X * log_r_X.clamp(max=high).exp()
    pushed_X = terms.minus_X * log_r_X.clamp(low, most).masked_fill(~down_X, 0).exp()
    return _Gain(pulled_X + pushed_X, down_X & (log_r_X < low), up_X & (log_r_X > high), down_X & (log_r_X > most))


def _clipped_weight(terms: _Terms, train: TrainConfig) -> _Gain:
    ratio_X, low, high = terms.log_ratio_X.detach().exp(), 1 - train.clip_low, 1 + train.clip_high
    gain_X = ratio_X.clamp(low, high) * (terms.plus_X + terms.minus_X) * terms.logprob_X
    credited_X = terms.credited_X
    return _Gain(gain_X, credited_X & (ratio_X < low), credited_X & (ratio_X > high), torch.zeros_like(credited_X))


def _divergence_mask(terms: _Terms, train: TrainConfig) -> _Gain:
    shift_X = terms.logprob_X.detach().exp() - terms.sampled_X.exp()
    too_high_X, too_low_X = shift_X > train.dppo_delta, shift_X < -train.dppo_delta
    kept_X = terms.plus_X.masked_fill(too_high_X, 0) + terms.minus_X.masked_fill(too_low_X, 0)
    low_X, high_X = too_low_X & (terms.minus_X < 0), too_high_X & (terms.plus_X > 0)
    log_r_X = terms.log_ratio_X.masked_fill(kept_X == 0, 0)
    over_X = (log_r_X.detach() - math.log(train.dppo_cap or math.inf)).clamp(min=0)
    return _Gain((log_r_X - over_X).exp() * kept_X, low_X, high_X, over_X > 0)


GAINS: dict[Loss, Callable[[_Terms, TrainConfig], _Gain]] = {
    "ppo": _clipped,
    "cispo": _clipped_weight,
    "gspo": _clipped,
    "dppo": _divergence_mask,
}
