from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.trainer.distributed.ranks import RANK_0_FAILED, SINGLE_RANK, Ranks
from learner.trainer.optimizer_steps import Outcome, Updater
from learner.trainer.packing.model import Policy, load_model
from learner.trainer.persistence import checkpoint
from learner.trainer.persistence.checkpoint import TrainingProgress
from learner.trainer.persistence.policy_versions import export_model, write_model
from tests.trainer.builders import CPU, configure, group, step, subtree, write_tiny
from tests.trainer.model_families import write_family
from tests.trainer.per_path_reference import exact, in_float64, packs_of, random_groups
from tests.trainer.rank_pair_harness import WORLD, RankPair
from treegrpo.config.schema import Config
from treegrpo.core.tree import Group
from treegrpo.errors import ModelError, RankError, RunFileError

pytestmark = pytest.mark.xdist_group("ranks")


class Trained(NamedTuple):
    """What is left of a few steps."""

    outcomes: list[tuple[Outcome, ...]]
    losses: list[float]
    norms: list[float]
    tallies: list[dict[str, float]]
    weights: dict[str, Tensor]
    packs: list[int]


def load(config: Config, folder: Path, ranks: Ranks) -> Updater:
    again = config.train.gradient_checkpointing
    policy = exact(load_model(folder, CPU, gradient_checkpointing=again))
    reference = exact(load_model(config.model.path, CPU)).requires_grad_(False) if config.train.kl_coef else None
    return Updater(config, policy, reference, ranks)


def steps(updater: Updater, ranks: Ranks, config: Config, batches: list[list[list[Group]]], cut_for: int) -> Trained:
    """One update for each batch of minibatches of groups, in packs as the loop cuts them for ``cut_for`` ranks."""
    packs = [[in_float64(packs_of(groups, config, cut_for)) for groups in batch] for batch in batches]
    updates = [
        updater.step_minibatches([ranks.assign_packs(part) for part in batch], number) for number, batch in enumerate(packs)
    ]
    return Trained(
        [update.outcomes for update in updates],
        [update.loss for update in updates],
        [update.grad_norm for update in updates],
        [dict(update.sums.totals) for update in updates],
        ranks.gather_state(updater.model, torch.float64),
        [len(part) for batch in packs for part in batch],
    )


def train(ranks: Ranks, config: Config, batches: list[list[list[Group]]], cut_for: int | None = None) -> Trained:
    return steps(load(config, config.model.path, ranks), ranks, config, batches, cut_for or ranks.world)


def assert_same_steps(found: Trained, expected: Trained) -> None:
    """All but the figures: in which of its packs a token is counted depends on the cut."""
    assert_same(found, expected._replace(tallies=found.tallies))


def assert_same(found: Trained, expected: Trained) -> None:
    assert found.outcomes == expected.outcomes
    assert found.losses == pytest.approx(expected.losses, rel=1e-7)
    assert found.norms == pytest.approx(expected.norms, rel=1e-7)
    for one, other in zip(found.tallies, expected.tallies, strict=True):
        assert one == pytest.approx(other, rel=1e-7)
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert torch.allclose(found.weights[name], value, rtol=0, atol=1e-7), name


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied embeddings": ("qwen2", {}),
    "a head of its own, penalty, entropy": ("llama", {"kl_coef": 0.1, "entropy_coef": 0.01}),
    "minibatches against the policy of the start": ("llama", {"correction": "m2po", "minibatches": 2}),
    "gspo, layers computed again": ("qwen2", {"loss": "gspo", "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_steps_of_one(pair: RankPair, tmp_path: Path, case: str) -> None:
    family, options = CASES[case]
    write_family(tmp_path / "model", family)
    config = configure(tmp_path, pack_tokens=64, lr=1e-2, **options)
    batches = [[random_groups(seed, 3), random_groups(seed + 21, 2)][: config.train.minibatches] for seed in (4, 10)]
    alone = train(SINGLE_RANK, config, batches)
    both, other = pair(train, config, batches)
    assert any(count % 2 for count in both.packs)
    assert max(both.packs) > max(alone.packs) > 2
    assert_same_steps(both, alone)
    assert_same(both, train(SINGLE_RANK, config, batches, WORLD))
    assert other.weights == {}
    assert other.tallies == both.tallies


def test_bfloat16_on_two_ranks_is_bfloat16_on_one(pair: RankPair, tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    config = configure(tmp_path, pack_tokens=64)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    alone, both = (
        one.losses + one.norms
        for one in (train(SINGLE_RANK, config, [[random_groups(0, 3)]]), pair(train, config, [[random_groups(0, 3)]])[0])
    )
    assert both == pytest.approx(alone, rel=1e-5)


def test_a_rank_may_go_empty_handed_and_so_may_both(pair: RankPair, tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    config = configure(tmp_path, pack_tokens=4096)
    twins = [subtree([step(1, 0, [10, last])], {1: reward}, prompt=[1, 2], tree=reward) for reward, last in enumerate((11, 12))]
    batches = [[[group(twins)]], [[]], [random_groups(2, 1)]]
    alone, both = train(SINGLE_RANK, config, batches), pair(train, config, batches)[0]
    assert both.packs == [1, 0, 3]
    assert alone.outcomes == [("applied",), ("no_signal",), ("applied",)]
    assert_same_steps(both, alone)
    assert_same(both, train(SINGLE_RANK, config, batches, WORLD))


def spoilt(ranks: Ranks, config: Config, groups: list[Group]) -> Trained:
    """A step in which one rank's first pack is not finite, and one that is sound."""
    updater = load(config, config.model.path, ranks)
    packs = packs_of(groups, config, ranks.world)
    own = ranks.assign_packs(in_float64(packs))
    if ranks.rank == ranks.world - 1:
        own[0].targets.sampled_A[0] = torch.nan
    refused = updater.step_minibatches([own], 0)
    weights = ranks.gather_state(updater.model, torch.float64)
    sound = updater.step_minibatches([ranks.assign_packs(in_float64(packs_of(groups, config, ranks.world)))], 1)
    return Trained([refused.outcomes, sound.outcomes], [], [], [], weights, [])


def test_what_is_not_finite_on_one_rank_is_applied_on_none(pair: RankPair, tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    config = configure(tmp_path, pack_tokens=64)
    both, other = pair(spoilt, config, random_groups(3, 2))
    assert both.outcomes == other.outcomes == [("not_finite",), ("applied",)]
    start = exact(load_model(tmp_path / "model", CPU)).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in both.weights.items())


def one_more(updater: Updater, ranks: Ranks, config: Config) -> dict[str, Tensor]:
    """The weights after a second step, which goes where the moments of the first one say."""
    updater.step_minibatches([ranks.assign_packs(packs_of(random_groups(5, 3), config, ranks.world))], 1)
    return ranks.gather_state(updater.model, torch.float32)


def saved(ranks: Ranks, config: Config) -> dict[str, Tensor]:
    """A policy one step into its training and its checkpoint; the weights after one more."""
    updater = Updater(config, load_model(config.model.path, CPU), None, ranks)
    updater.step_minibatches([ranks.assign_packs(packs_of(random_groups(4, 3), config, ranks.world))], 0)
    torch.manual_seed(17 + ranks.rank)
    root = config.run.dir / "checkpoints"
    checkpoint.save_checkpoint(root, TrainingProgress(0, 1, 3), updater.model, updater.optimizer, config.model.path, 2, ranks)
    return one_more(updater, ranks, config)


def resumed(ranks: Ranks, config: Config, *, moments: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """The weights one step after the checkpoint, and the first random numbers after it."""
    folder = config.run.dir / "checkpoints" / "step-000001"
    updater = Updater(config, load_model(folder, CPU), None, ranks)
    if moments:
        checkpoint.restore_optimizer(folder, updater.model, updater.optimizer, ranks)
    drawn = torch.rand(3)
    assert checkpoint.read_training_progress(folder) == TrainingProgress(0, 1, 3)
    return one_more(updater, ranks, config), drawn


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 2)])
def test_a_checkpoint_of_some_ranks_is_read_by_others(pair: RankPair, tmp_path: Path, writers: int, readers: int) -> None:
    write_family(tmp_path / "model", "llama")
    config = configure(tmp_path, pack_tokens=64, lr=1e-2)
    through = pair(saved, config)[0] if writers == 2 else saved(SINGLE_RANK, config)
    answers = pair(resumed, config) if readers == 2 else [resumed(SINGLE_RANK, config)]
    forgetful, _ = resumed(SINGLE_RANK, config, moments=False)

    def gap(weights: dict[str, Tensor]) -> float:
        return max((weights[name] - value).abs().max().item() for name, value in through.items())

    assert gap(answers[0][0]) < (1e-30 if writers == readers else 1e-5)
    assert gap(forgetful) > 1e-3
    for rank, (_, drawn) in enumerate(answers):
        expected = torch.rand(3, generator=torch.Generator().manual_seed(17 + rank))
        assert torch.equal(drawn, expected) == (rank < writers)


def exported(ranks: Ranks, folder: Path, into: Path) -> None:
    config = configure(folder)
    updater = Updater(config, load_model(folder / "model", CPU), None, ranks)
    export_model(updater.model, into, folder / "model", "bfloat16", ranks)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_model_is_handed_over_whole_and_as_one_rank_would(pair: RankPair, tmp_path: Path, family: str) -> None:
    write_family(tmp_path / "model", family)
    pair(exported, tmp_path, tmp_path / "both")
    exported(SINGLE_RANK, tmp_path, tmp_path / "alone")
    names = {file.name for file in (tmp_path / "alone").iterdir()}
    assert {file.name for file in (tmp_path / "both").iterdir()} == names
    for name in names:
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


def refused(ranks: Ranks) -> tuple[str, int, list[int]]:
    """Rank 0's error and value, everywhere."""

    def fail() -> None:
        raise ModelError(f"rank {ranks.rank} fails")

    try:
        ranks.run_on_first(fail)
    except ModelError as error:
        return str(error), ranks.run_on_first(lambda: ranks.rank), ranks.all_gather(ranks.rank)
    return "", -1, []


def test_what_rank_0_finds_all_know(pair: RankPair) -> None:
    assert pair(refused) == [("rank 0 fails", 0, [0, 1])] * 2
    assert refused(SINGLE_RANK) == ("rank 0 fails", 0, [0])


def unwritable(ranks: Ranks, folder: Path) -> tuple[str, list[int]]:
    """The error of a model that rank 0 cannot write, and that all go on together."""
    model = load_model(folder / "model", CPU)
    with pytest.raises(RunFileError) as caught:
        export_model(model, folder / "file" / "final", folder / "model", "float32", ranks)
    with pytest.raises(RunFileError):
        write_model(model, folder / "file" / "final", folder / "model", ranks=ranks)
    return str(caught.value), ranks.all_gather(ranks.rank)


def test_what_rank_0_cannot_write_all_know(pair: RankPair, tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    (tmp_path / "file").touch()
    first, other = pair(unwritable, tmp_path)
    assert first == other
    assert f"{tmp_path}/file/final could not be written (" in first[0]
    assert first[1] == [0, 1]


def crashing(ranks: Ranks) -> tuple[str, list[int]]:
    """What a rank raises when rank 0 does what is no error of ours, and that all go on together."""
    with pytest.raises(RankError if ranks.rank else ZeroDivisionError) as caught:
        ranks.run_on_first(lambda: 1 // 0)
    return str(caught.value), ranks.all_gather(ranks.rank)


def test_where_rank_0_crashes_the_others_point_at_it(pair: RankPair) -> None:
    first, other = pair(crashing)
    assert first == ("integer division or modulo by zero", [0, 1])
    assert other == (RANK_0_FAILED, [0, 1])


def held(ranks: Ranks, config: Config, *, trained: bool) -> list[int]:
    """Numbers of a policy that this rank has: of all, then after a forward pass without a gradient, and after one with."""
    model = load_model(config.model.path, CPU).requires_grad_(trained)
    pack = packs_of(random_groups(0, 1), config)[0]

    def count() -> int:
        return sum((value.to_local() if isinstance(value, DTensor) else value).numel() for value in model.parameters())

    counts, policy = [count()], ranks.shard_policy(Policy(model))
    with torch.no_grad():
        policy(pack)
    counts.append(count())
    logprob_A, _ = policy(pack)
    if trained:
        logprob_A.sum().backward()
    return [*counts, count()]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_policy_that_is_not_trained_is_never_kept_whole(pair: RankPair, tmp_path: Path, family: str) -> None:
    write_family(tmp_path / "model", family)
    config = configure(tmp_path)
    numbers, *after = zip(*pair(partial(held, trained=False), config), strict=True)
    assert [sum(count) for count in after] == [numbers[0]] * 2
    numbers, ahead, after = zip(*pair(partial(held, trained=True), config), strict=True)
    assert sum(ahead) > numbers[0] == sum(after)
