"""Expands a lease into a group: M trees, each on its own, by L rounds of N expansions.

    lease ─► M × ( chain ─► round 1: N branches ─► … ─► round L ) ─► lease end
                     └──────────── every finished branch ───────────► subtree

In a round the nodes to continue are drawn uniformly, with replacement, from {root} ∪ non-leaf nodes of the tree (Tree
Search for LLM Agent Reinforcement Learning, arXiv 2509.21240). A tree never waits for another tree; its next round
begins when its own branches are done. A lease may bring what another sampler has made of the same group: the trees
begin with that, and what is missing is drawn just as the other sampler would have drawn it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from services.environments.base import Environment
from services.sampler.engines.base import Engine
from services.sampler.expansion.availability import AvailabilityMonitor, CallTimings
from services.sampler.expansion.branch import Branch, first_node
from services.sampler.expansion.call_timer import CallTimer
from services.sampler.expansion.episode_runner import EpisodeRunner
from services.sampler.expansion.lease_budget import TreeBudget
from services.sampler.expansion.lease_control import LeaseControl
from services.sampler.expansion.state_cache import StateCache
from services.sampler.text.encoding import TextCodec, render_prompt
from services.sampler.text.prompts import check_prompt
from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason
from treegrpo.core.step import ROOT, Subtree, TokenIds
from treegrpo.core.tree import Tree
from treegrpo.errors import DeadlineError
from treegrpo.observability.metrics import SamplerMetrics

__all__ = ["Emit", "Expander", "LeaseControl", "draw_nodes"]

log = logging.getLogger(__name__)
Emit = Callable[[Subtree], Awaitable[None] | None]


def draw_nodes(nodes: Sequence[int], count: int, seed: tuple[int, int, int]) -> list[int]:
    """Draw ``count`` of ``nodes``, uniformly, with replacement.

    ``seed`` is (lease seed, tree, round): the same tree gets the same draws.
    """
    return [nodes[i] for i in np.random.default_rng(seed).integers(len(nodes), size=count)]


class Expander:
    """Expands leases into trees. Safe to use for many leases at once.

    Example:
        end = await Expander(engine, environment, tokenizer, retries=2).expand_lease(lease, subtrees.append, LeaseControl())
    """

    def __init__(
        self,
        engine: Engine,
        environment: Environment[Any],
        tokenizer: TextCodec,
        *,
        retries: int,
        metrics: SamplerMetrics | None = None,
        timings: CallTimings | None = None,
    ) -> None:
        """Join an engine and an environment.

        Args:
            engine: samples the actions.
            environment: answers them and scores episodes.
            tokenizer: the engine's, for prompts and observations.
            retries: times an engine or tool call is tried again before its branch fails.
            metrics: where tokens, errors and seconds are counted; None: metrics that nothing exports.
            timings: limits and delays of engine and tool calls; None: the defaults.
        """
        self._metrics = metrics or SamplerMetrics()
        self._text = tokenizer
        self._environment = environment
        self._episodes = EpisodeRunner(engine, environment, tokenizer, retries, self._metrics, timings or CallTimings())

    @property
    def call_timer(self) -> CallTimer:
        """Which calls are in flight, and the last progress."""
        return self._episodes.call_timer

    @property
    def availability_monitors(self) -> tuple[AvailabilityMonitor, AvailabilityMonitor]:
        """Of the environment's tools and of the engine."""
        return self._episodes.tools, self._episodes.engine

    async def expand_lease(self, lease: Lease, emit: Emit, control: LeaseControl) -> LeaseEnd:
        """Expand the trees of ``lease`` and pass each finished subtree to ``emit`` at once.

        Never raises but for cancellation: any error ends the lease as FAILED, with its text and with what its unfinished
        branches cost. Branches that were left out because the engine or a tool was unavailable, or because ``control``
        cancelled them, can run under another lease: this one ends as RETURNED.
        """
        run = LeaseRun(lease, self._text, emit, control, self._episodes, self._environment, self._metrics)
        try:
            async with control.work_scope():
                await run.expand_trees()
        except TimeoutError:
            return run.lease_end(LeaseEndReason.RETURNED, "the sampler had to stop, and left out the branches that still ran")
        except Exception as error:  # the edge of a lease: one that fails must not take the others along
            cause = _first_cause(error)
            self._metrics.errors.labels(type(cause).__name__).inc()
            log.exception("lease %s failed", lease.id, exc_info=cause)
            return run.lease_end(LeaseEndReason.FAILED, f"{type(cause).__name__}: {cause}")
        if run.leaves == 0 and run.reason is LeaseEndReason.COMPLETE:
            return run.lease_end(LeaseEndReason.FAILED, f"no branch finished its episode; the last error: {run.error}")
        return run.lease_end(run.reason, run.error if run.reason is LeaseEndReason.RETURNED else "")


class LeaseRun:
    """One lease being expanded."""

    def __init__(
        self,
        lease: Lease,
        text: TextCodec,
        emit: Emit,
        control: LeaseControl,
        episodes: EpisodeRunner,
        environment: Environment[Any],
        metrics: SamplerMetrics,
    ) -> None:
        self._lease = lease
        self._text = text
        self._emit = emit
        self._control = control
        self._episodes = episodes
        self._environment = environment
        self._metrics = metrics
        self._tree_budgets = TreeBudget.for_lease(lease)
        self._started = 0
        """Expansions started, chains not counted."""
        self.leaves = sum(len(subtree.leaves) for subtree in lease.accepted)
        self.reason = LeaseEndReason.COMPLETE
        self.error = ""
        """Why the last branch that failed, or was returned, did so."""

    async def expand_trees(self) -> None:
        """Expand all trees at once, each to its last round."""
        plan, question = self._lease.plan, self._lease.question
        prompt, limit = await render_prompt(self._text, question.prompt), self._episodes.context_limit(plan)
        check_prompt(question, prompt, limit)
        if self._control.stopped:
            self.reason = LeaseEndReason.STOPPED
            return
        if unavailable := self._episodes.unavailable_reason:
            self.reason, self.error = LeaseEndReason.RETURNED, f"{unavailable}; no branch was started"
            return
        async with asyncio.TaskGroup() as trees:
            for tree in range(plan.trees):
                trees.create_task(self._expand_tree(tree, prompt), name=f"tree {self._lease.id}/{tree}")

    def lease_end(self, reason: LeaseEndReason, error: str = "") -> LeaseEnd:
        """The message that ends the lease, with what was not made and what never reached the learner."""
        plan = self._lease.plan
        forgone = plan.leaves - plan.trees - self._started - sum(subtree.index > 0 for subtree in self._lease.accepted)
        unaccounted = Cost.total([budget.unaccounted for budget in self._tree_budgets])
        return LeaseEnd(self._lease.id, reason, forgone, unaccounted, error)

    async def _expand_tree(self, index: int, prompt: TokenIds) -> None:
        plan = self._lease.plan
        tree, states = Tree(prompt=prompt), StateCache(self._environment, self._lease.question)
        for subtree in self._lease.accepted:
            if subtree.tree == index:
                tree.append_subtree(subtree)
        if 0 not in tree.indices:
            await self._run_branch(self._branch(index, tree, states, 0, ROOT))
        for number in range(plan.rounds):
            first = 1 + number * plan.expansions
            if tree.indices.issuperset(range(first, first + plan.expansions)):
                continue
            await self._control.wait_until_running()
            # The nodes of earlier rounds only: another sampler may have made some of this and later rounds.
            nodes = [node for node in tree.expandable() if node < first_node(first, plan)]
            async with asyncio.TaskGroup() as branches:
                for n, parent in enumerate(draw_nodes(nodes, plan.expansions, (self._lease.seed, index, number)), first):
                    if n in tree.indices:
                        continue
                    branch = self._branch(index, tree, states, n, parent)
                    step = self._episodes.first_step_limit(branch)
                    if self._may_start(branch, step):
                        branches.create_task(self._run_expansion(branch, step), name=f"branch {self._lease.id}/{index}/{n}")

    def _branch(self, tree_index: int, tree: Tree, states: StateCache, index: int, parent: int) -> Branch:
        meter = self._tree_budgets[tree_index].start_meter()
        return Branch(self._lease, tree_index, index, parent, tree, states, meter, self._control)

    def _may_start(self, branch: Branch, step: Budget) -> bool:
        if self.reason is LeaseEndReason.RETURNED:
            return False
        if self._control.stopped:
            self.reason = LeaseEndReason.STOPPED
        elif not self._tree_budgets[branch.tree_index].reserve_step(step):
            self.reason = LeaseEndReason.BUDGET
        else:
            self._started += 1
            return True
        return False

    async def _run_expansion(self, branch: Branch, step: Budget) -> None:
        try:
            await self._run_branch(branch)
        finally:
            self._tree_budgets[branch.tree_index].release_step(step)

    async def _run_branch(self, branch: Branch) -> None:
        try:
            subtree, error = await self._episodes.run_episode(branch)
        except DeadlineError as deadline:
            self._return_branch(branch, deadline)
            return
        self.error = error or self.error
        branch.tree.append_subtree(subtree)
        self.leaves += len(subtree.leaves)
        emitted = self._emit(subtree)
        if inspect.isawaitable(emitted):
            await emitted
        branch.meter.delivered = True  # one that is cancelled while it waits here never reaches the learner

    def _return_branch(self, branch: Branch, error: DeadlineError) -> None:
        """Leave a branch out as if it had never been started, but for what it cost."""
        self._metrics.errors.labels(type(error).__name__).inc()
        self._started -= branch.index > 0
        self.reason, self.error = LeaseEndReason.RETURNED, str(error)


def _first_cause(error: Exception) -> Exception:
    """The first error inside nested groups."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
