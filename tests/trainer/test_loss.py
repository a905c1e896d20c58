from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.trainer.algorithm.corrections import m2po_limit, m2po_log_ratios
from learner.trainer.algorithm.loss import GAINS, entropy_bonus, kl, policy_loss, reference_penalty
from learner.trainer.algorithm.metric_sums import MetricSums
from learner.trainer.algorithm.targets import Targets
from tests.trainer.target_builders import float64, lone, near, places, random_targets
from treegrpo.config.train import CORRECTION_OPTIONS, LOSS_OPTIONS, KlEstimator, Loss, TrainConfig

pytestmark = pytest.mark.pure

ALL = "m2po of all tokens"
CORRECTIONS = ("none", "decoupled", "tis", "icepop", "m2po", ALL)
TOKEN_LEVEL: list[dict[str, Any]] = [{"loss": "ppo"}, {"loss": "ppo", "dual_clip": 1.4}, {"loss": "cispo"}, {"loss": "dppo"}]
BOUNDS = {"clip_low": 0.2, "clip_high": 0.3, "dppo_delta": 0.03, "dppo_cap": 1.3} | {
    "tis_cap": 1.2,
    "icepop_low": 0.8,
    "icepop_high": 1.5,
}
SEEDS = st.integers(0, 2**32 - 1)


def tight(loss: dict[str, Any], correction: str) -> TrainConfig:
    """With those of the bounds that loss and correction use."""
    used = LOSS_OPTIONS[loss["loss"]] | CORRECTION_OPTIONS.get(correction, set())
    bounds = {name: value for name, value in BOUNDS.items() if name in used}
    chosen = {"correction": "m2po", "m2po_tokens": "all"} if correction == ALL else {"correction": correction}
    return TrainConfig.model_validate(bounds | loss | chosen)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rho_of(log_rho: float, train: TrainConfig, limit: float, advantage: float) -> float:
    rho = math.exp(log_rho)
    allowed = train.icepop_low <= rho <= train.icepop_high
    inside = log_rho**2 < limit or (train.m2po_tokens == "trust_region" and log_rho * advantage <= 0)
    masked = {"icepop": rho if allowed else 0.0, "m2po": rho if inside else 0.0}
    return {"none": 1.0, "decoupled": rho, "tis": min(rho, train.tis_cap), **masked}[train.correction]


def one_path_token(logprob: Tensor, anchor: float, sampled: float, advantage: float, train: TrainConfig) -> Tensor:
    """The loss of one token for one leaf, as the papers write it."""
    ratio = (logprob - anchor).exp()
    clipped = ratio.clamp(1 - train.clip_low, 1 + train.clip_high)
    if train.loss == "cispo":
        return -clipped.detach() * advantage * logprob
    if train.loss == "dppo":
        shift = (logprob.exp() - math.exp(sampled)).item()
        outward = abs(shift) > train.dppo_delta and shift * advantage > 0
        capped = (ratio.detach().clamp(max=train.dppo_cap) / ratio.detach()) * ratio
        return -capped * advantage * (0.0 if outward else 1.0)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    return -(torch.maximum(gain, float64(train.dual_clip * advantage)[0]) if train.dual_clip and advantage < 0 else gain)


def path_by_path(logprob_A: Tensor, proximal_A: Tensor, targets: Targets, train: TrainConfig, limit: float) -> Tensor:
    """The sum over leaves and the tokens of their paths, one at a time."""
    total = torch.zeros((), dtype=torch.float64)
    columns = (targets.token_P, targets.advantage_P, targets.weight_P)
    for token, advantage, weight in zip(*(column.tolist() for column in columns), strict=True):
        p, q = proximal_A[token].item(), targets.sampled_A[token].item()
        anchor = q if train.correction == "none" else p
        rho = rho_of(p - q, train, limit, advantage)
        total = total + weight * rho * one_path_token(logprob_A[token], anchor, q, advantage, train)
    return total


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("loss", TOKEN_LEVEL, ids=str)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, node_level=st.booleans())
def test_a_shared_token_loses_what_its_leaves_lose_apart(
    loss: dict[str, Any], correction: str, seed: int, node_level: bool
) -> None:
    rng = seeded(seed)
    targets = random_targets(rng, node_level=node_level)
    train = tight(loss, correction)
    proximal = near(rng, targets.sampled_A, 0.3)
    logprob = near(rng, proximal, 0.5).requires_grad_()
    limit = m2po_limit(m2po_log_ratios(proximal - targets.sampled_A, targets, train), 0.04)
    apart = path_by_path(logprob, proximal, targets, train, limit)
    shared, _ = policy_loss(logprob, proximal, targets, train, limit)
    assert shared.item() == pytest.approx(apart.item(), abs=1e-12)
    (of_shared,), (of_apart,) = torch.autograd.grad(shared, logprob), torch.autograd.grad(apart, logprob)
    assert torch.allclose(of_shared, of_apart, rtol=0, atol=1e-12)


def test_the_shared_form_is_tested_where_everything_acts() -> None:
    """On the spreads of the property above all clips, caps and masks happen."""
    total = MetricSums()
    for seed in range(20):
        for loss in TOKEN_LEVEL:
            for correction in ("tis", "icepop"):
                rng = seeded(seed)
                targets = random_targets(rng, node_level=True)
                proximal = near(rng, targets.sampled_A, 0.3)
                train = tight(loss, correction)
                total += policy_loss(near(rng, proximal, 0.5), proximal, targets, train)[1]
    assert all(total.ratio(name, "terms") > 0.02 for name in ("clip_low", "clip_high", "clip_dual", "capped", "masked"))


def sequence_loss(logprob_A: Tensor, proximal_A: Tensor, targets: Targets, train: TrainConfig) -> Tensor:
    """GSPO as its paper has it: one ratio for a leaf, one clip, 1/|H| in the weight; ρ is of the leaf."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in range(targets.leaves):
        at = targets.leaf_P == leaf
        token, advantage = targets.token_P[at], targets.advantage_P[at][0].item()
        p, q = proximal_A[token], targets.sampled_A[token]
        anchor = q if train.correction == "none" else p
        ratio = (logprob_A[token] - anchor).mean().exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - train.clip_low, 1 + train.clip_high) * advantage)
        total = total - targets.weight_P[at][0] * len(token) * rho_of((p - q).mean().item(), train, math.inf, advantage) * gain
    return total


@pytest.mark.parametrize("correction", ["none", "decoupled", "tis", "icepop"])
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_gspo_is_the_clipped_loss_of_whole_leaves(correction: str, seed: int) -> None:
    rng = seeded(seed)
    targets = random_targets(rng, node_level=False)
    bounds: dict[str, dict[str, float]] = {"tis": {"tis_cap": 1.02}, "icepop": {"icepop_low": 0.95}}
    train = TrainConfig.model_validate(
        {"loss": "gspo", "correction": correction, "clip_low": 0.03, "clip_high": 0.05, **bounds.get(correction, {})}
    )
    proximal = near(rng, targets.sampled_A, 0.3)
    logprob = near(rng, proximal, 0.5).requires_grad_()
    found, wanted = policy_loss(logprob, proximal, targets, train)[0], sequence_loss(logprob, proximal, targets, train)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)
    (of_found,), (of_wanted,) = torch.autograd.grad(found, logprob), torch.autograd.grad(wanted, logprob)
    assert torch.allclose(of_found, of_wanted, rtol=0, atol=1e-12)


def test_gspo_uses_the_ratio_of_the_leaf_and_the_advantage_of_the_node() -> None:
    """Token 0 is shared. Leaf 0 has s = exp((0.02 + 0.04)/2), leaf 1 s = exp((0.02 − 0.06)/2); the clip cuts at ±0.05."""
    targets = places([-1.0, -1.0, -1.0], [[(0, 2.0), (1, 1.0)], [(0, -1.0), (2, -1.0)]], [0.5, 0.25])
    logprob = float64(-0.98, -0.96, -1.06).requires_grad_()
    train = TrainConfig(loss="gspo", clip_low=0.05, clip_high=0.05)
    loss, sums = policy_loss(logprob, logprob.detach(), targets, train)
    high, low = math.exp(0.03), math.exp(-0.02)
    assert loss.item() == pytest.approx(-(0.5 * high * 3 - 0.25 * low * 2))
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert gradient.tolist() == pytest.approx([-(0.5 * 2 * high - 0.25 * low), -0.5 * high, 0.25 * low])
    assert (sums["terms"], sums["clip_low"], sums["clip_high"]) == (4, 0, 0)


def test_gspo_clips_a_leaf_at_all_its_places() -> None:
    targets = places([-1.0, -1.0, -1.0], [[(0, 1.0), (1, 1.0)], [(0, -1.0), (2, -1.0)]], [1.0, 1.0])
    logprob = float64(-0.9, -1.0, -1.3).requires_grad_()
    loss, sums = policy_loss(logprob, logprob.detach(), targets, TrainConfig(loss="gspo"))
    assert loss.item() == pytest.approx(-2 * 1.0004 + 2 * 0.9997)
    assert not torch.autograd.grad(loss, logprob)[0].any()
    assert (sums.ratio("clip_high", "terms"), sums.ratio("clip_low", "terms")) == (0.5, 0.5)


def test_the_clip_stops_the_gradient_on_its_own_side_only() -> None:
    ratio = float64(1.5, 1.5, 0.5, 0.5, 1.0)
    logprob = ratio.log().requires_grad_()
    targets = lone([0.0] * 5, [1.0, -1.0, 1.0, -1.0, 1.0])
    loss, sums = policy_loss(logprob, logprob.detach(), targets, TrainConfig())
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert gradient.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0, -1.0])
    assert (sums.ratio("clip_high", "terms"), sums.ratio("clip_low", "terms")) == (0.2, 0.2)


def test_the_bounds_are_asymmetric() -> None:
    loss, _ = policy_loss(float64(9.0, -9.0), float64(0, 0), lone([0, 0], [1, -1]), TrainConfig(clip_low=0.1, clip_high=0.4))
    assert loss.item() == pytest.approx(-1.4 + 0.9)


def test_the_dual_clip_bounds_what_a_bad_token_can_cost() -> None:
    """r = 5 in all: the bound of 3 holds where the advantage is negative, and leaves the other to the upper clip."""
    logprob = float64(5.0, 5.0).log().requires_grad_()
    loss, sums = policy_loss(logprob, logprob.detach(), lone([0, 0], [-2, 2]), TrainConfig(dual_clip=3))
    assert loss.item() == pytest.approx(2 * 3 - 2 * 1.2)
    assert not torch.autograd.grad(loss, logprob)[0].any()
    assert (sums["clip_dual"], sums["clip_high"]) == (1, 1)
    unbounded, _ = policy_loss(logprob, logprob.detach(), lone([0, 0], [-2, 2]), TrainConfig())
    assert unbounded.item() == pytest.approx(2 * 5 - 2 * 1.2)


def test_cispo_clips_the_weight_and_keeps_every_gradient() -> None:
    logprob = float64(3.0, 0.25).log().requires_grad_()
    loss, sums = policy_loss(logprob, logprob.detach(), lone([0, 0], [1, -2]), TrainConfig(loss="cispo", clip_low=0.5))
    assert loss.item() == pytest.approx(-1.2 * math.log(3) + 2 * 0.5 * math.log(0.25))
    assert torch.autograd.grad(loss, logprob)[0].tolist() == pytest.approx([-1.2, 1.0])
    assert (sums["clip_high"], sums["clip_low"]) == (1, 1)
    _, sums = policy_loss(logprob, logprob.detach(), lone([0, 0], [0, 0]), TrainConfig(loss="cispo", clip_low=0.5))
    assert (sums["clip_high"], sums["clip_low"]) == (0, 0)
    unbounded, _ = policy_loss(logprob, logprob.detach(), lone([0, 0], [1, -2]), TrainConfig(loss="cispo"))
    assert torch.autograd.grad(unbounded, logprob)[0].tolist() == pytest.approx([-1.2, 0.5])


def test_dppo_stops_what_moves_a_probability_further_away_and_nothing_else() -> None:
    """From 0.5 to 0.8 and to 0.2, up and down each; a rare token may grow tenfold."""
    now = [0.8, 0.8, 0.2, 0.2, 0.01]
    logprob = float64(*now).log().requires_grad_()
    targets = lone([math.log(0.5)] * 4 + [math.log(0.001)], [1, -1, 1, -1, 1])
    loss, sums = policy_loss(logprob, logprob.detach(), targets, TrainConfig(loss="dppo"))
    assert torch.autograd.grad(loss, logprob)[0].tolist() == pytest.approx([0, 1.6, -0.4, 0, -10])
    assert (sums["clip_high"], sums["clip_low"]) == (1, 1)


def test_dppo_caps_a_ratio_and_keeps_its_gradient() -> None:
    """From 0.001 to 0.05, 50-fold: verl's cap is 20. With 0 it is the formula of the paper."""
    logprob, targets = float64(0.05).log().requires_grad_(), lone([math.log(0.001)], [1])
    for cap, weight, held in ((20.0, 20.0, 1), (60.0, 50.0, 0), (0.0, 50.0, 0)):
        loss, sums = policy_loss(logprob, logprob.detach(), targets, TrainConfig(loss="dppo", dppo_cap=cap))
        assert loss.item() == pytest.approx(-weight)
        assert torch.autograd.grad(loss, logprob)[0].tolist() == pytest.approx([-weight])
        assert sums["clip_dual"] == held


def test_m2po_masks_a_side_of_a_shared_token_alone() -> None:
    """ρ = 2 and a limit below (log 2)²: the leaf that would pull the token further up is left out, the other pulls it down."""
    targets = places([math.log(0.2)], [[(0, 1.0)], [(0, -3.0)]], [1.0, 1.0])
    logprob = float64(0.4).log().requires_grad_()
    for tokens, gradient in (("trust_region", 6.0), ("all", 0.0)):
        train = TrainConfig.model_validate({"correction": "m2po", "m2po_tokens": tokens})
        loss, sums = policy_loss(logprob, logprob.detach(), targets, train, 0.4)
        assert torch.autograd.grad(loss, logprob)[0].tolist() == pytest.approx([gradient])
        assert sums["masked"] == 1


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo", "dppo"])
def test_rho_is_applied_once(loss: Any) -> None:
    """At the start of a batch θ = p: whatever the loss, the gradient of a token is π_p/π_q·A·∇log π."""
    start = float64(-1.2, -1.2).requires_grad_()
    targets = lone([-1.0, -1.0], [1.0, 1.0])
    gradients = [
        torch.autograd.grad(policy_loss(start, start.detach(), targets, TrainConfig(loss=loss, correction=name))[0], start)
        for name in ("none", "decoupled")
    ]
    for (gradient,) in gradients:
        assert gradient.tolist() == pytest.approx([-math.exp(-0.2)] * 2)


@pytest.mark.parametrize("loss", [*TOKEN_LEVEL, {"loss": "gspo"}], ids=str)
def test_corrections_that_have_nothing_to_correct_or_no_bound_agree(loss: dict[str, Any]) -> None:
    rng = seeded(1)
    targets = random_targets(rng, node_level=True)
    proximal = near(rng, targets.sampled_A, 0.3)
    logprob = near(rng, proximal, 0.3)

    def of(correction: str, proximal: Tensor, **keys: float) -> float:
        train = TrainConfig.model_validate(loss | {"correction": correction} | keys)
        return policy_loss(logprob, proximal, targets, train)[0].item()

    assert of("decoupled", targets.sampled_A) == of("none", targets.sampled_A)
    assert of("tis", proximal, tis_cap=1e30) == of("decoupled", proximal)
    assert of("icepop", proximal, icepop_low=0, icepop_high=1e30) == of("decoupled", proximal)
    if loss["loss"] == "dppo":
        assert of("decoupled", proximal, dppo_cap=0) == pytest.approx(of("none", proximal, dppo_cap=0), rel=1e-12)
    else:
        assert of("decoupled", proximal) != pytest.approx(of("none", proximal), rel=1e-3)


def test_a_gspo_leaf_is_corrected_as_a_whole() -> None:
    """ρ of the leaves: exp of the mean of log ρ over their tokens, 1.5 and 0.6; IcePop leaves the second out."""
    targets = places([-2.0] * 3, [[(0, 1.0), (1, 1.0)], [(2, 1.0)]], [1.0, 1.0])
    proximal = float64(-2.0, -2.0 + 2 * math.log(1.5), -2.0 + math.log(0.6))
    loss, sums = policy_loss(proximal, proximal, targets, TrainConfig(loss="gspo", correction="icepop", icepop_low=0.7))
    assert loss.item() == pytest.approx(-1.5 * 2)
    assert sums.ratio("masked", "terms") == pytest.approx(1 / 3)


def test_only_tokens_that_count_are_counted() -> None:
    targets = lone([0.0] * 4, [-1.0] * 4)
    targets.counted_A[:2] = False
    logprob = float64(0.5, 0.5, 0.5, 1.0).log()
    loss, sums = policy_loss(logprob, logprob, targets, TrainConfig())
    assert loss.item() == pytest.approx(3 * 0.8 + 1)
    assert (sums["terms"], sums["clip_low"]) == (2, 1)


FAR = [(-1.0, -100.0, 1.0), (-1.0, -100.0, 0.0), (-100.0, -1.0, 1.0), (-100.0, -1.0, -1.0), (-100.0, -1.0, 0.0)]
"""log π_θ, log π_q and advantage of tokens whose ratio, or its inverse, is no float32: e^99."""


def leaf_each(far: list[tuple[float, float, float]]) -> tuple[Tensor, Targets]:
    leaves = [[(token, advantage)] for token, (_, _, advantage) in enumerate(far)]
    return float64(*(logprob for logprob, _, _ in far)), places([sampled for _, sampled, _ in far], leaves, [0.5] * len(far))


def in_float32(targets: Targets) -> Targets:
    names = ("sampled_A", "advantage_P", "weight_P")
    return replace(targets, **{name: getattr(targets, name).float() for name in names})


@pytest.mark.parametrize("correction", ["none", "tis", "icepop", ALL])
@pytest.mark.parametrize("loss", [*TOKEN_LEVEL, {"loss": "gspo", "clip_low": 0.01, "clip_high": 0.02}], ids=str)
def test_a_ratio_that_overflows_costs_what_the_paper_says(loss: dict[str, Any], correction: str) -> None:
    if (loss["loss"], correction) == ("gspo", ALL):
        return  # refused
    bounded = correction != "none" or loss["loss"] in {"cispo", "dppo"} or "dual_clip" in loss
    logprob, targets = leaf_each(FAR + [(-1.0, -100.0, -1.0)] * bounded)
    train = tight(loss, correction)
    reference = sequence_loss if loss["loss"] == "gspo" else partial(path_by_path, limit=1.0)
    exact, narrow = logprob.clone().requires_grad_(), logprob.float().requires_grad_()
    wanted = reference(exact, logprob, targets, train)
    found, _ = policy_loss(narrow, narrow.detach(), in_float32(targets), train, 1.0)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    (of_found,), (of_wanted,) = torch.autograd.grad(found, narrow), torch.autograd.grad(wanted, exact)
    assert of_found.tolist() == pytest.approx(of_wanted.tolist(), rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("loss", TOKEN_LEVEL, ids=str)
def test_far_ratios_are_exact_where_they_are_numbers(loss: dict[str, Any], correction: str) -> None:
    start, targets = leaf_each([*FAR, (-1.0, -100.0, -1.0)])
    logprob = (start - 0.05).requires_grad_()
    train = tight(loss, correction)
    found, wanted = policy_loss(logprob, start, targets, train, 1.0)[0], path_by_path(logprob, start, targets, train, 1.0)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    (of_found,), (of_wanted,) = torch.autograd.grad(found, logprob), torch.autograd.grad(wanted, logprob)
    assert of_found.tolist() == pytest.approx(of_wanted.tolist(), rel=1e-12)


def test_what_no_bound_holds_is_not_made_finite() -> None:
    """−r·A with A < 0 and no dual clip, and ρ that is not capped, are what they are: the step is not applied."""
    logprob, targets = leaf_each([(-1.0, -100.0, -1.0)])
    for train in (TrainConfig(), TrainConfig(correction="decoupled")):
        assert policy_loss(logprob.float(), logprob.float(), in_float32(targets), train)[0].item() == math.inf


def test_every_loss_of_the_configuration_exists() -> None:
    assert set(GAINS) == set(LOSS_OPTIONS) == set(get_args(Loss))


@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative_and_nothing_between_equals(logprob: float, reference: float) -> None:
    assert kl(torch.tensor(logprob).double(), torch.tensor(reference).double(), "k3").item() >= 0
    assert kl(torch.tensor(logprob), torch.tensor(logprob), "k3").item() == 0


def test_the_penalty_is_weighted_and_its_figure_is_not() -> None:
    logprob, reference, targets = float64(-1.0, -2.0), float64(-1.5, -2.0), lone([-1.0, -2.0], [1.0, 1.0], weight=0.25)
    expectations: list[tuple[KlEstimator, float]] = [("k1", 0.5), ("k2", 0.125), ("k3", 0.1065307)]
    for estimator, expected in expectations:
        penalty, sums = reference_penalty(logprob, reference, targets, estimator)
        assert penalty.item() == pytest.approx(0.25 * expected, rel=1e-5)
        assert sums["kl_reference"] == pytest.approx(0.1065307, rel=1e-5)
    targets.counted_A[0] = False
    assert reference_penalty(logprob, reference, targets, "k3")[1]["kl_reference"] == 0


def test_the_entropy_bonus_is_weighted_and_its_figure_is_not() -> None:
    entropy = float64(2.0, 1.0).requires_grad_()
    bonus, sums = entropy_bonus(entropy, lone([-1.0, -1.0], [1.0, 1.0], weight=0.5))
    assert (bonus.item(), sums["entropy"]) == (1.5, 3.0)
    assert torch.autograd.grad(bonus, entropy)[0].tolist() == [0.5, 0.5]


def test_a_pack_without_actions_loses_nothing() -> None:
    empty = float64().requires_grad_()
    for loss in ("ppo", "gspo"):
        found, sums = policy_loss(empty, empty.detach(), lone([], []), TrainConfig(loss=loss, correction="tis"))
        assert (found.item(), sums.ratio("masked", "terms")) == (0.0, 0.0)
        found.backward()
