"""The desk: where samplers, trainer and control plane meet the lease book. One asyncio loop, hence no locks.

    sampler ──Hello, Demand, Subtree, LeaseEnd──► desk ──Lease, Ack, StopExpanding, Drain──► sampler
    trainer ──Take, Publish, Covered, Evaluate──► desk ──groups, evaluation──► trainer
    control ──running | paused | draining───────► desk
                                                   │ every change
                                                   ▼
                                                 clerk ──► book, journal, reports

The book changes at once, the journal follows, and an ack leaves only when the journal is durable.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from learner.intake.coordinator.batcher import Batches
from learner.intake.coordinator.journaled_leases import Clerk
from learner.intake.coordinator.lease_dispatcher import Granting
from learner.intake.coordinator.sampler_sessions import SamplerSession, SamplerSessions, sampler_of
from learner.intake.coordinator.timings import CoordinatorTimings
from learner.intake.leases.circuit_breaker import ABSENT_SECONDS, Attempts, NoProgressBreaker, Verdict
from learner.intake.leases.lease_table import LeaseBook
from learner.intake.leases.rollout_group import Fate, OpenGroup
from learner.intake.leases.subtree_validation import check_holder, cost_of, reason_of
from learner.intake.monitoring.progress_clock import ProgressClock
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.wal.journal import BACKLOG_BYTES, Journal
from treegrpo.core.lease import LeaseEnd, LeaseEndReason, Plan
from treegrpo.errors import ContractError
from treegrpo.observability.rate_limited_log import RateLimitedLog
from treegrpo.timing.notifier import Notifier
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import tree_pb2
from treegrpo.wire.codec import plan_to_pb, version_to_pb
from treegrpo.wire.control import ControlPlane, RunState
from treegrpo.wire.size_limits import check_end

log = logging.getLogger(__name__)


class Desk:
    def __init__(
        self,
        book: LeaseBook,
        journal: Journal,
        control: ControlPlane,
        reporter: RunRecorder,
        *,
        run: str,
        plan: Plan,
        heldout: int,
        timings: CoordinatorTimings | None = None,
    ) -> None:
        """``heldout``: how many questions an evaluation has."""
        self.book = book
        timings = timings or CoordinatorTimings()
        self.sessions = SamplerSessions(set(book.open.holders), self.lose, timings)
        self._journal = journal
        self.control = control
        self.reporter = reporter
        self._run = run
        self._plan = plan
        self._heldout = heldout
        self.clerk = Clerk(book, journal, reporter)
        self.batches = Batches(book, self.clerk, self._stop, timings.finishing_seconds)
        self.changed = Notifier()
        self._refusals = RateLimitedLog(log)
        self.breaker = NoProgressBreaker()
        self._attempts = Attempts(self.breaker)
        self.began = self.state_since = time.monotonic()
        """When this intake began, and when it heard of the run's present state."""
        self._granting = Granting(book, self.clerk, self.open_sessions, self.breaker.quota)
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with RunError when rolling out on would lead nowhere."""
        asyncio.get_running_loop().call_later(ABSENT_SECONDS, self._look_for_hope)
        journal.on_availability_change = self.grant
        reporter.export_lease_table(book)

    # ---- samplers

    @property
    def pace(self) -> ProgressClock:
        """When something last went on."""
        return self.clerk.pace

    @property
    def open_sessions(self) -> dict[str, SamplerSession]:
        """The samplers that have a stream, by name."""
        return self.sessions.open_sessions

    def join(self, hello: pb.Hello) -> SamplerSession:
        """A stream opened. Older incarnations of the same sampler have lost their leases."""
        peer = SamplerSession(hello.sampler, hello.incarnation, hello.engine, hello.capacity, self._room)
        self.sessions.open_session(peer)
        self.breaker.came(peer.id)
        held = {group.lease.id for group in self.book.open.of(peer.holder)}
        version = self.book.version
        void = [lease for lease in hello.leases if lease not in held]
        welcome = pb.Welcome(run=self._run, void_leases=void, plan=plan_to_pb(self._plan))
        if version is not None:
            welcome.version.CopyFrom(version_to_pb(version))
        peer.send_response(pb.RolloutResponse(welcome=welcome))  # before anything else: what follows may tell it to stop
        for group in self.book.open.of(peer.holder):
            if group.told_at is not None:  # it may have been said to a stream that was breaking
                self._stop(group)
        if self.control.state is RunState.DRAINING:
            peer.send_response(pb.RolloutResponse(drain=pb.Drain()))
        for holder in set(self.book.open.holders) - {peer.holder}:
            if sampler_of(holder) == peer.id:
                self.lose(holder)
        for lease in held - set(hello.leases):  # granted while the stream broke: the sampler never saw it
            self._end(LeaseEnd(lease, LeaseEndReason.RETURNED), Verdict.NEUTRAL)
        log.info("sampler %s joined (%s, %d at once)", peer.id, peer.engine, peer.capacity)
        self.reporter.record_samplers(len(self.open_sessions), self.breaker.aside())
        return peer

    @property
    def _room(self) -> int:
        """Messages for one sampler: of every lease there may be itself, an ack of each subtree and the word to stop."""
        return (self.book.most + self._heldout) * (self._plan.leaves + 2) + 16

    def leave(self, peer: SamplerSession) -> None:
        """Its stream closed: its leases wait for it until it was silent for too long."""
        if self.sessions.close_session(peer):
            log.info("sampler %s left", peer.id)
            self.breaker.left(peer.id)
            self.reporter.record_samplers(len(self.open_sessions), self.breaker.aside())

    def lose(self, holder: str) -> None:
        """A sampler is gone for good: others go on with its groups."""
        reason = self.sessions.expire_holder(holder)
        if (name := sampler_of(holder)) not in self.open_sessions:
            self.breaker.left(name)
        self.reporter.record_samplers(len(self.open_sessions), self.breaker.aside())
        for group in self.book.open.of(holder):
            log.warning("lease %s of sampler %s is lost, with %d subtrees", group.lease.id, holder, len(group.subtrees))
            self._end(LeaseEnd(group.lease.id, reason, error=f"sampler {holder} is gone"))
        self.grant()

    def demand(self, peer: SamplerSession, leases: int) -> None:
        peer.demand = leases
        self._granting.look_at(peer.id)
        self.grant()

    def accept(self, peer: SamplerSession, sent: tree_pb2.Subtree) -> None:
        """Take a subtree in. Acked when it is durable, also that it is refused: it is not sent again."""
        ack = pb.Ack(lease=sent.lease, tree=sent.tree, index=sent.index)
        try:
            check_holder(self.book.find(sent.lease), sent.lease, peer.holder)
            kept = self.clerk.accept(sent)
        except ContractError as error:
            ack.refusal = str(error)
            kept = self._refuse(peer, sent, error)
        response = pb.RolloutResponse(ack=ack)
        kept.add_done_callback(lambda future: None if future.exception() else peer.send_response(response))

    def _refuse(self, peer: SamplerSession, sent: tree_pb2.Subtree, error: ContractError) -> asyncio.Future[int]:
        """Count it, once. Its lease goes no further, since what could follow hangs below it, and trains on what it has.

        Done when that is durable.
        """
        group, leaves = self.book.open.get(sent.lease), len(sent.leaves)
        reason = reason_of(group, peer.holder, error)
        self._refusals.log_refusal(peer.id, reason, f"a subtree: {error}")
        if group is None or reason == "holder":
            self.reporter.record_rejection(reason, leaves)
            return self._journal.durable_so_far()
        cost = cost_of(sent, group.lease.plan)
        kept = self.clerk.refuse(sent.lease, (sent.tree, sent.index), cost, reason, str(error))
        if kept is not None:
            self.reporter.record_rejection(reason, leaves)
            group.told_at = group.told_at or time.monotonic()
            self._stop(group)
        return kept or self._journal.durable_so_far()

    @property
    def behind(self) -> bool:
        """Whether so much waits for the disk that samplers have to wait too."""
        return self._journal.backlog_bytes > BACKLOG_BYTES

    async def caught_up(self) -> None:
        """Return when the disk is no longer behind."""
        await self._journal.wait_for_capacity()

    def end(self, peer: SamplerSession, end: LeaseEnd) -> None:
        """A lease ends. What its sampler stopped by itself another goes on with. Raises ContractError: nothing costs so much."""
        group = self.book.open.get(end.lease)
        if group is None or not end.reason.from_sampler or group.holder != peer.holder:
            self._refusals.log_refusal(peer.id, "end", f"the end of lease {end.lease!r}, which is not open, or not its own")
            return
        check_end(end, group.lease.plan)
        end = group.settle(end)
        if end.reason is LeaseEndReason.STOPPED and group.told_at is None and self.control.state is not RunState.DRAINING:
            end = replace(end, reason=LeaseEndReason.RETURNED)
        if end.error and not self.breaker.put_aside(peer.id):  # what it says then is in the line that puts it aside
            log.warning("lease %s ends as %s on sampler %s: %s", end.lease, end.reason.value, peer.id, end.error)
        self._end(end)
        self.grant()

    def _end(self, end: LeaseEnd, verdict: Verdict | None = None) -> None:
        group = self.book.open[end.lease]
        name = sampler_of(group.holder)
        verdict = verdict or Verdict.of(group, end)
        excused = self.book.at_fault(group, end) and self._attempts.excused(group, name, self.open_sessions)
        group = self.clerk.end(end, excused=excused)
        if group.fate in (Fate.CLOSED, Fate.ASIDE):
            self._attempts.forget(group)
        self._judge(name, verdict, end.error)
        self._granting.look_at(name)
        self.batches.press()
        self.changed.notify()

    def _judge(self, name: str, verdict: Verdict, error: str) -> None:
        """Put a sampler aside that only fails, and give up a run in which all do."""
        before = self.breaker.put_aside(name)
        if seconds := self.breaker.judge(name, verdict, error):
            words = self.breaker.said(name) or "it says nothing of why"
            log.warning("sampler %s is put aside for %.0f s, its last leases came to nothing; %s", name, seconds, words)
            asyncio.get_running_loop().call_later(seconds, self._try_again, name)
        if self.breaker.put_aside(name) is not before:
            self.reporter.record_samplers(len(self.open_sessions), self.breaker.aside())
        if verdict is Verdict.FAILED:
            self._look_for_hope()

    def _look_for_hope(self) -> None:
        """Give up the run if nothing comes of it; see `NoProgressBreaker.hopeless`."""
        trained = self.book.version is not None and self.book.version.step > 0
        if not self.broken.done() and (hopeless := self.breaker.hopeless(trained=trained)) is not None:
            self.broken.set_exception(hopeless)

    def _try_again(self, name: str) -> None:
        self._granting.look_at(name)
        self.grant()

    def _stop(self, group: OpenGroup) -> None:
        for peer in self.open_sessions.values():
            if peer.holder == group.holder:
                peer.send_response(pb.RolloutResponse(stop_expanding=pb.StopExpanding(lease=group.lease.id)))

    def grant(self) -> None:
        """Grant what there is to grant, unless the run or the disk stands still."""
        journal = self._journal
        if self.control.state is not RunState.RUNNING or journal.blocked or journal.low_space_since is not None:
            return
        self.batches.press()
        self._granting.grant()

    # ---- control plane

    async def follow(self) -> None:
        """Obey the run state, and notice samplers that are gone or silent."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._obey(), name="run-state")
            tasks.create_task(self.sessions.expire_silent_forever(), name="silence")

    async def _obey(self) -> None:
        before = self.control.state
        while True:
            await self.control.wait_change()
            state = self.control.state
            if state is not before:
                self.state_since = time.monotonic()
                log.info("the run is %s", state.value)
                if state is RunState.DRAINING:
                    for peer in self.open_sessions.values():
                        peer.send_response(pb.RolloutResponse(drain=pb.Drain()))
                before = state
            self.sessions.apply_last_wills(self.control.members.values())
            self.grant()
            self.changed.notify()

    async def drained(self, seconds: float) -> None:
        """Wait until no lease is out; those that remain after ``seconds`` are for another time."""
        deadline = time.monotonic() + seconds
        while self.book.open and await self.changed.wait(deadline):
            pass
        for lease in list(self.book.open):
            self._end(LeaseEnd(lease, LeaseEndReason.INTERRUPTED))
