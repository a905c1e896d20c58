from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.trainer.advantages import advantages
from learner.trainer.episodes import credit, usable
from learner.trainer.loss import k3
from learner.trainer.model import load_model
from learner.trainer.packing import Pack, pack
from learner.trainer.update import Updater, learning_rate
from tests.trainer.builders import CPU, configure, forked, group, random_group, tiny, write_tiny
from treegrpo.config import Config
from treegrpo.tree import Group, Tree


def packs_of(groups: list[Group], config: Config) -> list[Pack]:
    batch = usable(groups)
    credited = credit(batch, [advantages(one.rewards) for one in batch], config.train.aggregation)
    return pack(credited, config.train.pack_tokens, keep_zero=config.train.kl_coef > 0)


def logprobs_of(policy: PreTrainedModel, tree: Tree, leaf: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of one leaf's action tokens, and the sampler's, found by walking along its path."""
    ids, labels, sampled = tree.prompt.tolist(), list[int](), list[float]()
    for part in tree.path(leaf):
        labels += range(len(ids), len(ids) + len(part.action))
        sampled += part.logprobs.tolist()
        ids += part.action.tolist() + part.observation.tolist()
    logprob_SV = torch.log_softmax(cast("Any", policy)(input_ids=torch.tensor([ids])).logits[0], -1)
    return torch.stack([logprob_SV[i - 1, ids[i]] for i in labels]), torch.tensor(sampled)


def naive_loss(policy: PreTrainedModel, reference: PreTrainedModel, groups: list[Group], config: Config) -> Tensor:
    """ALGORITHM: J averaged over groups, then leaves, then the tokens of the leaf, one leaf at a time."""
    losses: list[Tensor] = []
    for one in usable(groups):
        values = np.concatenate(advantages(one.rewards))
        leaves = [(tree, leaf.node) for tree, below in one.trees for leaf in below]
        for (tree, leaf), advantage in zip(leaves, values.tolist(), strict=True):
            logprob, sampled = logprobs_of(policy, tree, leaf)
            ratio = (logprob - sampled).exp()
            clipped = ratio.clamp(1 - config.train.clip_low, 1 + config.train.clip_high)
            gain = torch.minimum(ratio * advantage, clipped * advantage)
            penalty = k3(logprob, logprobs_of(reference, tree, leaf)[0].detach())
            losses.append(-(gain - config.train.kl_coef * penalty).mean() / (len(leaves) * len(groups)))
    return torch.stack(losses).sum()


def applied_gradients(updater: Updater) -> list[Tensor]:
    """A list that fills with the gradients of the next step, as the optimiser gets them."""
    seen: list[Tensor] = []

    def look(*_: Any) -> None:
        seen.extend(p.grad.clone() for p in updater.model.parameters() if p.grad is not None)

    updater.optimizer.register_step_pre_hook(look)
    return seen


def test_loss_and_gradients_equal_those_of_one_leaf_at_a_time(tmp_path: Path) -> None:
    """Everything at once: weights, masks, stop tokens, clipping, penalty, padding and accumulation over packs."""
    config = configure(tmp_path, kl_coef=0.1, pack_tokens=100, clip_low=0.1, clip_high=0.3, lr=1e-9, max_grad_norm=1e9)
    rng = np.random.default_rng(5)
    groups = [random_group(rng, str(n)) for n in range(3)]
    policy, reference = tiny(tmp_path / "model"), load_model(write_tiny(tmp_path / "reference", seed=1), CPU)
    expected = naive_loss(policy, reference, groups, config)
    gradients = torch.autograd.grad(expected, list(policy.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm().item()

    updater = Updater(config, policy, reference)
    packs = packs_of(groups, config)
    seen = applied_gradients(updater)
    update = updater.update(packs, 0)

    assert len(packs) > 2
    assert update.tally.mean("clip_low") > 0.02
    assert update.tally.mean("clip_high") > 0.02
    assert update.loss == pytest.approx(expected.item(), rel=1e-5)
    assert update.grad_norm == pytest.approx(norm, rel=1e-5)
    for found, wanted in zip(seen, gradients, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6 * norm)


def test_a_batch_without_signal_leaves_the_policy_alone_even_with_momentum(tmp_path: Path) -> None:
    config = configure(tmp_path)
    updater = Updater(config, tiny(tmp_path / "model"), None)
    assert updater.update(packs_of([group(forked((1.0, 0.0)))], config), 0).outcome == "applied"
    before = [p.clone() for p in updater.model.parameters()]
    update = updater.update(packs_of([group(forked((1.0, 1.0)))], config), 1)
    assert (update.outcome, update.grad_norm, update.tokens) == ("no_signal", 0.0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, updater.model.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configure(tmp_path)
    updater = Updater(config, tiny(tmp_path / "model"), None)
    packs = packs_of([group(forked())], config)
    packs[0].sampled_A[0] = -torch.inf
    before = [p.clone() for p in updater.model.parameters()]
    assert updater.update(packs, 0).outcome == "not_finite"
    assert "step 1 is not applied" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, updater.model.parameters(), strict=True))
    assert updater.update(packs_of([group(forked())], config), 1).outcome == "applied"


def test_the_gradient_is_clipped_and_its_norm_reported_as_it_was(tmp_path: Path) -> None:
    config = configure(tmp_path, max_grad_norm=1e-3)
    updater = Updater(config, tiny(tmp_path / "model"), None)
    seen = applied_gradients(updater)
    assert updater.update(packs_of([group(forked())], config), 0).grad_norm > 0.01
    assert torch.stack([g.norm() for g in seen]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_rises_linearly_and_stays() -> None:
    rates = [learning_rate(step, 1.0, 0.4, 10) for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert learning_rate(0, 1.0, 0.0, 10) == 1.0
