from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.trainer import checkpoint
from learner.trainer.checkpoint import Progress
from learner.trainer.model import load_model
from learner.trainer.publish import export
from learner.trainer.ranks import ALONE, Ranks, balance
from learner.trainer.update import Outcome, Updater
from tests.trainer.builders import CPU, configure, write_tiny
from tests.trainer.families import write_family
from tests.trainer.intake import FakeIntake
from tests.trainer.pair import Pair
from tests.trainer.test_update import exact, in_float64, packs_of, random_groups
from treegrpo.config import Config
from treegrpo.errors import ModelError
from treegrpo.handoff import Message, Report, socket_path
from treegrpo.tree import Group


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as both:
        yield both


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


def steps(updater: Updater, ranks: Ranks, config: Config, batches: list[list[list[Group]]], first: int = 0) -> Trained:
    """One update for each batch of minibatches of groups."""
    packs = [[in_float64(packs_of(groups, config)) for groups in batch] for batch in batches]
    updates = [updater.update([ranks.share_out(part) for part in batch], first + number) for number, batch in enumerate(packs)]
    return Trained(
        [update.outcomes for update in updates],
        [update.loss for update in updates],
        [update.grad_norm for update in updates],
        [{name: value for name, value in update.tally.sums.items() if name != "tokens"} for update in updates],
        ranks.whole_state(updater.model, torch.float64),
        [len(part) for batch in packs for part in batch],
    )


def train(ranks: Ranks, config: Config, batches: list[list[list[Group]]]) -> Trained:
    return steps(load(config, config.model.path, ranks), ranks, config, batches)


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
def test_two_ranks_take_the_steps_of_one(pair: Pair, tmp_path: Path, case: str) -> None:
    family, options = CASES[case]
    write_family(tmp_path / "model", family)
    config = configure(tmp_path, pack_tokens=64, lr=1e-2, **options)
    batches = [[random_groups(seed, 3), random_groups(seed + 1, 2)][: config.train.minibatches] for seed in (0, 10)]
    alone = train(ALONE, config, batches)
    both, other = pair(train, config, batches)
    assert any(count % 2 for count in alone.packs)
    assert max(alone.packs) > 2
    assert_same(both, alone)
    assert other.weights == {}
    assert other.tallies == both.tallies


def test_bfloat16_on_two_ranks_is_bfloat16_on_one(pair: Pair, tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    config = configure(tmp_path, pack_tokens=64)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    alone, both = (
        one.losses + one.norms
        for one in (train(ALONE, config, [[random_groups(0, 3)]]), pair(train, config, [[random_groups(0, 3)]])[0])
    )
    assert both == pytest.approx(alone, rel=1e-5)


def test_a_rank_may_go_empty_handed_and_so_may_both(pair: Pair, tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    config = configure(tmp_path, pack_tokens=4096)
    batches = [[random_groups(1, 1)], [[]], [random_groups(2, 1)]]
    alone = train(ALONE, config, batches)
    assert alone.packs == [1, 0, 1]
    assert alone.outcomes == [("applied",), ("no_signal",), ("applied",)]
    assert_same(pair(train, config, batches)[0], alone)


def spoilt(ranks: Ranks, config: Config, groups: list[Group]) -> Trained:
    """A step in which one rank's first pack is not finite, and one that is sound."""
    updater = load(config, config.model.path, ranks)
    own = ranks.share_out(in_float64(packs_of(groups, config)))
    if ranks.rank == ranks.world - 1:
        own[0].targets.sampled_A[0] = -torch.inf
    refused = updater.update([own], 0)
    weights = ranks.whole_state(updater.model, torch.float64)
    sound = updater.update([ranks.share_out(in_float64(packs_of(groups, config)))], 1)
    return Trained([refused.outcomes, sound.outcomes], [], [], [], weights, [])


def test_what_is_not_finite_on_one_rank_is_applied_on_none(pair: Pair, tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    config = configure(tmp_path, pack_tokens=64)
    both, other = pair(spoilt, config, random_groups(3, 2))
    assert both.outcomes == other.outcomes == [("not_finite",), ("applied",)]
    start = exact(load_model(tmp_path / "model", CPU)).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in both.weights.items())


def one_more(updater: Updater, ranks: Ranks, config: Config) -> dict[str, Tensor]:
    """The weights after a second step, which goes where the moments of the first one say."""
    updater.update([ranks.share_out(packs_of(random_groups(5, 3), config))], 1)
    return ranks.whole_state(updater.model, torch.float32)


def saved(ranks: Ranks, config: Config) -> dict[str, Tensor]:
    """A policy one step into its training and its checkpoint; the weights after one more."""
    updater = Updater(config, load_model(config.model.path, CPU), None, ranks)
    updater.update([ranks.share_out(packs_of(random_groups(4, 3), config))], 0)
    torch.manual_seed(17 + ranks.rank)
    root = config.run.dir / "checkpoints"
    checkpoint.save(root, Progress(0, 1, 3), updater.model, updater.optimizer, config.model.path, 2, ranks)
    return one_more(updater, ranks, config)


def resumed(ranks: Ranks, config: Config, *, moments: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """The weights one step after the checkpoint, and the first random numbers after it."""
    folder = config.run.dir / "checkpoints" / "step-000001"
    updater = Updater(config, load_model(folder, CPU), None, ranks)
    if moments:
        checkpoint.restore(folder, updater.model, updater.optimizer, ranks)
    drawn = torch.rand(3)
    assert checkpoint.read_progress(folder) == Progress(0, 1, 3)
    return one_more(updater, ranks, config), drawn


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 2)])
def test_a_checkpoint_of_some_ranks_is_read_by_others(pair: Pair, tmp_path: Path, writers: int, readers: int) -> None:
    write_family(tmp_path / "model", "llama")
    config = configure(tmp_path, pack_tokens=64, lr=1e-2)
    through = pair(saved, config)[0] if writers == 2 else saved(ALONE, config)
    answers = pair(resumed, config) if readers == 2 else [resumed(ALONE, config)]
    forgetful, _ = resumed(ALONE, config, moments=False)

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
    export(updater.model, into, folder / "model", "bfloat16", ranks)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_model_is_handed_over_whole_and_as_one_rank_would(pair: Pair, tmp_path: Path, family: str) -> None:
    write_family(tmp_path / "model", family)
    pair(exported, tmp_path, tmp_path / "both")
    exported(ALONE, tmp_path, tmp_path / "alone")
    names = {file.name for file in (tmp_path / "alone").iterdir()}
    assert {file.name for file in (tmp_path / "both").iterdir()} == names
    for name in names:
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


def refused(ranks: Ranks) -> tuple[str, int, list[int]]:
    """Rank 0's error and value, everywhere."""

    def fail() -> None:
        raise ModelError(f"rank {ranks.rank} fails")

    try:
        ranks.first(fail)
    except ModelError as error:
        return str(error), ranks.first(lambda: ranks.rank), ranks.gather(ranks.rank)
    return "", -1, []


def test_what_rank_0_finds_all_know(pair: Pair) -> None:
    assert pair(refused) == [("rank 0 fails", 0, [0, 1])] * 2
    assert refused(ALONE) == ("rank 0 fails", 0, [0])


@given(st.lists(st.floats(0, 1e6), max_size=30), st.integers(1, 5), st.randoms())
def test_packs_are_dealt_out_once_each_in_the_fewest_and_shortest_rounds(costs: list[float], world: int, random: Any) -> None:
    def seconds(shares: list[list[int]]) -> float:
        rounds = max(map(len, shares))
        return sum(max(costs[share[n]] if n < len(share) else 0.0 for share in shares) for n in range(rounds))

    shares = balance(costs, world)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    assert max(map(len, shares)) == -(-len(costs) // world)
    order = list(range(len(costs)))
    random.shuffle(order)
    assert seconds(shares) <= seconds([order[rank::world] for rank in range(world)]) * (1 + 1e-9)


def test_loads_are_even_where_packs_allow_it() -> None:
    rng = np.random.default_rng(0)
    costs = rng.lognormal(size=40).tolist()
    loads = [sum(costs[index] for index in share) for share in balance(costs, 4)]
    assert max(loads) < 1.1 * sum(costs) / 4
    assert balance([1, 9, 5, 8, 5], 2) == [[1, 4], [3, 2, 0]]


TORCHRUN = ("torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "-m")


def started(config: Config, steps: int, *before: str) -> subprocess.Popen[str]:
    """A trainer of two ranks, of torchrun's or its own making, for the intake of ``config``."""
    keys = {"run.dir": config.run.dir, "model.path": config.model.path, "train.batch": 2, "train.minibatches": 2}
    keys |= {"train.steps": steps, "learner.metrics": "127.0.0.1:0", "train.processes": 1 if before else 2}
    return subprocess.Popen(
        [sys.executable, "-m", *before, "learner.trainer", *(part for k, v in keys.items() for part in (f"--{k}", str(v)))],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_tiny(tmp_path / "model")
    (tmp_path / "run").mkdir()
    return configure(tmp_path)


def test_torchrun_trains_to_the_end(config: Config) -> None:
    with FakeIntake(socket_path(config.run.dir)) as intake:
        _, said = (process := started(config, 2, *TORCHRUN)).communicate(timeout=100)
    assert process.returncode == 0, said
    assert [report["outcomes"] for report in intake.reports] == [["applied", "applied"]] * 2
    assert [report["position"] for report in intake.reports] == [2, 4]
    assert intake.evaluations == ["0.0", "0.0", "0.2", "0.2"]
    folder = checkpoint.newest(config.run.dir / "checkpoints")
    assert folder is not None
    assert checkpoint.read_progress(folder).step == 2
    published = load_model(config.run.dir / "weights" / "0.2", CPU)
    final = load_model(config.run.dir / "checkpoints" / "final", CPU)
    assert all(torch.equal(a, b) for a, b in zip(published.parameters(), final.parameters(), strict=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_all_drains_and_the_death_of_a_rank_ends_the_run_with_a_sentence(
    config: Config, number: signal.Signals
) -> None:
    reported = threading.Event()

    def answers(request: Message) -> bool:
        if isinstance(request, Report):
            reported.set()
        return True

    with FakeIntake(socket_path(config.run.dir), answers=answers):
        process = started(config, 100_000)
        assert reported.wait(100)
        os.kill(process.pid if number == signal.SIGTERM else rank_of(process, 1), number)
        _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    left = [*(config.run.dir / "checkpoints").glob("step-*/progress.json")]
    if number == signal.SIGTERM:
        assert (process.returncode, errors, len(left)) == (128 + number, [], 1)
    else:
        lost = "error: Rank 0 of the trainer lost another; the log has why that one ended."
        assert (process.returncode, errors, left) == (2, [lost], [])


def rank_of(process: subprocess.Popen[str], rank: int) -> int:
    """The process id of one of the ranks that torchrun runs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {int(child): Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children}
    return next(child for child, words in environments.items() if f"RANK={rank}".encode() in words)
