"""The coordinator: connects samplers, trainer and control plane with the lease table. One asyncio loop, hence no locks.

    sampler ──Hello, Demand, Subtree, LeaseEnd──► coordinator ──Lease, Ack, StopExpanding, Drain──► sampler
    trainer ──Take, Publish, Covered, Evaluate──►     │       ──groups, evaluation──► trainer
    control ──running | paused | draining───────►     │
                                                      ▼ every change
                                             journaled leases ──► lease table, journal, recorder
                                                      ▲
                    lease dispatcher, a task ── grants, asks overdue groups to stop

The table changes at once, the journal follows, and an ack leaves only when the journal is durable.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from learner.intake.coordinator.batcher import Batcher
from learner.intake.coordinator.journaled_leases import JournaledLeases
from learner.intake.coordinator.lease_dispatcher import LeaseDispatcher
from learner.intake.coordinator.sampler_sessions import SamplerSession, SamplerSessions, sampler_of
from learner.intake.coordinator.timings import CoordinatorTimings
from learner.intake.leases.circuit_breaker import BreakerLimits, LeaseOutcome, NoProgressBreaker
from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.question_give_up import QuestionAttempts
from learner.intake.leases.rollout_group import RolloutGroup
from learner.intake.leases.staleness import StalenessBound
from learner.intake.leases.subtree_validation import check_lease_holder, claimed_cost, rejection_reason
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


class Coordinator:
    def __init__(
        self,
        table: LeaseTable,
        journal: Journal,
        control: ControlPlane,
        recorder: RunRecorder,
        *,
        run: str,
        plan: Plan,
        heldout: int,
        timings: CoordinatorTimings | None = None,
        breaker_limits: BreakerLimits | None = None,
    ) -> None:
        """``heldout``: how many questions an evaluation has."""
        self.lease_table = table
        timings = timings or CoordinatorTimings()
        self.sessions = SamplerSessions(set(table.open_leases.holders), self.lose_holder, timings)
        self._journal = journal
        self.control = control
        self.recorder = recorder
        self._run = run
        self._plan = plan
        self._heldout = heldout
        self.leases = JournaledLeases(table, journal, recorder)
        self.staleness = StalenessBound(
            table, self.leases.close_group, self._request_stop, finishing_seconds=timings.finishing_seconds
        )
        self.batcher = Batcher(table, self.leases, self.staleness)
        self.changed = Notifier()
        """Tells of lease ends and of the control plane."""
        self._rejections = RateLimitedLog(log)
        self.breaker = NoProgressBreaker(breaker_limits)
        self._attempts = QuestionAttempts(self.breaker)
        self.started_at = self.state_since = time.monotonic()
        """When this intake started, and when it heard of the run's present state."""
        self.dispatcher = LeaseDispatcher(
            *(table, self.leases, self.staleness, self.open_sessions),
            quota=self.breaker.lease_quota,
            may_grant=self._may_grant,
        )
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with RunError when further rollouts would be in vain."""
        asyncio.get_running_loop().call_later(self.breaker.limits.absent_seconds, self._give_up_if_hopeless)
        journal.on_availability_change = self.dispatcher.wake_dispatcher
        recorder.export_lease_table(table)

    # ---- samplers

    @property
    def open_sessions(self) -> dict[str, SamplerSession]:
        """The samplers that have a stream, by name."""
        return self.sessions.open_sessions

    def join_sampler(self, hello: pb.Hello) -> SamplerSession:
        """Register a sampler whose stream opened; older incarnations of it lose their leases."""
        session = SamplerSession(hello.sampler, hello.incarnation, hello.engine, hello.capacity, self._max_queued)
        self.sessions.open_session(session)
        self.breaker.sampler_joined(session.id)
        held = self.lease_table.open_leases.held_by(session.holder)
        ids = {group.lease.id for group in held}
        self._send_welcome(session, [lease for lease in hello.leases if lease not in ids])  # before it is asked to stop
        for group in held:
            if group.stop_requested_at is not None:  # it may have been asked on a stream that was breaking
                self._request_stop(group)
        if self.control.state is RunState.DRAINING:
            session.send_response(pb.RolloutResponse(drain=pb.Drain()))
        for holder in set(self.lease_table.open_leases.holders) - {session.holder}:
            if sampler_of(holder) == session.id:
                self.lose_holder(holder)
        for lease in ids - set(hello.leases):  # granted while the stream broke: the sampler never saw it
            self._end_lease(LeaseEnd(lease, LeaseEndReason.RETURNED), LeaseOutcome.NEUTRAL)
        log.info("sampler %s joined (%s, %d at once)", session.id, session.engine, session.capacity)
        self._record_samplers()
        return session

    def _send_welcome(self, session: SamplerSession, void_leases: list[str]) -> None:
        welcome = pb.Welcome(run=self._run, void_leases=void_leases, plan=plan_to_pb(self._plan))
        if self.lease_table.version is not None:
            welcome.version.CopyFrom(version_to_pb(self.lease_table.version))
        session.send_response(pb.RolloutResponse(welcome=welcome))

    @property
    def _max_queued(self) -> int:
        """The most messages queued for one sampler: each possible lease, the acks of its subtrees and its stop request."""
        return (self.lease_table.max_groups_in_flight + self._heldout) * (self._plan.leaves + 2) + 16

    def leave_sampler(self, session: SamplerSession) -> None:
        """Unregister a sampler whose stream closed; it keeps its leases until it has been silent for too long."""
        if self.sessions.close_session(session):
            log.info("sampler %s left", session.id)
            self.breaker.sampler_left(session.id)
            self._record_samplers()

    def lose_holder(self, holder: str) -> None:
        """End the leases of a lost sampler; others continue its groups."""
        reason = self.sessions.expire_holder(holder)
        if (name := sampler_of(holder)) not in self.open_sessions:
            self.breaker.sampler_left(name)
        self._record_samplers()
        for group in self.lease_table.open_leases.held_by(holder):
            log.warning("lease %s of sampler %s is lost, with %d subtrees", group.lease.id, holder, len(group.subtrees))
            self._end_lease(LeaseEnd(group.lease.id, reason, error=f"sampler {holder} is gone"))

    def _record_samplers(self) -> None:
        self.recorder.record_samplers(len(self.open_sessions), self.breaker.count_put_aside())

    def set_demand(self, session: SamplerSession, leases: int) -> None:
        """Set how many leases a sampler wants to hold at once."""
        session.demand = leases
        self.dispatcher.wake_dispatcher(session.id)

    @property
    def is_behind(self) -> bool:
        """Whether so many records wait for the disk that streams have to wait."""
        return self._journal.backlog_bytes > BACKLOG_BYTES

    async def wait_for_journal(self) -> None:
        """Return when few enough records wait for the disk."""
        await self._journal.wait_for_capacity()

    # ---- subtrees

    def accept_subtree(self, session: SamplerSession, sent: tree_pb2.Subtree) -> None:
        """Accept or reject a subtree. Either is acked when it is durable: it is not sent again."""
        ack = pb.Ack(lease=sent.lease, tree=sent.tree, index=sent.index)
        group = self.lease_table.find_group(sent.lease)
        try:
            durable = self.leases.record_subtree(check_lease_holder(group, sent.lease, session.holder), sent)
        except ContractError as error:
            ack.refusal = str(error)
            durable = self._reject_subtree(session, group, sent, error)
        response = pb.RolloutResponse(ack=ack)
        durable.add_done_callback(lambda future: None if future.exception() else session.send_response(response))

    def _reject_subtree(
        self, session: SamplerSession, group: RolloutGroup | None, sent: tree_pb2.Subtree, error: ContractError
    ) -> asyncio.Future[int]:
        """Count a rejected subtree, once, and stop its lease, whose group trains on what it has: what follows hangs below it.

        Done when that is durable.
        """
        group, leaves = group if group is not None and group.has_open_lease else None, len(sent.leaves)
        reason = rejection_reason(group, session.holder, error)
        self._rejections.log_refusal(session.id, reason, f"a subtree: {error}")
        if group is None or reason == "holder":
            self.recorder.record_rejection(reason, leaves)
            return self._journal.durable_so_far()
        cost = claimed_cost(sent, group.lease.plan)
        durable = self.leases.reject_subtree(group, (sent.tree, sent.index), cost, reason, str(error))
        if durable is not None:
            self.recorder.record_rejection(reason, leaves)
            group.stop_requested_at = group.stop_requested_at or time.monotonic()
            self._request_stop(group)
        return durable or self._journal.durable_so_far()

    def _request_stop(self, group: RolloutGroup) -> None:
        """Ask the sampler of a group, if it is connected, to expand it no further."""
        session = self.open_sessions.get(sampler_of(group.holder))
        if session is not None and session.holder == group.holder:
            session.send_response(pb.RolloutResponse(stop_expanding=pb.StopExpanding(lease=group.lease.id)))

    # ---- lease ends

    def end_lease(self, session: SamplerSession, end: LeaseEnd) -> None:
        """End a lease on its sampler's message; another one continues unfinished work. Raises ContractError: impossible cost."""
        group = self.lease_table.open_leases.get(end.lease)
        if group is None or not end.reason.from_sampler or group.holder != session.holder:
            self._rejections.log_refusal(session.id, "end", f"the end of lease {end.lease!r}, which is not open, or not its own")
            return
        check_end(end, group.lease.plan)
        end = group.with_rejected_cost(end)
        unasked = group.stop_requested_at is None and self.control.state is not RunState.DRAINING
        if end.reason is LeaseEndReason.STOPPED and unasked:
            end = replace(end, reason=LeaseEndReason.RETURNED)
        if end.error and not self.breaker.is_put_aside(session.id):  # else the line that puts it aside quotes the error
            log.warning("lease %s ends as %s on sampler %s: %s", end.lease, end.reason.value, session.id, end.error)
        self._end_lease(end)

    def _end_lease(self, end: LeaseEnd, outcome: LeaseOutcome | None = None) -> None:
        group = self.lease_table.require_open_lease(end.lease)
        name = sampler_of(group.holder)
        outcome = outcome or LeaseOutcome.classify(group, end)
        excused = group.counts_against_question(end) and self._attempts.is_excused(group, name, self.open_sessions)
        group = self.leases.end_lease(end, excused=excused)
        if group.is_done:
            self._attempts.forget_question(group)
        self._update_breaker(name, outcome, end.error)
        self.staleness.enforce_bound()  # also while the run is paused: the end of a lease may leave a batch waiting for another
        self.dispatcher.wake_dispatcher(name)
        self.changed.notify()

    def _update_breaker(self, name: str, outcome: LeaseOutcome, error: str) -> None:
        """Put a sampler aside whose leases all fail, and end the run if no sampler makes progress."""
        before = self.breaker.is_put_aside(name)
        if seconds := self.breaker.record_outcome(name, outcome, error):
            words = self.breaker.quote_last_error(name) or "it names no error"
            log.warning("sampler %s is put aside for %.0f s, since its last leases failed; %s", name, seconds, words)
            asyncio.get_running_loop().call_later(seconds, self.dispatcher.wake_dispatcher, name)
        if self.breaker.is_put_aside(name) is not before:
            self._record_samplers()
        if outcome is LeaseOutcome.FAILED:
            self._give_up_if_hopeless()

    def _give_up_if_hopeless(self) -> None:
        """End a run without progress; see `NoProgressBreaker.reason_to_give_up`."""
        trained = self.lease_table.version is not None and self.lease_table.version.step > 0
        if not self.failure.done() and (error := self.breaker.reason_to_give_up(trained=trained)) is not None:
            self.failure.set_exception(error)

    # ---- tasks

    def _may_grant(self) -> bool:
        """Whether leases may be granted: the run is not paused, and the disk accepts writes."""
        journal = self._journal
        return self.control.state is RunState.RUNNING and not journal.blocked and journal.low_space_since is None

    async def coordinate_forever(self) -> None:
        """Grant leases, follow the run state, and expire lost and silent samplers."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.dispatcher.dispatch_forever(), name="dispatch")
            tasks.create_task(self._follow_control_plane(), name="run-state")
            tasks.create_task(self.sessions.expire_silent_forever(), name="silence")

    async def _follow_control_plane(self) -> None:
        before = self.control.state
        while True:
            await self.control.wait_change()
            state = self.control.state
            if state is not before:
                self.state_since = time.monotonic()
                log.info("the run is %s", state.value)
                if state is RunState.DRAINING:
                    for session in self.open_sessions.values():
                        session.send_response(pb.RolloutResponse(drain=pb.Drain()))
                before = state
            self.sessions.apply_last_wills(self.control.members.values())
            self.dispatcher.wake_dispatcher()
            self.changed.notify()

    async def drain_leases(self, seconds: float) -> None:
        """Wait until no lease is open; those that remain after ``seconds`` are interrupted, to be granted another time."""
        deadline = time.monotonic() + seconds
        while self.lease_table.open_leases and await self.changed.wait(deadline):
            pass
        for lease in list(self.lease_table.open_leases):
            self._end_lease(LeaseEnd(lease, LeaseEndReason.INTERRUPTED))
