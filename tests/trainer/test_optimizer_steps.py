from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.trainer.algorithm.corrections import m2po_limit, m2po_log_ratios
from learner.trainer.distributed.ranks import Ranks
from learner.trainer.optimizer_steps import Updater, learning_rate
from learner.trainer.packing.model import load_model, score
from learner.trainer.packing.packing import pack
from tests.trainer.builders import CPU, configure, forked, group, step, subtree, tiny, write_tiny
from tests.trainer.per_path_reference import (
    applied_gradients,
    assert_same,
    credited,
    exact,
    in_float64,
    naive_loss,
    packs_of,
    plain,
    random_groups,
)

T = TypeVar("T")


EXACT: list[dict[str, Any]] = [
    {"loss": "ppo", "clip_low": 0.1, "clip_high": 0.3},
    {"loss": "ppo", "dual_clip": 1.2, "aggregation": "token_mean", "estimator": "treerl"},
    {"loss": "cispo", "entropy_coef": 0.05, "kl_estimator": "k1"},
    {"loss": "gspo", "clip_low": 0.02, "clip_high": 0.03, "estimator": "sibling_loo"},
    {"loss": "dppo", "dppo_delta": 0.01, "kl_estimator": "k2"},
    {"loss": "gspo", "correction": "icepop", "icepop_low": 0.9},
    {"loss": "ppo", "correction": "tis", "tis_cap": 1.2},
]


@pytest.mark.parametrize("train", EXACT, ids=lambda train: "-".join(str(value) for value in train.values()))
def test_loss_and_gradients_equal_those_of_one_leaf_at_a_time(tmp_path: Path, train: dict[str, Any]) -> None:
    """Everything at once: weights, masks, stop tokens, clipping, penalty, entropy, and trees split over packs."""
    folder, groups = write_tiny(tmp_path / "model"), random_groups(5, 3)
    config = configure(tmp_path, **({"kl_coef": 0.1, "pack_tokens": 64, "lr": 1e-9, "max_grad_norm": 1e9} | train))
    policy, reference = plain(folder), plain(write_tiny(tmp_path / "reference", seed=1))
    expected = naive_loss(policy, policy, reference, groups, config)
    gradients = torch.autograd.grad(expected, list(policy.parameters()))

    updater = Updater(config, exact(load_model(folder, CPU)), exact(load_model(tmp_path / "reference", CPU)))
    packs, seen = in_float64(packs_of(groups, config)), applied_gradients(updater)
    update = updater.step_minibatches([packs], 0)

    assert len(packs) > 2
    acted = ("clip_low", "clip_high", "clip_dual", "capped", "masked")
    assert sum(update.sums.ratio(name, "terms") for name in acted) > 0.02
    assert update.loss == pytest.approx(expected.item(), abs=1e-10)
    assert_same(seen[0], gradients, 1e-10)
    assert update.grad_norm == pytest.approx(torch.stack([g.norm() for g in gradients]).norm().item(), rel=1e-10)


@pytest.mark.parametrize(
    "train", [{}, {"loss": "gspo"}, {"correction": "decoupled"}, {"correction": "m2po", "m2po_tau": 1e9}], ids=str
)
def test_the_second_minibatch_is_compared_with_the_policy_of_the_start(tmp_path: Path, train: dict[str, Any]) -> None:
    config = configure(tmp_path, lr=3e-3, max_grad_norm=1e9, minibatches=2, **train)
    folder, (one, other) = write_tiny(tmp_path / "model"), random_groups(6, 2)
    updater = Updater(config, exact(load_model(folder, CPU)), None)
    seen, weights = applied_gradients(updater), list[dict[str, Tensor]]()

    def look(*_: Any) -> None:
        weights.append({name: value.clone() for name, value in updater.model.state_dict().items()})

    updater.optimizer.register_step_post_hook(look)
    update = updater.step_minibatches([in_float64(packs_of([part], config)) for part in (one, other)], 0)

    assert update.outcomes == ("applied", "applied")
    start, moved = plain(folder), plain(folder)
    moved.load_state_dict(weights[0])
    losses = [naive_loss(policy, start, start, [of], config) for policy, of in ((start, one), (moved, other))]
    assert update.loss == pytest.approx(sum(loss.item() for loss in losses) / 2, abs=1e-10)
    assert_same(seen[1], torch.autograd.grad(losses[1], list(moved.parameters())), 1e-10)
    norms = [torch.stack([g.norm() for g in gradients]).norm().item() for gradients in seen]
    assert update.grad_norm == pytest.approx(sum(norms) / 2)


def forwards(model: PreTrainedModel, *, grad: bool) -> list[bool]:
    """A list that gets an entry with every forward pass of ``model`` that has, or has not, a gradient."""
    seen: list[bool] = []

    def look(*_: Any) -> None:
        if torch.is_grad_enabled() == grad:
            seen.append(grad)

    cast("Any", model).get_decoder().register_forward_pre_hook(look)
    return seen


@pytest.mark.parametrize(
    ("correction", "minibatches", "passes"),
    [("none", 1, 0), ("none", 2, 0), ("tis", 1, 0), ("tis", 2, 2), ("m2po", 1, 2), ("m2po", 2, 2)],
)
def test_the_proximal_policy_is_scored_ahead_only_where_it_must_be(
    tmp_path: Path, correction: str, minibatches: int, passes: int
) -> None:
    config = configure(tmp_path, correction=correction, minibatches=minibatches)
    packs = [packs_of([one], config) for one in random_groups(7, 2)]
    assert [len(part) for part in packs] == [1, 1]
    updater = Updater(config, tiny(tmp_path / "model"), None)
    ahead, trained = forwards(updater.model, grad=False), forwards(updater.model, grad=True)
    updater.step_minibatches(packs if minibatches == 2 else [[packs[0][0], packs[1][0]]], 0)
    assert (len(ahead), len(trained)) == (passes, 2)


def test_m2po_chooses_over_the_whole_batch(tmp_path: Path) -> None:
    """One group is sampled by the policy itself, the other is far from it: alone it would have to lose tokens."""
    config = configure(tmp_path, correction="m2po", m2po_tokens="all", minibatches=2, m2po_tau=0.1)
    folder, (one, other) = write_tiny(tmp_path / "model"), random_groups(8, 2)
    packs = [packs_of([part], config)[0] for part in (one, other)]
    updater = Updater(config, load_model(folder, CPU), None)
    with torch.no_grad():
        start = [score(updater.model, part, 1.0)[0] for part in packs]
    packs[0].targets.sampled_A.copy_(start[0])
    square = torch.cat([logprob - part.targets.sampled_A for logprob, part in zip(start, packs, strict=True)]).square()
    update = updater.step_minibatches([[part] for part in packs], 0)
    by_itself = m2po_limit(start[1] - packs[1].targets.sampled_A, 0.1)
    limit = m2po_limit(square.sqrt(), 0.1)
    assert 0 < update.sums["masked"] == (square >= limit - 1e-9).sum() < (square >= by_itself - 1e-9).sum()


class Twin(Ranks):
    """Beside a rank that has the same."""

    def all_gather(self, value: T) -> list[T]:
        return [value, value]


class CalmTwin(Ranks):
    """Beside a rank whose tokens are as the policy would have them."""

    def all_gather(self, value: T) -> list[T]:
        return [value, cast("T", torch.zeros(50))] if isinstance(value, Tensor) else [value]


def test_other_ranks_are_part_of_the_figures(tmp_path: Path) -> None:
    config = configure(tmp_path, correction="m2po")
    packs = packs_of(random_groups(9, 1), config)
    lone, both = (
        Updater(config, tiny(tmp_path / "model"), None, ranks).step_minibatches([packs], 0) for ranks in (Ranks(), Twin())
    )
    assert both.loss == 2 * lone.loss
    assert both.sums == lone.sums + lone.sums


def test_m2po_chooses_over_all_ranks(tmp_path: Path) -> None:
    """With calm tokens elsewhere more of ours fit in under the same mean."""
    config = configure(tmp_path, correction="m2po")
    packs = packs_of(random_groups(9, 1), config)
    lone, both = (
        Updater(config, tiny(tmp_path / "model"), None, ranks).step_minibatches([packs], 0) for ranks in (Ranks(), CalmTwin())
    )
    assert 0 < both.sums["masked"] < lone.sums["masked"]


def test_a_batch_without_signal_leaves_the_policy_alone_even_with_momentum(tmp_path: Path) -> None:
    config = configure(tmp_path)
    updater = Updater(config, tiny(tmp_path / "model"), None)
    assert updater.step_minibatches([packs_of([group(forked((1.0, 0.0)))], config)], 0).outcomes == ("applied",)
    before = [p.clone() for p in updater.model.parameters()]
    update = updater.step_minibatches([packs_of([group(forked((1.0, 1.0)))], config)], 1)
    assert (update.outcomes, update.grad_norm, update.sums["tokens"]) == (("no_signal",), 0.0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, updater.model.parameters(), strict=True))


def test_advantages_that_cancel_out_move_nothing(tmp_path: Path) -> None:
    """Two leaves of the same tokens: what one pulls up the other pushes down, but for rounding."""
    config = configure(tmp_path, loss="cispo", lr=1e-2)
    updater = Updater(config, tiny(tmp_path / "model"), None)
    before = [p.clone() for p in updater.model.parameters()]
    same = [step(1, 0, [10, 11, 12, 13]), step(2, 0, [10, 11, 12, 13])]
    twins = [
        subtree([one], {one.node: reward}, prompt=[1], tree=tree)
        for tree, (one, reward) in enumerate(zip(same, (1.0, 0.0), strict=True))
    ]
    assert updater.step_minibatches([packs_of([group(twins)], config)], 0).outcomes == ("no_signal",)
    assert all(torch.equal(a, b) for a, b in zip(before, updater.model.parameters(), strict=True))


@pytest.mark.parametrize("correction", ["none", "decoupled"])
def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path: Path, caplog: pytest.LogCaptureFixture, correction: str) -> None:
    config = configure(tmp_path, correction=correction, minibatches=2)
    updater = Updater(config, tiny(tmp_path / "model"), None)
    broken, sound = (packs_of([group(forked())], config) for _ in range(2))
    broken[0].targets.sampled_A[0] = -torch.inf
    before = [p.clone() for p in updater.model.parameters()]
    assert updater.step_minibatches([broken], 0).outcomes == ("not_finite",)
    assert "step 1 is not applied" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, updater.model.parameters(), strict=True))
    assert updater.step_minibatches([broken, sound], 1).outcomes == ("not_finite", "applied")
    assert all(p.isfinite().all() for p in updater.model.parameters())


def test_the_gradient_is_clipped_and_its_norm_reported_as_it_was(tmp_path: Path) -> None:
    config = configure(tmp_path, max_grad_norm=1e-3)
    updater = Updater(config, tiny(tmp_path / "model"), None)
    seen = applied_gradients(updater)
    assert updater.step_minibatches([packs_of([group(forked())], config)], 0).grad_norm > 0.01
    assert torch.stack([g.norm() for g in seen[0]]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_every_token_counts_once_in_the_figures_of_a_tree_that_is_split(tmp_path: Path) -> None:
    groups, config, masked = random_groups(10, 1), configure(tmp_path, correction="m2po", m2po_tokens="all"), set[float]()
    for pack_tokens in (1024, 16):
        packs = pack(credited(groups, config), pack_tokens, keep_zero=False)
        for one in packs:  # what another pack counts has no say in what m2po drops
            one.targets.sampled_A[~one.targets.counted_A] = -math.log(64)
        sums = Updater(config, tiny(tmp_path / "model"), None).step_minibatches([packs], 0).sums
        assert sums["actions"] == sum(len(s.action) for _, tree in groups[0].trees.items() for s in tree.steps.values())
        assert 0 < sums.ratio("entropy", "actions") < math.log(64)
        assert (len(packs) > 1) == (pack_tokens == 16)
        masked.add(sums["masked"])
    assert len(masked) == 1


def test_m2po_measures_the_same_of_a_tree_that_is_split(tmp_path: Path) -> None:
    groups, config, measured = random_groups(10, 1), configure(tmp_path, correction="m2po"), list[Tensor]()
    for pack_tokens in (1024, 16):
        packs = pack(credited(groups, config), pack_tokens, keep_zero=False)
        found = [m2po_log_ratios(-1.0 - one.targets.sampled_A, one.targets, config.train) for one in packs]
        measured.append(torch.cat(found).sort().values)
    assert len(measured[0]) > 0
    assert torch.equal(*measured)


def test_the_learning_rate_rises_linearly_and_stays() -> None:
    rates = [learning_rate(step, 1.0, 0.4, 10) for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert learning_rate(0, 1.0, 0.0, 10) == 1.0


def test_the_step_is_taken_at_the_learning_rate(tmp_path: Path) -> None:
    config = configure(tmp_path, lr=1e-2, warmup_ratio=1.0, steps=4, weight_decay=0.0)
    updater = Updater(config, tiny(tmp_path / "model"), None)
    before = [p.clone() for p in updater.model.parameters()]
    assert updater.step_minibatches([packs_of([group(forked())], config)], 0).lr == 2.5e-3
    moved = max((a - b).abs().max().item() for a, b in zip(before, updater.model.parameters(), strict=True))
    assert moved == pytest.approx(2.5e-3, rel=1e-2)  # AdamW's first step moves by the learning rate
