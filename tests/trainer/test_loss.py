from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.trainer.loss import Clip, k3, policy_loss, reference_penalty

CLIP = Clip(0.2, 0.3)


def direct(logprob: Tensor, sampled: Tensor, advantage: float, weight: float) -> Tensor:
    """The formula as the paper has it, for one leaf."""
    ratio = (logprob - sampled).exp()
    clipped = ratio.clamp(1 - CLIP.low, 1 + CLIP.high)
    return -weight * torch.minimum(ratio * advantage, clipped * advantage).sum()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.floats(-3, 3), min_size=1, max_size=5))
def test_a_shared_token_loses_what_its_leaves_lose_apart(seed: int, advantages: list[float]) -> None:
    rng = torch.Generator().manual_seed(seed)
    sampled = torch.randn(8, generator=rng, dtype=torch.float64) - 3
    logprob = (sampled + 0.5 * torch.randn(8, generator=rng, dtype=torch.float64)).requires_grad_()
    weights = torch.rand(len(advantages), generator=rng, dtype=torch.float64).tolist()
    apart = torch.stack([direct(logprob, sampled, a, w) for a, w in zip(advantages, weights, strict=True)]).sum()
    plus, minus = (
        torch.full_like(sampled, sum(w * pick(a, 0.0) for a, w in zip(advantages, weights, strict=True))) for pick in (max, min)
    )
    shared, _ = policy_loss(logprob, sampled, plus, minus, CLIP)
    assert shared.item() == pytest.approx(apart.item(), abs=1e-12)
    (of_shared,), (of_apart,) = torch.autograd.grad(shared, logprob), torch.autograd.grad(apart, logprob)
    assert torch.allclose(of_shared, of_apart, atol=1e-12)


def test_the_clip_stops_the_gradient_on_its_own_side_only() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0], dtype=torch.float64)
    logprob = ratio.log().requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    loss, tally = policy_loss(logprob, torch.zeros_like(ratio), advantage.clamp(min=0), advantage.clamp(max=0), CLIP)
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert gradient.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0, -1.0])
    assert (tally.mean("clip_high"), tally.mean("clip_low")) == (0.2, 0.2)


def test_the_bounds_are_asymmetric() -> None:
    plus, minus = torch.tensor([1.0, 0.0]), torch.tensor([0.0, -1.0])
    loss, _ = policy_loss(torch.tensor([9.0, -9.0]), torch.zeros(2), plus, minus, Clip(low=0.1, high=0.4))
    assert loss.item() == pytest.approx(-1.4 + 0.9)


@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative_and_nothing_between_equals(logprob: float, reference: float) -> None:
    assert k3(torch.tensor(logprob).double(), torch.tensor(reference).double()).item() >= 0
    assert k3(torch.tensor(logprob), torch.tensor(logprob)).item() == 0


def test_the_penalty_is_weighted_and_its_figure_is_not() -> None:
    logprob, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
    penalty, tally = reference_penalty(logprob, reference, torch.tensor([0.25, 0.25]))
    assert penalty.item() == pytest.approx(0.25 * 0.1065307, rel=1e-5)
    assert tally.sums["kl_reference"] == pytest.approx(0.1065307, rel=1e-5)


def test_the_mismatch_is_nothing_when_sampler_and_trainer_agree() -> None:
    same = torch.tensor([-1.0, -2.0])
    for shift, expected in ((0.0, 0.0), (0.1, 0.0051709)):
        _, tally = policy_loss(same + shift, same, same, same, CLIP)
        assert tally.mean("kl_mismatch") == pytest.approx(expected, abs=1e-6)
