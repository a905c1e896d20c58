"""The desk: where samplers, trainer and control plane meet the lease book. One asyncio loop, hence no locks.

    sampler ──Hello, Demand, Subtree, LeaseEnd──► desk ──Lease, Ack, StopExpanding, Drain──► sampler
    trainer ──Take, Publish, Covered, Evaluate──► desk ──groups, evaluation──► trainer
    control ──running | paused | draining───────► desk
                                                   │ every grant, subtree and end
                                                   ▼
                                                journal

The book changes at once, the journal follows, and an ack leaves only when the journal is durable.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path

from learner.intake.evaluation import Round
from learner.intake.groups import OpenGroup
from learner.intake.journal import Journal
from learner.intake.leases import LeaseBook
from learner.intake.peers import Peer
from learner.intake.report import Reporter
from learner.intake.weights import WeightsServer
from treegrpo.change import Change
from treegrpo.codec import lease_end_to_pb, lease_to_pb, plan_to_pb, subtree_cost, subtree_from_pb, version_to_pb
from treegrpo.control import ControlPlane, RunState
from treegrpo.errors import ContractError, TreeError, UnavailableError
from treegrpo.handoff import Evaluation, Taken, pack_group
from treegrpo.lease import LeaseEnd, LeaseEndReason, Plan
from treegrpo.question import Question
from treegrpo.tree import PolicyVersion
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import tree_pb2

log = logging.getLogger(__name__)
LONG_POLL_SECONDS = 5.0
BARREN_GROUPS = 64
"""Groups in a row without a single leaf before the run is given up."""
RECONNECT_SECONDS = 20.0
"""A sampler that lost its stream keeps its leases for so long."""


class Desk:
    def __init__(
        self,
        book: LeaseBook,
        journal: Journal,
        control: ControlPlane,
        weights: WeightsServer,
        reporter: Reporter,
        *,
        run: str,
        plan: Plan,
        heldout: list[Question],
    ) -> None:
        self.book = book
        self.peers: dict[str, Peer] = {}
        self._journal = journal
        self._control = control
        self._weights = weights
        self._reporter = reporter
        self._run = run
        self._plan = plan
        self._heldout = heldout
        self._round: Round | None = None
        self._departures: dict[str, asyncio.TimerHandle] = {}
        self._changed = Change()
        self._barren = 0
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with UnavailableError when rolling out on would lead nowhere."""

    # ---- samplers

    def join(self, hello: pb.Hello) -> Peer:
        """A stream opened. An older incarnation of the same sampler has lost its leases."""
        peer = Peer(hello.sampler, hello.incarnation, hello.engine, hello.capacity)
        before = self.peers.get(peer.id)
        if before is not None and before.incarnation != peer.incarnation:
            del self.peers[peer.id]  # first, or what it loses is granted to it again
            self.lose(before.holder)
        if (departure := self._departures.pop(peer.holder, None)) is not None:
            departure.cancel()
        self.peers[peer.id] = peer
        held = {group.lease.id for group in self.book.of(peer.holder)}
        for lease in held - set(hello.leases):  # granted while the stream broke: the sampler never saw it
            self._end(LeaseEnd(lease, LeaseEndReason.LOST))
        version = self.book.version
        void = [lease for lease in hello.leases if lease not in held]
        welcome = pb.Welcome(run=self._run, void_leases=void, plan=plan_to_pb(self._plan))
        if version is not None:
            welcome.version.CopyFrom(version_to_pb(version))
        peer.send(pb.RolloutResponse(welcome=welcome))
        for group in self.book.of(peer.holder):
            if group.told_to_stop:  # it may have been said to a stream that was breaking
                self._stop(group)
        if self._control.state is RunState.DRAINING:
            peer.send(pb.RolloutResponse(drain=pb.Drain()))
        log.info("sampler %s joined (%s, %d at once)", peer.id, peer.engine, peer.capacity)
        self._reporter.samplers(len(self.peers))
        return peer

    def leave(self, peer: Peer) -> None:
        """Its stream closed: its leases wait a while for it to come back."""
        if self.peers.get(peer.id) is peer:
            del self.peers[peer.id]
            log.info("sampler %s left", peer.id)
            self._reporter.samplers(len(self.peers))
            if self.book.of(peer.holder):
                loop = asyncio.get_running_loop()
                self._departures[peer.holder] = loop.call_later(RECONNECT_SECONDS, self.lose, peer.holder)

    def lose(self, holder: str) -> None:
        """A sampler is gone for good: its questions go back into the queue."""
        if (departure := self._departures.pop(holder, None)) is not None:
            departure.cancel()
        for group in self.book.of(holder):
            log.warning("lease %s of sampler %s is lost; its question goes to another", group.lease.id, holder)
            self._end(LeaseEnd(group.lease.id, LeaseEndReason.LOST))
        self.grant()

    def demand(self, peer: Peer, leases: int) -> None:
        peer.demand = leases
        self.grant()

    def accept(self, peer: Peer, sent: tree_pb2.Subtree) -> None:
        """Take a subtree in; acked when it is durable, or at once when it is refused (so that it is not sent again)."""
        ack = pb.Ack(lease=sent.lease, tree=sent.tree, index=sent.index)
        group = self.book.open.get(sent.lease)
        try:
            subtree = subtree_from_pb(sent, group.group.id if group else "")
            fresh = self.book.accept(subtree)
        except ContractError as error:
            ack.refusal = str(error)
            self._refuse(group, sent, error)
            log.warning("refused a subtree of sampler %s: %s", peer.id, error)
            peer.send(pb.RolloutResponse(ack=ack))
            return
        if fresh:
            self._reporter.accepted(self.book.open[subtree.lease], subtree)
            self._reporter.book(self.book)
            durable = self._journal.append({"event": "accepted", "subtree": sent.SerializeToString()})
        else:
            self._reporter.duplicate()
            durable = self._journal.barrier()
        durable.add_done_callback(lambda future: None if future.exception() else peer.send(pb.RolloutResponse(ack=ack)))

    def _refuse(self, group: OpenGroup | None, sent: tree_pb2.Subtree, error: ContractError) -> None:
        """Count it, once. Its lease goes no further, since what could follow hangs below it, and trains on what it has."""
        if group is None:
            self._reporter.refused("lease")
        elif group.refuse((sent.tree, sent.index), subtree_cost(sent), str(error)):
            self._reporter.refused(error.field if isinstance(error, TreeError) else "contract")
            group.told_to_stop = True
            self._stop(group)

    def end(self, peer: Peer, end: LeaseEnd) -> None:
        """A sampler is done with a lease."""
        if end.reason is LeaseEndReason.LOST or end.lease not in self.book.open:
            log.info("sampler %s ended lease %s, which is not open", peer.id, end.lease)
            return
        end = self.book.open[end.lease].settle(end)
        if end.error:
            log.warning("lease %s failed on sampler %s: %s", end.lease, peer.id, end.error)
        self._end(end)
        self.grant()

    def _end(self, end: LeaseEnd) -> None:
        group = self.book.ended(end)
        self._journal.append({"event": "ended", "end": lease_end_to_pb(end).SerializeToString()})
        self._reporter.ended(group, end)
        if end.reason is not LeaseEndReason.LOST:
            self._judge(group, end)
        for late in self.book.overdue():
            self._stop(late)
        self._changed.tell()

    def _judge(self, group: OpenGroup, end: LeaseEnd) -> None:
        """Count a closed group for its evaluation, and give up when nothing leads to an answer any more."""
        if self._round is not None and group.draw < 0 and group.lease.min_version == self._round.version:
            self._round.close(group)
        self._barren = 0 if group.has_leaves else self._barren + 1
        if self._barren >= BARREN_GROUPS and not self.broken.done():
            reason = f" ({end.error})" if end.error else ""
            self.broken.set_exception(
                UnavailableError(
                    f"The last {BARREN_GROUPS} questions led to no finished episode{reason}; see the samplers' logs. "
                    "Does the retriever answer, and do the prompts fit rollout.max_context?"
                )
            )

    def _stop(self, group: OpenGroup) -> None:
        for peer in self.peers.values():
            if peer.holder == group.holder:
                peer.send(pb.RolloutResponse(stop_expanding=pb.StopExpanding(lease=group.lease.id)))

    def grant(self) -> None:
        """Grant leases while there are both work within the bound and samplers that want it; the least served first."""
        if self._control.state is not RunState.RUNNING:
            return
        room = {peer.id: peer.demand - len(self.book.of(peer.holder)) for peer in self.peers.values()}
        while room and max(room.values()) > 0 and (work := self.book.next_lease()) is not None:
            lease, draw = work
            peer = self.peers[max(room, key=lambda name: room[name])]
            room[peer.id] -= 1
            self.book.granted(lease, draw, peer.holder, time.monotonic())
            granted = lease_to_pb(lease)
            self._journal.append({"event": "granted", "lease": granted.SerializeToString(), "draw": draw})
            peer.send(pb.RolloutResponse(lease=granted))
        self._reporter.book(self.book)

    # ---- trainer

    async def take(self, position: int, count: int) -> Taken:
        """``count`` closed groups from ``position`` on, as soon as there are that many; none after a few seconds."""
        deadline = time.monotonic() + LONG_POLL_SECONDS
        while True:
            state = self._control.state
            groups = self.book.groups.take(position, count) if state is RunState.RUNNING else []
            if groups or state is RunState.DRAINING or not await self._changed.wait(deadline):
                await self._journal.flushed()
                return Taken([pack_group(g.group, g.subtrees) for g in groups], state.value)

    async def publish(self, version: PolicyVersion, path: Path, position: int) -> None:
        """Serve and announce a policy version; the groups before ``position`` made it."""
        await self._weights.publish(version, path)
        self.book.version = version
        self.book.groups.trained(position)
        await self._control.announce(version)
        self.grant()

    def covered(self, position: int) -> None:
        """A checkpoint covers the groups before ``position``."""
        self.book.groups.forget(position)

    async def evaluate(self, version: PolicyVersion) -> Evaluation:
        """Begin the evaluation of ``version`` unless it runs, and wait a few seconds for its end."""
        if self._round is None or self._round.version != version:
            self._round = Round(version, self._heldout)
            self.book.evaluate(self._heldout)
            self.grant()
        deadline = time.monotonic() + LONG_POLL_SECONDS
        while not self._round.done and self._control.state is not RunState.DRAINING and await self._changed.wait(deadline):
            pass
        if self._round.done:
            self._reporter.evaluated(self._round, self.book)
        return replace(self._round.result(), state=self._control.state.value)

    def report(self, values: dict[str, object]) -> None:
        """A line for the run's progress file."""
        self._reporter.step(values, self.book)

    # ---- control plane

    async def follow(self) -> None:
        """Obey the run state and notice members that are gone."""
        before = self._control.state
        while True:
            await self._control.wait_change()
            state = self._control.state
            if state is not before:
                log.info("the run is %s", state.value)
                if state is RunState.DRAINING:
                    for peer in self.peers.values():
                        peer.send(pb.RolloutResponse(drain=pb.Drain()))
                before = state
            for member in self._control.members.values():
                holder = f"{member.id}/{member.incarnation:016x}"
                if not member.alive and holder in self._departures:
                    self.lose(holder)
            self.grant()
            self._changed.tell()

    async def drained(self, seconds: float) -> None:
        """Wait until no lease is out; those that remain after ``seconds`` are lost."""
        deadline = time.monotonic() + seconds
        while self.book.open and await self._changed.wait(deadline):
            pass
        for lease in list(self.book.open):
            self._end(LeaseEnd(lease, LeaseEndReason.LOST))
