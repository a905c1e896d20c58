"""One branch: ids, turns, truncation, errors and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from services.environments.base import Forking
from services.sampler.engines.base import Completion, SamplingParams
from services.sampler.expansion.expander import Expander, LeaseControl
from tests.sampler.expansion_harness import FAST
from tests.sampler.fakes import EOS, MERGED, FakeEngine, FakeEnvironment, FakeText, Session, deep, lease, plan, turns
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason
from treegrpo.core.step import ROOT, PolicyVersion, StepStatus, Subtree, TokenIds, VersionSpan
from treegrpo.errors import EngineError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.wire.size_limits import TEXT_LENGTH

CHAIN = plan(1, 0, 0)


async def expand(
    given: Lease,
    engine: FakeEngine,
    environment: FakeEnvironment | None = None,
    control: LeaseControl | None = None,
    retries: int = 2,
) -> tuple[list[Subtree], LeaseEnd]:
    subtrees: list[Subtree] = []
    expander = Expander(engine, environment or FakeEnvironment(), FakeText(), retries=retries, timings=FAST)
    return subtrees, await expander.expand_lease(given, subtrees.append, control or LeaseControl())


async def test_a_prefix_is_the_prompt_and_the_ids_exactly_as_sampled() -> None:
    """Trap 2: "ok" is sampled as two ids and encoded as one; the policy's own stays two."""
    engine = FakeEngine(lambda prefix: "ok s!" if turns(prefix) < 1 else "ok a!")
    (chain,), _ = await expand(lease(CHAIN), engine)
    first, second = chain.steps
    assert MERGED in chain.prompt
    assert MERGED in first.observation
    assert MERGED not in first.action
    assert engine.prefixes[0] == chain.prompt.tolist()
    assert engine.prefixes[1] == [*chain.prompt, *first.action, *first.observation]
    assert second.observation.size == 0


async def test_a_branch_continues_from_the_ids_of_its_path() -> None:
    engine = FakeEngine(deep(2))
    subtrees, _ = await expand(lease(plan(1, 1, 8)), engine)
    chain = subtrees[0]
    for branch in subtrees[1:]:
        path = chain.steps[: branch.parent]
        prefix = [*chain.prompt, *(i for step in path for i in (*step.action, *step.observation))]
        assert prefix in engine.prefixes
        assert branch.steps[0].parent == branch.parent
        assert branch.prompt.size == 0


async def test_the_tokens_that_end_a_turn_stay() -> None:
    """Trap 3: an end-of-sequence token and a stop string are part of the action."""
    engine = FakeEngine(lambda prefix: "no tool" if turns(prefix) < 1 else "a!")
    (chain,), _ = await expand(lease(CHAIN), engine)
    assert chain.steps[0].action[-1] == EOS
    assert not chain.steps[0].valid
    assert chain.steps[1].action.tolist() == [ord("a"), ord("!")]
    assert engine.samplings[0].stop == FakeEnvironment.stop


async def test_after_max_turns_one_more_turn_follows_without_tools() -> None:
    """Trap 13: it is a leaf of its own and has no observation."""
    environment = FakeEnvironment()
    (chain,), _ = await expand(lease(CHAIN), FakeEngine(lambda _prefix: "s!"), environment)
    assert len(chain.steps) == CHAIN.max_turns + 1
    assert environment.calls == CHAIN.max_turns
    assert [step.tool for step in chain.steps] == ["look"] * CHAIN.max_turns + [""]
    assert chain.steps[-1].observation.size == 0
    (leaf,) = chain.leaves
    assert (leaf.node, leaf.metrics["last"], leaf.rewards["right"]) == (chain.steps[-1].node, 1.0, 0.0)


async def test_a_tool_call_is_noted_no_longer_than_the_learner_takes() -> None:
    action, context = "x" * TEXT_LENGTH + "s!", 9 * TEXT_LENGTH
    large = lease(plan(1, 0, 0, max_turns=1, max_action_tokens=2 * TEXT_LENGTH, max_context=context))
    (chain,), _ = await expand(large, FakeEngine(lambda _prefix: action, context))
    assert chain.steps[0].tool + chain.steps[0].tool_arguments == "look" + action[: TEXT_LENGTH - 4]


async def test_a_branch_counts_the_turns_of_its_path() -> None:
    subtrees, _ = await expand(lease(plan(1, 1, 20)), FakeEngine(lambda _prefix: "s!"))
    for branch in subtrees[1:]:
        assert branch.parent + len(branch.steps) == CHAIN.max_turns + 1


async def test_a_turn_that_is_too_long_ends_the_episode_as_truncated() -> None:
    environment = FakeEnvironment()
    (chain,), end = await expand(lease(plan(1, 0, 0, max_action_tokens=5)), FakeEngine(lambda _prefix: "x" * 30), environment)
    (step,) = chain.steps
    assert step.status is StepStatus.TRUNCATED
    assert FakeText().decode(step.action) == "xxxxx"
    (leaf,) = chain.leaves
    assert leaf.metrics["last"] == 1.0
    assert leaf.rewards["length"] == pytest.approx(-0.05)
    assert end.reason is LeaseEndReason.COMPLETE


async def test_a_context_that_is_full_ends_the_episode_as_truncated() -> None:
    """Trap 14: nothing is cut off the left, and no call asks for more than there is room for."""
    prompt = "Q: ok?"
    (chain,), _ = await expand(lease(plan(1, 0, 0, max_context=19), prompt=prompt), FakeEngine(lambda _prefix: "s!"))
    assert [step.status for step in chain.steps] == [StepStatus.OK, StepStatus.TRUNCATED]
    assert chain.steps[-1].observation.size == 0
    assert chain.steps[-1].tool == "look"
    assert chain.leaves[0].metrics["last"] == 0.0
    assert chain.steps[-1].cost.tool_calls == 1


async def test_max_tokens_is_what_the_context_of_plan_and_engine_leave() -> None:
    for context, engine_context in ((30, 1000), (1000, 30)):
        engine = FakeEngine(deep(2), engine_context)
        await expand(lease(plan(1, 0, 0, max_context=context, max_action_tokens=20)), engine)
        asked = [(len(prefix), sampling.max_tokens) for prefix, sampling in zip(engine.prefixes, engine.samplings, strict=True)]
        assert asked == [(5, 20), (12, 18), (19, 11)]


async def test_a_prompt_that_does_not_fit_fails_the_lease_with_a_sentence() -> None:
    subtrees, end = await expand(lease(plan(max_context=16), prompt="x" * 16), FakeEngine(deep(1)))
    assert not subtrees
    assert (end.reason, end.forgone) == (LeaseEndReason.FAILED, 4)
    assert "rollout.max_context" in end.error


async def test_an_engine_error_is_retried() -> None:
    failures = iter([True, True, False])

    def script(_prefix: str) -> str:
        if next(failures, False):
            raise EngineError("busy")
        return "a!"

    (chain,), end = await expand(lease(CHAIN), FakeEngine(script))
    assert chain.steps[0].status is StepStatus.OK
    assert end.reason is LeaseEndReason.COMPLETE


async def test_an_engine_that_stays_broken_leaves_the_branch_without_a_reward() -> None:
    metrics = SamplerMetrics()

    def script(prefix: str) -> str:
        if turns(prefix) == 1:
            raise EngineError("broken")
        return "s!"

    subtrees: list[Subtree] = []
    expander = Expander(FakeEngine(script), FakeEnvironment(), FakeText(), retries=2, metrics=metrics, timings=FAST)
    end = await expander.expand_lease(lease(CHAIN), subtrees.append, LeaseControl())
    (chain,) = subtrees
    assert [step.status for step in chain.steps] == [StepStatus.OK, StepStatus.ENGINE_ERROR]
    assert chain.steps[1].action.size == chain.steps[1].logprobs.size == 0
    assert chain.leaves == ()
    assert end.reason is LeaseEndReason.FAILED, "a lease without a single leaf is not complete"
    assert metrics.registry.get_sample_value("treegrpo_sampler_errors_total", {"type": "EngineError"}) == 3


class InvalidLogprobEngine(FakeEngine):
    """Its first ``times`` answers have log-probabilities that no policy gives."""

    def __init__(self, times: int, value: float) -> None:
        super().__init__(deep(0))
        self.times, self.value = times, value

    async def generate(self, prefix: Sequence[int] | TokenIds, sampling: SamplingParams) -> Completion:
        completion = await super().generate(prefix, sampling)
        if len(self.prefixes) > self.times:
            return completion
        return replace(completion, logprobs=np.full_like(completion.logprobs, self.value))


@pytest.mark.parametrize("value", [np.nan, -np.inf, 0.31])
async def test_invalid_logprobs_are_an_engine_error_and_are_paid_for(value: float) -> None:
    (whole,), _ = await expand(lease(CHAIN), InvalidLogprobEngine(0, value))
    (chain,), end = await expand(lease(CHAIN), InvalidLogprobEngine(1, value))
    assert end.reason is LeaseEndReason.COMPLETE
    assert np.isfinite(chain.steps[0].logprobs).all()
    assert chain.cost.decoded == 2 * whole.cost.decoded
    (chain,), end = await expand(lease(CHAIN), InvalidLogprobEngine(3, value))
    assert chain.steps[0].status is StepStatus.ENGINE_ERROR
    assert chain.cost.decoded == 3 * whole.cost.decoded


@pytest.mark.parametrize("forking", ["stateless", "fork", "replay"])
async def test_a_tool_error_is_retried_from_the_state_before_it(forking: Forking) -> None:
    environment = FakeEnvironment(forking)
    failures = iter([True, True])
    environment.fail = lambda session, _action: len(session.actions) == 2 and next(failures, False)
    (chain,), _ = await expand(lease(CHAIN), FakeEngine(deep(2)), environment)
    assert [step.status for step in chain.steps] == [StepStatus.OK] * 3
    assert chain.leaves[0].metrics["actions"] == 3.0
    repeated = 2 if forking == "replay" else 0
    assert chain.steps[1].cost.tool_calls == 3 + repeated  # two failed, one worked


async def test_a_tool_that_stays_broken_keeps_the_ids_and_gives_no_reward() -> None:
    environment = FakeEnvironment()
    environment.fail = lambda _session, _action: True
    (chain,), _ = await expand(lease(CHAIN), FakeEngine(deep(2)), environment)
    (step,) = chain.steps
    assert step.status is StepStatus.TOOL_ERROR
    assert len(step.action) == len(step.logprobs) == 2
    assert step.cost.tool_calls == 3
    assert step.cost.decoded == 2
    assert chain.leaves == ()


async def test_a_failed_branch_does_not_take_the_group_along() -> None:
    """Trap 8: the others go on, and nothing is drawn below the failed step."""
    environment = FakeEnvironment()
    broken: list[Session] = []

    def fail(session: Session, _action: str) -> bool:
        if not broken and len(session.actions) == 2:
            broken.append(session)
        return session in broken

    environment.fail = fail
    one = lease(plan(2, 2, 3))
    subtrees, end = await expand(one, FakeEngine(deep(2)), environment, retries=0)
    failed = [step.node for s in subtrees for step in s.steps if step.status.failed]
    assert len(failed) == 1
    assert len(subtrees) == one.plan.leaves
    assert sum(len(s.leaves) for s in subtrees) == one.plan.leaves - 1
    assert end == LeaseEnd(one.id, LeaseEndReason.COMPLETE)


async def test_a_chain_that_fails_at_once_leaves_the_root_to_expand() -> None:
    calls = iter(range(100))

    def script(_prefix: str) -> str:
        if next(calls) == 0:
            raise EngineError("once")
        return "a!"

    subtrees, _ = await expand(lease(plan(1, 1, 2)), FakeEngine(script), retries=0)
    assert [s.parent for s in subtrees] == [ROOT] * 3
    assert [len(s.leaves) for s in subtrees] == [0, 1, 1]
    assert subtrees[0].prompt.size


async def test_each_step_carries_what_it_cost() -> None:
    (chain,), _ = await expand(lease(CHAIN), FakeEngine(deep(1)))
    costs = [step.cost for step in chain.steps]
    assert [(c.prefilled, c.cached, c.decoded, c.tool_calls) for c in costs] == [(2, 3, 2, 1), (6, 6, 5, 0)]
    assert all(c.seconds > 0 for c in costs)


async def test_logprobs_and_version_spans_go_through_as_they_are() -> None:
    engine = FakeEngine(deep(0))

    def script(_prefix: str) -> str:
        engine.version = PolicyVersion(1, 1)
        return "ok a!"

    engine.script = script
    (chain,), _ = await expand(lease(CHAIN), engine)
    (step,) = chain.steps
    assert step.spans == (VersionSpan(PolicyVersion(1, 0), 0, 1), VersionSpan(PolicyVersion(1, 1), 1, 5))
    assert step.logprobs.tolist() == (-np.arange(1, 6)).tolist()
