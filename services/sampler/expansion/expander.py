"""How a group grows: M trees, each on its own, by L rounds of N expansions.

    lease ─► M × ( chain ─► round 1: N branches ─► … ─► round L ) ─► lease end
                     └──────────── every finished branch ───────────► subtree

In a round the nodes to continue are drawn uniformly, with replacement, from {root} ∪ non-leaf nodes of the tree (Tree
Search for LLM Agent Reinforcement Learning, arXiv 2509.21240). A tree never waits for another tree; its next round
begins when its own branches are done. A lease may bring what another sampler has made of the same group: the trees
begin with that, and what is missing is made just as the other would have drawn it.
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
from services.sampler.expansion.availability import Outage
from services.sampler.expansion.branch import Branch, first_node
from services.sampler.expansion.call_timer import Clock
from services.sampler.expansion.episode_runner import Player, Text
from services.sampler.expansion.lease_budget import Allowance
from services.sampler.expansion.lease_control import Gate
from services.sampler.expansion.state_cache import States
from services.sampler.text.encoding import render_prompt
from services.sampler.text.prompts import check_prompt
from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason
from treegrpo.core.step import ROOT, Subtree, TokenIds
from treegrpo.core.tree import Tree
from treegrpo.errors import DeadlineError
from treegrpo.observability.metrics import SamplerMetrics

__all__ = ["Emit", "Expander", "Gate", "draw"]

log = logging.getLogger(__name__)
Emit = Callable[[Subtree], Awaitable[None] | None]


def draw(nodes: Sequence[int], count: int, seed: tuple[int, int, int]) -> list[int]:
    """``count`` of ``nodes``, uniformly, with replacement.

    ``seed`` is (lease seed, tree, round): the same tree gets the same draws.
    """
    return [nodes[i] for i in np.random.default_rng(seed).integers(len(nodes), size=count)]


class Expander:
    """Turns leases into trees. Safe to use for many leases at once.

    Example:
        end = await Expander(engine, environment, tokenizer, retries=2).grow(lease, subtrees.append, Gate())
    """

    def __init__(
        self,
        engine: Engine,
        environment: Environment[Any],
        tokenizer: Text,
        *,
        retries: int,
        metrics: SamplerMetrics | None = None,
    ) -> None:
        """Join an engine and an environment.

        Args:
            engine: samples the actions.
            environment: answers them and scores episodes.
            tokenizer: the engine's, for prompts and observations.
            retries: times an engine or tool call is tried again before its branch is left out.
            metrics: where tokens, errors and seconds are counted; None counts for nobody.
        """
        self._metrics = metrics or SamplerMetrics()
        self._text = tokenizer
        self._environment = environment
        self._player = Player(engine, environment, tokenizer, retries, self._metrics)

    @property
    def clock(self) -> Clock:
        """How turns go."""
        return self._player.clock

    @property
    def outages(self) -> tuple[Outage, Outage]:
        """Of the environment's tools and of the engine."""
        return self._player.outages

    async def grow(self, lease: Lease, emit: Emit, gate: Gate) -> LeaseEnd:
        """Grow the trees of ``lease`` and hand each finished subtree to ``emit`` at once.

        Never raises but for cancellation: whatever went wrong ends the lease as FAILED, with its text and with what
        its unfinished branches cost. What was left out because the engine or a tool is away, or at the gate's cut, is for
        another lease: this one ends as RETURNED.
        """
        growth = _Growth(lease, self._text, emit, gate, self._player, self._environment, self._metrics)
        try:
            async with gate.working():
                await growth.run()
        except TimeoutError:
            return growth.end(LeaseEndReason.RETURNED, "what still ran when its sampler had to end was left out")
        except Exception as error:  # the edge of a lease: one that fails must not take the others along
            cause = _first(error)
            self._metrics.errors.labels(type(cause).__name__).inc()
            log.exception("lease %s failed", lease.id, exc_info=cause)
            return growth.end(LeaseEndReason.FAILED, f"{type(cause).__name__}: {cause}")
        if growth.leaves == 0 and growth.reason is LeaseEndReason.COMPLETE:
            return growth.end(LeaseEndReason.FAILED, f"no branch came to the end of its episode; the last one: {growth.error}")
        return growth.end(growth.reason, growth.error if growth.reason is LeaseEndReason.RETURNED else "")


class _Growth:
    """One lease being worked on."""

    def __init__(
        self,
        lease: Lease,
        text: Text,
        emit: Emit,
        gate: Gate,
        player: Player,
        environment: Environment[Any],
        metrics: SamplerMetrics,
    ) -> None:
        self._lease = lease
        self._text = text
        self._emit = emit
        self._gate = gate
        self._player = player
        self._environment = environment
        self._metrics = metrics
        self._allowances = Allowance.per_tree(lease)
        """Of each tree."""
        self._begun = 0
        """Expansions started, chains not counted."""
        self.leaves = sum(len(subtree.leaves) for subtree in lease.accepted)
        self.reason = LeaseEndReason.COMPLETE
        self.error = ""
        """Why the last branch that failed did, or was given back."""

    async def run(self) -> None:
        plan, question = self._lease.plan, self._lease.question
        prompt, room = await render_prompt(self._text, question.prompt), self._player.context(plan)
        check_prompt(question, prompt, room)
        if self._gate.stopped:
            self.reason = LeaseEndReason.STOPPED
            return
        if missing := self._player.missing:
            self.reason, self.error = LeaseEndReason.RETURNED, f"{missing}; nothing was begun"
            return
        async with asyncio.TaskGroup() as trees:
            for tree in range(plan.trees):
                trees.create_task(self._tree(tree, prompt), name=f"tree {self._lease.id}/{tree}")

    def end(self, reason: LeaseEndReason, error: str = "") -> LeaseEnd:
        plan = self._lease.plan
        forgone = plan.leaves - plan.trees - self._begun - sum(subtree.index > 0 for subtree in self._lease.accepted)
        return LeaseEnd(self._lease.id, reason, forgone, Cost.total([tree.unaccounted for tree in self._allowances]), error)

    async def _tree(self, index: int, prompt: TokenIds) -> None:
        plan = self._lease.plan
        tree, states = Tree(prompt=prompt), States(self._environment, self._lease.question)
        for subtree in self._lease.accepted:
            if subtree.tree == index:
                tree.add(subtree)
        if 0 not in tree.indices:
            await self._play(self._branch(index, tree, states, 0, ROOT))
        for number in range(plan.rounds):
            first = 1 + number * plan.expansions
            if tree.indices.issuperset(range(first, first + plan.expansions)):
                continue
            await self._gate.open()
            # The nodes of the rounds before, whatever of this round and later ones another sampler has made.
            nodes = [node for node in tree.expandable() if node < first_node(first, plan)]
            async with asyncio.TaskGroup() as branches:
                for n, parent in enumerate(draw(nodes, plan.expansions, (self._lease.seed, index, number)), first):
                    branch = self._branch(index, tree, states, n, parent)
                    if n not in tree.indices and self._may_begin(branch, step := self._player.next_step(branch)):
                        branches.create_task(self._expand(branch, step), name=f"branch {self._lease.id}/{index}/{n}")

    def _branch(self, tree_index: int, tree: Tree, states: States, index: int, parent: int) -> Branch:
        return Branch(self._lease, tree_index, index, parent, tree, states, self._allowances[tree_index].bill(), self._gate)

    def _may_begin(self, branch: Branch, step: Budget) -> bool:
        if self.reason is LeaseEndReason.RETURNED:
            return False
        if self._gate.stopped:
            self.reason = LeaseEndReason.STOPPED
        elif not self._allowances[branch.tree_index].claim(step):
            self.reason = LeaseEndReason.BUDGET
        else:
            self._begun += 1
            return True
        return False

    async def _expand(self, branch: Branch, step: Budget) -> None:
        try:
            await self._play(branch)
        finally:
            self._allowances[branch.tree_index].release(step)

    async def _play(self, branch: Branch) -> None:
        try:
            subtree, error = await self._player.play(branch)
        except DeadlineError as late:
            self._give_back(branch, late)
            return
        self.error = error or self.error
        branch.tree.add(subtree)
        self.leaves += len(subtree.leaves)
        emitted = self._emit(subtree)
        if inspect.isawaitable(emitted):
            await emitted
        branch.bill.settled = True  # one that is cut off while it waits here never reaches the learner

    def _give_back(self, branch: Branch, late: DeadlineError) -> None:
        """Leave a branch out as if it had never been begun, but for what it cost."""
        self._metrics.errors.labels(type(late).__name__).inc()
        self._begun -= branch.index > 0
        self.reason, self.error = LeaseEndReason.RETURNED, str(late)


def _first(error: Exception) -> Exception:
    """The first error inside nested groups."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
