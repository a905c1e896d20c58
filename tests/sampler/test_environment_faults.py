"""Environments that do what none may do: the branch is left out, the others go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from services.environments.base import Outcome
from services.sampler.expansion.expander import Expander, LeaseControl
from tests.sampler.fakes import FakeEngine, FakeEnvironment, FakeText, Session, deep, lease, plan
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason
from treegrpo.core.step import StepStatus, Subtree
from treegrpo.observability.metrics import SamplerMetrics

CHAIN = plan(1, 0, 0)


class ScoringEnvironment(FakeEnvironment):
    """Scores with ``score``, which is called with the number of the episode."""

    def __init__(self, score: Callable[[int], Any]) -> None:
        super().__init__()
        self._score = score
        self._episodes = 0

    def score(self, state: Session) -> Mapping[str, float]:
        self._episodes += 1
        return self._score(self._episodes)


async def expand(
    given: Lease, environment: FakeEnvironment, metrics: SamplerMetrics | None = None, tools: int = 1
) -> tuple[list[Subtree], LeaseEnd]:
    subtrees: list[Subtree] = []
    expander = Expander(FakeEngine(deep(tools)), environment, FakeText(), retries=2, metrics=metrics)
    return subtrees, await expander.expand_lease(given, subtrees.append, LeaseControl())


def errors(metrics: SamplerMetrics, kind: str) -> float | None:
    return metrics.registry.get_sample_value("treegrpo_sampler_errors_total", {"type": kind})


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, None, "much"])
async def test_a_reward_that_is_no_number_leaves_out_its_branch_alone(reward: Any) -> None:
    environment = ScoringEnvironment(lambda episode: {"right": reward if episode == 2 else 1.0})
    one = lease(plan(2, 1, 2))
    subtrees, end = await expand(one, environment)
    assert end == LeaseEnd(one.id, LeaseEndReason.COMPLETE)
    assert len(subtrees) == one.plan.leaves
    (failed,) = [subtree for subtree in subtrees if not subtree.leaves]
    assert failed.steps[-1].status is StepStatus.ENVIRONMENT_ERROR
    assert len(failed.steps[-1].action) == len(failed.steps[-1].logprobs) > 0


async def test_rewards_whose_sum_is_not_finite_are_no_reward() -> None:
    (chain,), end = await expand(lease(CHAIN), ScoringEnvironment(lambda _: {"a": 1e308, "b": 1e308}))
    assert not chain.leaves
    assert "finite" in end.error


async def test_a_bug_is_counted_by_its_type_named_once_and_tried_no_second_time(caplog: pytest.LogCaptureFixture) -> None:
    environment, metrics = FakeEnvironment(), SamplerMetrics()
    calls: list[str] = []

    def explode(_session: Session, action: str) -> bool:
        calls.append(action)
        raise KeyError("episode")

    environment.fail = explode
    subtrees, end = await expand(lease(plan(2, 1, 2)), environment, metrics)
    assert len(calls) == errors(metrics, "KeyError") == 6
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]
    assert {subtree.steps[-1].status for subtree in subtrees} == {StepStatus.ENVIRONMENT_ERROR}
    assert end.reason is LeaseEndReason.FAILED, "nothing is left of it"
    assert "KeyError: 'episode'" in end.error
    assert sum(subtree.cost.decoded for subtree in subtrees) == 12, "what it cost is on the steps"
    assert end.unaccounted.tokens == 0


async def test_a_time_out_of_the_environments_own_is_a_fault_like_any_other() -> None:
    environment, metrics = FakeEnvironment(), SamplerMetrics()

    def late(_session: Session, _action: str) -> bool:
        raise TimeoutError

    environment.fail = late
    (chain,), _ = await expand(lease(CHAIN), environment, metrics)
    assert chain.steps[-1].status is StepStatus.ENVIRONMENT_ERROR
    assert errors(metrics, "TimeoutError") == 1


class Endless(FakeEnvironment):
    async def step(self, state: Session, action: str, *, last: bool) -> Outcome[Session]:
        return await super().step(state, action, last=False)


class Mute(FakeEnvironment):
    async def step(self, state: Session, action: str, *, last: bool) -> Outcome[Session]:
        return None  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("environment", "named"), [(Endless(), "last=True"), (Mute(), "AttributeError")])
async def test_an_environment_that_breaks_its_protocol_is_named(environment: FakeEnvironment, named: str) -> None:
    _, end = await expand(lease(CHAIN), environment, tools=99)
    assert end.reason is LeaseEndReason.FAILED
    assert named in end.error
