from __future__ import annotations

import pytest
import torch

from services.sampler.engines.embedded.sampling import sample_tokens

pytestmark = pytest.mark.pure


def test_each_row_has_its_own_temperature() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor([0.0, 0.5, 1.0])
    ids, logprobs = sample_tokens(logits, temperature, torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64))
    assert ids[0] == logits[0].argmax()
    for row, used in enumerate([1.0, 0.5, 1.0]):
        assert torch.allclose(logprobs[row], torch.log_softmax(logits[row] / used, -1)[ids[row]])


def test_shares_follow_the_probabilities_and_impossible_tokens_never_come() -> None:
    probability = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    chance = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, _ = sample_tokens(probability.log().expand(40_000, -1), torch.ones(40_000), chance)
    shares = torch.bincount(ids, minlength=6) / 40_000
    assert torch.allclose(shares, probability, atol=0.015)
    assert (shares[probability == 0] == 0).all()
