"""Client of the rollout stream: reconnects whenever it breaks, and sends again what was not acked.

worker ──subtree, lease end──► outbox ──► stream ──► learner
  ▲                               └── kept until acked, sent again after a reconnect
  └──── welcome, void lease, lease, stop expanding, drain ◄──── stream
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from services.sampler.expansion.stall_monitor import WaitReason
from services.sampler.learner_link.outbox import Outbox
from treegrpo.core.lease import HEARTBEAT_SECONDS, LeaseEnd, Plan
from treegrpo.core.step import Subtree
from treegrpo.errors import ContractError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.timing.backoff import Backoff
from treegrpo.timing.notifier import Notifier
from treegrpo.v1 import rollout_pb2, rollout_pb2_grpc

log = logging.getLogger(__name__)
RECONNECT_BACKOFF = Backoff((0.1, 0.5, 1.0, 2.0, 5.0))


@dataclass(frozen=True, slots=True)
class StreamTimings:
    """Time limits of the rollout stream, in seconds, and how it reconnects."""

    welcome: float = 10.0
    """The longest the learner may take to answer Hello."""
    heartbeat: float = HEARTBEAT_SECONDS
    """Between two heartbeats."""
    reconnect: Backoff = RECONNECT_BACKOFF
    """Before the stream is opened again."""


class LeaseHandler(Protocol):
    """Works on leases, and handles what the learner says about them."""

    def build_hello(self) -> rollout_pb2.Hello:
        """The first message of a stream: who this sampler is and which leases it works on."""
        ...

    def build_heartbeat(self) -> rollout_pb2.Heartbeat: ...

    def handle_welcome(self, welcome: rollout_pb2.Welcome) -> None:
        """Handle the opening of a stream; stop work on the leases that the learner calls void."""
        ...

    def handle_lease(self, lease: rollout_pb2.Lease) -> None: ...

    def stop_lease(self, lease: str) -> None:
        """Start no further expansion of ``lease``."""
        ...

    def drain(self) -> None:
        """Finish the held leases and call `RolloutClient.close_stream`."""
        ...


class RolloutClient:
    """Keeps a stream to the learner open from `run_stream` until `close_stream`."""

    def __init__(
        self, channel: grpc.aio.Channel, address: str, metrics: SamplerMetrics, timings: StreamTimings | None = None
    ) -> None:
        self._stub: Any = rollout_pb2_grpc.RolloutServiceStub(channel)
        self._address = address
        self._metrics = metrics
        self._timings = timings or StreamTimings()
        self._outbox = Outbox()
        self._acked = Notifier()
        self._demand = 0
        self._closing = False
        self._queue: asyncio.Queue[rollout_pb2.RolloutRequest | None] | None = None
        """What the open stream has still to write; None in it ends the stream, None for it: no stream is open."""
        self._last_answer = time.monotonic()
        """When the learner last answered: with its welcome, with an ack, or by closing the stream."""

    @property
    def unacked(self) -> int:
        """Subtrees that the learner is not known to have."""
        return self._outbox.subtrees

    @property
    def wait_reason(self) -> WaitReason | None:
        """What the client waits for: a stream, or acks."""
        if self._queue is None:
            return WaitReason("learner", f"the learner at {self._address}", self._last_answer)
        if self._outbox.full:
            what = f"the learner at {self._address} to acknowledge {self.unacked} subtrees"
            return WaitReason("learner", what, self._last_answer)
        return None

    @property
    def leases(self) -> Collection[str]:
        """Leases with a message that may not have arrived."""
        return self._outbox.leases

    def limit_unacked(self, leases: int, plan: Plan) -> None:
        """Limit unacked subtrees to those of a number of leases of a plan."""
        self._outbox.set_capacity(leases, plan)

    async def send_subtree(self, subtree: Subtree) -> None:
        """Send a subtree, again after each reconnect until it is acked. Waits while too much is unacked.

        The learner decides how long: its acks end the wait, or a void lease cancels the caller.
        """
        while self._outbox.full:
            await self._acked.wait()
        self._enqueue(self._outbox.put_subtree(subtree))
        self._metrics.unacked.set(self.unacked)

    def send_lease_end(self, end: LeaseEnd) -> None:
        """Send the last message of a lease."""
        self._enqueue(self._outbox.put_lease_end(end))

    def set_demand(self, leases: int) -> None:
        """Tell the learner how many leases this sampler wants to hold at once."""
        if leases != self._demand:
            self._demand = leases
            self._enqueue(self._demand_request())

    async def wait_delivered(self) -> None:
        """Return when every subtree sent so far is acked. Has no time limit: the caller sets one."""
        while self.unacked:
            await self._acked.wait()

    def close_stream(self) -> None:
        """End the stream after what has been sent; `run_stream` returns when the learner has taken all of it."""
        self._closing = True
        self._enqueue(None)

    async def run_stream(self, handler: LeaseHandler) -> None:
        """Open the stream, and open it again whenever it breaks, until `close_stream`.

        Raises:
            ContractError: the learner refuses what this sampler says; trying again would not help.
        """
        failures = 0
        while True:
            welcomed, broken = await self._session(handler)
            if self._closing and broken is None:
                return
            failures = 0 if welcomed else failures + 1
            delay = self._timings.reconnect.delay(failures)
            reason = "it closed the stream" if broken is None else broken
            log.warning("the stream to the learner at %s broke (%s); reconnecting in %.1f s", self._address, reason, delay)
            await asyncio.sleep(delay)
            self._metrics.reconnects.inc()

    async def _session(self, handler: LeaseHandler) -> tuple[bool, str | None]:
        """Run one stream; returns whether it was welcomed, and why it broke (None: the learner ended it in order)."""
        call = self._stub.Rollout()
        try:
            async with asyncio.timeout(self._timings.welcome):
                await call.write(rollout_pb2.RolloutRequest(hello=handler.build_hello()))
                first = await call.read()
            if not isinstance(first, rollout_pb2.RolloutResponse):
                return False, "it closed the stream"
            if first.WhichOneof("kind") != "welcome":
                raise ContractError(f"The learner at {self._address} did not begin with Welcome; it must be of this version.")
            for lease in first.welcome.void_leases:
                self._outbox.remove_lease_end(lease)
            self._metrics.unacked.set(self.unacked)
            self._acked.notify()
            handler.handle_welcome(first.welcome)
            self._metrics.serving.set(1)
            return True, await self._exchange(call, handler)
        except TimeoutError:
            return False, f"no welcome within {self._timings.welcome:.0f} s"
        except grpc.aio.AioRpcError as error:
            return False, self._reason(error)
        finally:
            self._metrics.serving.set(0)
            if self._queue is not None:
                self._queue, self._last_answer = None, time.monotonic()
            call.cancel()

    async def _exchange(self, call: Any, handler: LeaseHandler) -> str | None:
        """Write and read until the stream ends; returns why it broke, if it did."""
        self._queue, self._last_answer = asyncio.Queue(), time.monotonic()
        for request in (self._demand_request(), *self._outbox, *([None] if self._closing else [])):
            self._queue.put_nowait(request)
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(self._write_queue(call, self._queue), name="learner-writer")
            beating = tasks.create_task(self._send_heartbeats(handler), name="learner-heartbeat")
            broken = await self._read_responses(call, handler)
            writing.cancel()
            beating.cancel()
        return broken

    async def _read_responses(self, call: Any, handler: LeaseHandler) -> str | None:
        try:  # without a time limit: gRPC's keepalive notices a learner that is gone, or stopped
            while isinstance(response := await call.read(), rollout_pb2.RolloutResponse):
                self._handle_response(response, handler)
        except grpc.aio.AioRpcError as error:
            return self._reason(error)
        return None

    def _handle_response(self, response: rollout_pb2.RolloutResponse, handler: LeaseHandler) -> None:
        match response.WhichOneof("kind"):
            case "ack":
                self._handle_ack(response.ack)
            case "lease":
                handler.handle_lease(response.lease)
            case "stop_expanding":
                handler.stop_lease(response.stop_expanding.lease)
            case "drain":
                handler.drain()
            case kind:
                log.warning("ignored %s from the learner, which this sampler does not know", kind or "an empty message")

    def _handle_ack(self, ack: rollout_pb2.Ack) -> None:
        self._outbox.remove_acked(ack.lease, ack.tree, ack.index)
        self._metrics.unacked.set(self.unacked)
        self._last_answer = time.monotonic()
        self._acked.notify()
        if ack.refusal:
            self._metrics.errors.labels(ContractError.__name__).inc()
            log.warning("the learner refused a subtree of lease %s: %s", ack.lease, ack.refusal)

    async def _write_queue(self, call: Any, queue: asyncio.Queue[rollout_pb2.RolloutRequest | None]) -> None:
        try:
            while (request := await queue.get()) is not None:
                await call.write(request)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the stream broke: the reader knows why, and the outbox still has everything

    async def _send_heartbeats(self, handler: LeaseHandler) -> None:
        while True:
            if self._queue is not None and self._queue.empty():  # else other messages show that it lives
                self._enqueue(rollout_pb2.RolloutRequest(heartbeat=handler.build_heartbeat()))
            await asyncio.sleep(self._timings.heartbeat)

    def _enqueue(self, request: rollout_pb2.RolloutRequest | None) -> None:
        """Write ``request`` to the open stream; without one, the next stream begins with the outbox."""
        if self._queue is not None:
            self._queue.put_nowait(request)

    def _demand_request(self) -> rollout_pb2.RolloutRequest:
        return rollout_pb2.RolloutRequest(demand=rollout_pb2.Demand(leases=self._demand))

    def _reason(self, error: grpc.aio.AioRpcError) -> str:
        if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED):
            raise ContractError(f"The learner at {self._address} refuses this sampler: {error.details()}") from error
        return f"{error.code().name}: {error.details()}"
